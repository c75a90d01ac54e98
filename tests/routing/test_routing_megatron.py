"""The Megatron presets are the released package's own routing function, bit for bit."""

import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from router_rows import bias_rows, bits, logit_rows
from torch import Tensor
from torch.overrides import TorchFunctionMode

from routing import RouterSpec, reference, route

Routing = Callable[..., tuple[Tensor, Tensor]]
RELEASED = ("megatron", "megatron_router_fp32", "megatron_router_fp64")
DTYPES = {"megatron_router_fp32": (torch.float32,), "megatron_router_fp64": (torch.float64,)}
DEEPSEEK = {"model_type": "deepseek_v3", "n_routed_experts": 64, "num_experts_per_tok": 8}
SIGMOID = {"score_function": "sigmoid", "use_pre_softmax": True}


@dataclass(frozen=True)
class Family:
    """A checkpoint's config, and the flags that the converters make of it."""

    config: dict[str, Any]
    flags: dict[str, Any]


FAMILIES = {
    "qwen2_moe": Family(
        {"model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4}, {"use_pre_softmax": True}
    ),
    "mixtral": Family(
        {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2}, {"use_pre_softmax": True}
    ),
    "qwen3_moe": Family(
        {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}, {}
    ),
    "gpt_oss": Family({"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4}, {}),
    "deepseek_v3": Family(
        {**DEEPSEEK, "n_group": 8, "topk_group": 4},
        {**SIGMOID, "num_groups": 8, "group_topk": 4, "scaling_factor": 2.5},
    ),
    "deepseek_v3, groups of the best four": Family(
        {**DEEPSEEK, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.0},
        {**SIGMOID, "num_groups": 4, "group_topk": 2, "scaling_factor": 1.0},
    ),
    "kimi_k2": Family(
        {**DEEPSEEK, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.827},
        {**SIGMOID, "num_groups": 1, "group_topk": 1, "scaling_factor": 2.827},
    ),
    "glm4_moe": Family(
        {"model_type": "glm4_moe", "n_routed_experts": 160, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5},
        {**SIGMOID, "scaling_factor": 2.5},
    ),
    "glm4_moe, one slot": Family(
        {"model_type": "glm4_moe", "n_routed_experts": 32, "num_experts_per_tok": 1, "routed_scaling_factor": 2.5},
        {**SIGMOID, "scaling_factor": 2.5},
    ),
    "minimax_m2": Family({"model_type": "minimax_m2", "num_local_experts": 48, "num_experts_per_tok": 6}, SIGMOID),
}


@pytest.fixture(scope="module")
def released() -> Routing:
    """The function of the installed package, which warns of much while it is imported."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    function: Routing = module.topk_routing_with_score_function
    return function


class LastTopk(TorchFunctionMode):
    """Keeps what the last torch.topk returned: the slots, which the function scatters away."""

    ids_TK: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.topk, Tensor.topk):
            self.ids_TK = result.indices
        return result


def preset(trainer: str, family: Family, dtype: torch.dtype, platform: Any) -> RouterSpec:
    spec = RouterSpec.from_trainer(trainer, family.config, dtype=dtype, platform=platform, gate="trainer")
    assert spec.gate.output_dtype == dtype
    return spec


def assert_routes_as_released(
    released: Routing, spec: RouterSpec, flags: dict[str, Any], logits_TE: Tensor, bias_E: Tensor | None
) -> None:
    with LastTopk() as last, torch.no_grad():
        probs_TE, map_TE = released(logits_TE, spec.top_k, **flags, expert_bias=bias_E)
    for path in (reference, route):
        found = path(logits_TE, spec, **({} if bias_E is None else {"bias_E": bias_E}))
        assert found.weights_TK.dtype == probs_TE.dtype
        ids_TK = found.expert_ids_TK.long()
        assert (ids_TK != last.ids_TK).any(dim=1).nonzero().flatten().tolist() == []
        ours_TE = torch.zeros_like(probs_TE).scatter(1, ids_TK, found.weights_TK)
        assert (bits(ours_TE) != bits(probs_TE)).any(dim=1).nonzero().flatten().tolist() == []
        assert torch.zeros_like(map_TE).scatter(1, ids_TK, True).equal(map_TE)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("trainer", RELEASED)
def test_every_family_routes_as_the_released_package(trainer: str, name: str, released: Routing) -> None:
    family = FAMILIES[name]
    for dtype in DTYPES.get(trainer, (torch.float32, torch.bfloat16)):
        spec = preset(trainer, family, dtype, "cpu")
        rows_TE = torch.cat(list(logit_rows(spec).values()))
        for bias_E in bias_rows(spec.num_experts).values() if spec.has_bias else [None]:
            assert_routes_as_released(released, spec, family.flags, rows_TE, bias_E)


@pytest.mark.gpu
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("trainer", RELEASED)
def test_on_a_gpu_as_well(trainer: str, name: str, released: Routing, cuda: torch.device) -> None:
    family = FAMILIES[name]
    for dtype in DTYPES.get(trainer, (torch.float32, torch.bfloat16)):
        spec = preset(trainer, family, dtype, "cuda")
        random = torch.Generator(device=cuda).manual_seed(0)
        normal_TE = torch.randn(4096, spec.num_experts, generator=random, device=cuda, dtype=torch.float64) * 1.5
        normal_TE, families_TE = normal_TE.to(dtype), torch.cat(list(logit_rows(spec).values())).to(cuda)
        for bias_E in bias_rows(spec.num_experts).values() if spec.has_bias else [None]:
            held_E = None if bias_E is None else bias_E.to(cuda)
            for logits_TE in (normal_TE[:1], normal_TE[:7], normal_TE, families_TE):
                assert_routes_as_released(released, spec, family.flags, logits_TE, held_E)
