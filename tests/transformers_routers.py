"""transformers' own routers: built from the class that a row of the trainers' table names, run on given logits.

T tokens, D hidden, E experts, K slots of a token.
"""

import importlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from routing.trainer_row import Row, Setting

HIDDEN = 64
Device = torch.device | str
SMALL: dict[str, dict[str, object]] = {
    "dbrx": {"ffn_config.hidden_size": HIDDEN, "ffn_config.ffn_hidden_size": 8},
    "jamba": {"intermediate_size": 8},
    "aria_text": {"intermediate_size": 8},
    "deepseek_v4": {"mlp_layer_types": ["moe"]},
    "longcat_flash": {"zero_expert_num": 8},
}
"""What else a family's config needs for a router alone: experts of little width, layers of the kind that routes."""


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What a router makes of hidden states."""

    logits_TE: Tensor
    """As its linear layer leaves them."""
    ids_TK: Tensor
    weights_TK: Tensor
    operand_dtypes: set[torch.dtype]
    gate_has_bias: bool


class GateProbe(TorchFunctionMode):
    """Watches a router's one linear layer, and puts `logits_TE` in place of its result where some are given."""

    def __init__(self, logits_TE: Tensor | None) -> None:
        super().__init__()
        self.given_TE = logits_TE
        self.logits_TE: Tensor | None = None
        self.operand_dtypes: set[torch.dtype] = set()
        self.has_bias = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is not nn.functional.linear:
            return result
        assert self.logits_TE is None, "a router with two products"
        self.operand_dtypes = {args[0].dtype, args[1].dtype}
        self.has_bias = len(args) > 2 and args[2] is not None
        self.logits_TE = result if self.given_TE is None else self.given_TE.to(result.dtype).view_as(result)
        return self.logits_TE


def config_of(row: Row, num_experts: int, top_k: int, **values: object) -> Any:
    """The family's config with its own defaults, but for the router's size (as the gate counts) and `values`."""
    config = CONFIG_MAPPING[row.model_types[0]]()
    extra = 0 if row.extra_experts is None else 8
    size = {known_as(config, row.num_experts): num_experts - extra, known_as(config, row.top_k): top_k}
    for name, value in {"hidden_size": HIDDEN, **size, **SMALL.get(row.model_types[0], {}), **values}.items():
        *path, last = name.split(".")
        part = config
        for step in path:
            part = getattr(part, step)
        setattr(part, last, value)
    return config


def known_as(config: Any, setting: Setting) -> str:
    """Under which of its names this release of the config knows a setting."""
    return next(name for name in setting.names if hasattr(config, name.split(".")[0]))


def router_of(row: Row, config: Any, dtype: torch.dtype, device: Device = "cpu") -> nn.Module:
    """The row's class with random parameters in the model's dtype; a correction bias in what loading leaves it in."""
    module, _, name = row.source.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    if name == "JetMoeTopKGating":
        router = kind(config.hidden_size, config.num_local_experts, config.num_experts_per_tok)
    else:
        router = kind(config)
    router = router.to(device).requires_grad_(False)
    random = torch.Generator().manual_seed(HIDDEN)
    for name, tensor in named_tensors(router).items():
        values = torch.randn(tensor.shape, generator=random) * 0.1 + (1.0 if name.endswith("scale") else 0.0)
        is_kept = name == "wg.weight" or (name.endswith("e_score_correction_bias") and not row.rounds_bias)
        tensor.data = values.to(device=device, dtype=torch.float32 if is_kept else dtype)
    return router


def named_tensors(router: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers."""
    return dict([*router.named_parameters(), *router.named_buffers()])


def own_bias(router: nn.Module) -> Tensor | None:
    """The correction bias [E], for a router that holds it."""
    found = [tensor for name, tensor in named_tensors(router).items() if name.endswith("e_score_correction_bias")]
    return found[0].view(-1) if found else None


def run(
    router: nn.Module, hidden_TD: Tensor, *, passed_bias_E: Tensor | None = None, logits_TE: Tensor | None = None
) -> Routed:
    """Routes hidden states, or `logits_TE` in place of what the linear layer makes of them.

    passed_bias_E: the correction bias, for a router that is called with it.
    """
    with GateProbe(logits_TE) as probe, torch.no_grad():
        outputs = _call(router, hidden_TD, passed_bias_E)
    assert probe.logits_TE is not None
    ids_TK = next(output for output in outputs if output.dtype == torch.int64)
    weights_TK = next(output for output in outputs if output.is_floating_point() and output.shape == ids_TK.shape)
    return Routed(
        logits_TE=probe.logits_TE.flatten(0, -2),
        ids_TK=ids_TK,
        weights_TK=weights_TK,
        operand_dtypes=probe.operand_dtypes,
        gate_has_bias=probe.has_bias,
    )


def _call(router: Any, hidden_TD: Tensor, passed_bias_E: Tensor | None) -> tuple[Tensor, ...]:
    """Where routing is a method of the block, its steps as the block's forward takes them."""
    match type(router).__name__:
        case "AfmoeTokenChoiceRouter":
            return router(hidden_TD.unsqueeze(0), passed_bias_E)
        case "DbrxFFN":
            return router.route_tokens_to_experts(router.router(hidden_TD))
        case "JambaSparseMoeBlock":
            return router.route_tokens_to_experts(hidden_TD, router.router(hidden_TD))
        case "AriaExperts":  # whose gate is the block's
            weight_ED = router.fc1.weight[:, :, 0].contiguous()
            return router.route_tokens_to_experts(nn.functional.linear(hidden_TD, weight_ED))
        case "JetMoeTopKGating":
            return _unsorted(*router(hidden_TD), top_k=router.top_k)
    return router(hidden_TD) if passed_bias_E is None else router(hidden_TD, passed_bias_E)


def _unsorted(
    order: Tensor, _batch_index: Tensor, weights: Tensor, expert_sizes: list[int], _logits_TE: Tensor, *, top_k: int
) -> tuple[Tensor, Tensor]:
    """JetMoe's slots, which it returns sorted by expert, in their own order."""
    experts = torch.arange(len(expert_sizes), device=order.device)
    ids, slots = torch.empty_like(order), torch.empty_like(weights)
    ids[order] = experts.repeat_interleave(torch.tensor(expert_sizes, device=order.device))
    slots[order] = weights
    return ids.view(-1, top_k), slots.view(-1, top_k)
