"""Are ids and weights those of Megatron-Core's own routing function, from a released package? T tokens, E experts."""

import importlib
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from routing import Platform, RouterSpec, ScoreFunction, route
from routing_bench.models import Model
from routing_bench.rows import bulk, families
from routing_bench.tally import Count, Tally, poisoned_memory

SETTINGS: Mapping[str, torch.dtype] = {
    "megatron": torch.bfloat16,
    "megatron_router_fp32": torch.float32,
    "megatron_router_fp64": torch.float64,
}
"""Our names of the released package's settings -> the dtype of its logits. A bf16 model throughout."""
NAMES = (
    "Qwen3-30B-A3B",
    "Qwen1.5",
    "Mixtral",
    "gpt-oss-20b",
    "DeepSeek-V3",
    "GLM-4.5,",
    "Moonlight",
    "MiniMax-M2",
)
"""Of the models that are tried."""
Routing = Callable[..., tuple[Tensor, Tensor]]


def routing_function(folder: Path) -> tuple[Routing, str]:
    """The function of the package in that folder, and the package's version. ImportError where there is none."""
    sys.path.insert(0, str(folder))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the many optional packages that it can do without
        function: Routing = importlib.import_module(
            "megatron.core.transformer.moe.moe_utils"
        ).topk_routing_with_score_function
        version: str = importlib.import_module("megatron.core").__version__
    return function, version


def known(models: Iterable[Model]) -> tuple[Model, ...]:
    """Those with a router of each kind that the function has."""
    return tuple(model for model in models if model.name.startswith(NAMES))


def spec_of(model: Model, setting: str, platform: Platform) -> RouterSpec:
    """What that setting computes for the model."""
    return RouterSpec.from_trainer(setting, model.config, dtype=torch.bfloat16, platform=platform, gate="trainer")


def compared(function: Routing, spec: RouterSpec, device: torch.device, *, batches: int, tokens: int) -> Count:
    """The families and random rows, under biases of several sizes.

    The function scatters its slots over the experts: they are taken from its torch.topk, and the weights from where
    they went.
    """
    tally, arguments = Tally(device), arguments_of(spec)
    special_TE = families(spec).to(device)
    for batch in bulk(spec, device, batches=batches, tokens=tokens, seed=4):
        logits_TE = torch.cat([special_TE, batch.logits_TE])
        with LastTopk() as last, torch.no_grad():
            weights_TE, map_TE = function(logits_TE, spec.top_k, **arguments, expert_bias=batch.bias_E)
        with poisoned_memory():
            found = route(logits_TE, spec, **batch.operands)
        ids_TK = last.ids_TK
        assert map_TE.sum(dim=1).eq(spec.top_k).all()
        assert map_TE.gather(1, ids_TK).all()
        tally.add(found, ids_TK, weights_TE.gather(1, ids_TK))
    return tally.count()


def arguments_of(spec: RouterSpec) -> dict[str, Any]:
    """The function's, as Megatron's flags set them for such a router."""
    return {
        "use_pre_softmax": spec.score is not ScoreFunction.SOFTMAX_TOPK,
        "score_function": "sigmoid" if spec.score is ScoreFunction.SIGMOID else "softmax",
        "num_groups": None if spec.groups is None else spec.groups.count,
        "group_topk": None if spec.groups is None else spec.groups.kept,
        "scaling_factor": spec.scale,
    }


class LastTopk(TorchFunctionMode):
    """Keeps what the last torch.topk chose."""

    ids_TK: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.ids_TK = result.indices
        return result
