"""Records for tests of replay: of what a model decides by itself, and of other decisions."""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from routing import RoutingRecord
from routing.model_routers import model_routers

B, S = 3, 7


def tokens(seed: int = 0) -> Tensor:
    return torch.randint(61, (B, S), generator=torch.Generator().manual_seed(seed))


def own_record(model: nn.Module, *args: Any, **kwargs: Any) -> RoutingRecord:
    """What the model itself decides."""
    seen: list[tuple[Tensor, Tensor]] = []
    routers = model_routers(model)
    hooks = [
        router.module.register_forward_hook(
            lambda _module, _inputs, out, row=router.row: seen.append((out[row.expert_ids], out[row.weights].detach()))
        )
        for router in routers
    ]
    with torch.no_grad():
        model(*args, **kwargs)
    for hook in hooks:
        hook.remove()
    ids, weights = (torch.stack(parts, dim=1) for parts in zip(*seen, strict=True))
    shape = (*next(iter((*args, *kwargs.values()))).shape[:2], *ids.shape[1:])
    return RoutingRecord(
        expert_ids_BSLK=ids.view(shape),
        recorded_BS=torch.ones(shape[:2], dtype=torch.bool),
        weights_BSLK=weights.view(shape),
    )


def other_ids(record: RoutingRecord, experts: int) -> RoutingRecord:
    """Every token with other experts, in any order."""
    keys = torch.rand((*record.expert_ids_BSLK.shape[:3], experts), generator=torch.Generator().manual_seed(3))
    ids_BSLK = keys.argsort(dim=-1)[..., : record.expert_ids_BSLK.shape[-1]]
    return dataclasses.replace(record, expert_ids_BSLK=ids_BSLK, weights_BSLK=None)


def experts_of(model: nn.Module) -> int:
    return model_routers(model)[0].num_experts
