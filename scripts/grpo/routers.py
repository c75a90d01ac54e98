"""Listens to the routers of a transformers model: which experts they choose, and how close the choice was.

T rows of a forward pass, K experts of a token, E experts, G groups of e experts.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from grpo.agreement import RouterDecisions

NEAR_TIE = 1e-5
"""A loser that comes this close to a winner, in the value that selects, may win under another order of summation."""


@contextmanager
def recorded_routing(model: nn.Module) -> Iterator[RouterDecisions]:
    """Records what every router of a transformers model decides inside the block.

    Raises:
        ValueError: the model has no router that this file knows.
    """
    record = RouterDecisions()

    def observe(router: nn.Module, _inputs: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        logits_TE, _weights_TK, expert_ids_TK = output
        record.expert_ids.append(expert_ids_TK)
        record.near_ties.append(near_ties(router, logits_TE.detach()))

    routers = [module for module in model.modules() if isinstance(module, (Qwen3MoeTopKRouter, Glm4MoeTopkRouter))]
    if not routers:
        raise ValueError(f"{type(model).__name__} has no Qwen3MoeTopKRouter and no Glm4MoeTopkRouter to record")
    handles = [router.register_forward_hook(observe) for router in routers]
    try:
        yield record
    finally:
        for handle in handles:
            handle.remove()


def near_ties(router: nn.Module, logits_TE: Tensor) -> Tensor:
    """bool [T]: the last expert chosen is within NEAR_TIE of the first one left out; the same for groups of experts."""
    if isinstance(router, Qwen3MoeTopKRouter):
        return gap(logits_TE.softmax(dim=-1, dtype=torch.float32), router.top_k) < NEAR_TIE
    assert isinstance(router, Glm4MoeTopkRouter)
    values_TE = logits_TE.sigmoid() + router.e_score_correction_bias
    values_TGe = values_TE.view(len(values_TE), router.num_group, -1)
    group_values_TG = values_TGe.topk(2, dim=-1).values.sum(dim=-1)
    kept_TG = torch.zeros_like(group_values_TG, dtype=torch.bool)
    kept_TG.scatter_(1, group_values_TG.topk(router.topk_group, dim=-1).indices, True)
    eligible_TE = values_TGe.masked_fill(~kept_TG.unsqueeze(-1), -math.inf).flatten(1)
    return (gap(eligible_TE, router.top_k) < NEAR_TIE) | (gap(group_values_TG, router.topk_group) < NEAR_TIE)


def gap(values_TE: Tensor, kept: int) -> Tensor:
    """[T]: the kept-th largest value less the next one; inf where nothing is left out."""
    if kept == values_TE.shape[-1]:
        return torch.full(values_TE.shape[:-1], math.inf)
    top = values_TE.topk(kept + 1, dim=-1).values
    return top[..., kept - 1] - top[..., kept]
