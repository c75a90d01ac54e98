"""On a GPU: kernel, cuda reference and eager PyTorch give one result, bit for bit."""

import dataclasses

import pytest
import torch
from router_rows import SPECS, bias_rows, bits, logit_rows, operands
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from routing import Assignment, RouterSpec, kernel_route_from_scores, reference, reference_from_scores, route
from routing.reference import scores

pytestmark = pytest.mark.gpu


def eager(spec: RouterSpec) -> RouterSpec:
    """The spec whose reference calls PyTorch's own operations, which on CUDA tensors are CUDA's."""
    return dataclasses.replace(spec, platform="cpu")


def assert_same(found: Assignment, expected: Assignment) -> None:
    assert (found.expert_ids_TK != expected.expert_ids_TK).any(dim=1).nonzero().flatten().tolist() == []
    assert (bits(found.weights_TK) != bits(expected.weights_TK)).any(dim=1).nonzero().flatten().tolist() == []
    assert found.weights_TK.dtype == expected.weights_TK.dtype


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", SPECS)
def test_every_row_family_routes_as_in_eager_pytorch(name: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    logits_TE = torch.cat(list(logit_rows(spec).values())).to(cuda)
    given = on(cuda, operands(spec))
    expected = reference(logits_TE, eager(spec), **given)
    assert_same(reference(logits_TE, spec, **given), expected)
    assert_same(route(logits_TE, spec, **given), expected)


@pytest.mark.parametrize("T", [1, 2, 7, 33, 257, 4096])
@pytest.mark.parametrize("name", SPECS)
def test_random_rows_route_as_in_eager_pytorch(name: str, T: int, cuda: torch.device) -> None:
    spec = SPECS[name]
    random = torch.Generator(device=cuda).manual_seed(T)
    logits_TE = (torch.randn(T, spec.num_experts, generator=random, device=cuda) * 1.5).to(spec.gate.output_dtype)
    given = on(cuda, operands(spec))
    assert_same(route(logits_TE, spec, **given), reference(logits_TE, eager(spec), **given))


@pytest.mark.parametrize("name", ["qwen3 with a bf16 gate", "deepseek_v3"])
def test_rows_at_a_stride_route_as_in_eager_pytorch(name: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    random = torch.Generator(device=cuda).manual_seed(0)
    wide = torch.randn(257, spec.num_experts + 3, generator=random, device=cuda).to(spec.gate.output_dtype)
    given = on(cuda, operands(spec))
    for logits_TE in (wide[:, 3:], wide[::2, :-3], wide[:, 3:].t().contiguous().t()):
        assert_same(route(logits_TE, spec, **given), reference(logits_TE.contiguous(), eager(spec), **given))


@pytest.mark.parametrize("bias", bias_rows(8))
@pytest.mark.parametrize("name", [name for name, spec in SPECS.items() if spec.has_bias])
def test_every_bias_and_score_from_given_scores(name: str, bias: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    rows = torch.cat(list(logit_rows(spec).values())).to(cuda)
    given = on(cuda, operands(spec, bias))
    for scores_TE in (scores(rows, spec), rows.to(spec.chain_dtype)):
        expected = reference_from_scores(scores_TE, eager(spec), **given)
        assert_same(kernel_route_from_scores(scores_TE, spec, **given), expected)


@pytest.mark.parametrize("gate", ["fp32", "trainer"])
def test_transformers_own_routers_give_the_same_bits(gate: str, cuda: torch.device) -> None:
    random = torch.Generator(device=cuda).manual_seed(0)
    qwen3 = Qwen3MoeConfig(num_experts=128, num_experts_per_tok=8, hidden_size=256, norm_topk_prob=True)
    glm4 = Glm4MoeConfig(n_routed_experts=160, num_experts_per_tok=8, hidden_size=256, routed_scaling_factor=2.5)
    for config, kind in ((qwen3, Qwen3MoeTopKRouter), (glm4, Glm4MoeTopkRouter)):
        spec = RouterSpec.from_trainer("transformers", config, dtype=torch.bfloat16, platform="cuda", gate=gate)
        router = kind(config).to(cuda).to(spec.gate.operand_dtype).requires_grad_(False)
        router.weight.normal_(generator=random, std=0.1)
        given = {}
        if spec.has_bias:
            router.e_score_correction_bias = torch.randn(160, generator=random, device=cuda) * 0.05
            given["bias_E"] = router.e_score_correction_bias
        hidden_TD = torch.randn(2048, 256, generator=random, device=cuda).to(spec.gate.operand_dtype)
        logits_TE, weights_TK, ids_TK = router(hidden_TD)
        expected = Assignment(expert_ids_TK=ids_TK.int(), weights_TK=weights_TK)
        assert_same(route(logits_TE, spec, **given), expected)


def test_a_function_and_the_fused_form_agree_on_the_gpu(cuda: torch.device) -> None:
    spec = SPECS["glm4"]
    logits_TE = torch.cat(list(logit_rows(spec).values())).to(cuda)
    given = on(cuda, operands(spec))
    called = route(logits_TE, spec, **given, topk_reduce_func=lambda s: s.sum(dim=-1, keepdim=True) + 1e-20)
    assert_same(called, route(logits_TE, spec, **given))
