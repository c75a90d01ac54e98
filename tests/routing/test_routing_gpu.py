"""On a GPU: kernel, cuda reference and eager PyTorch give one result, bit for bit."""

import dataclasses

import pytest
import torch
from router_rows import SPECS, bias_rows, bits, logit_rows, operands
from torch import Tensor

from routing import Assignment, RouterSpec, SumOrder, kernel_route_from_scores, reference, reference_from_scores, route
from routing.reference import scores

pytestmark = pytest.mark.gpu

HALVING = [name for name, spec in SPECS.items() if spec.sum_order is SumOrder.HALVING]
"""Those whose sums are in the order of the PyTorch that runs."""


def eager(spec: RouterSpec) -> RouterSpec:
    """The spec whose reference calls PyTorch's own operations, which on CUDA tensors are CUDA's."""
    return dataclasses.replace(spec, platform="cpu")


def assert_same(found: Assignment, expected: Assignment) -> None:
    assert (found.expert_ids_TK != expected.expert_ids_TK).any(dim=1).nonzero().flatten().tolist() == []
    assert (bits(found.weights_TK) != bits(expected.weights_TK)).any(dim=1).nonzero().flatten().tolist() == []
    assert found.weights_TK.dtype == expected.weights_TK.dtype


def on(device: torch.device, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


@pytest.mark.parametrize("name", HALVING)
def test_every_row_family_routes_as_in_eager_pytorch(name: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    logits_TE = torch.cat(list(logit_rows(spec).values())).to(cuda)
    given = on(cuda, operands(spec))
    expected = reference(logits_TE, eager(spec), **given)
    assert_same(reference(logits_TE, spec, **given), expected)
    assert_same(route(logits_TE, spec, **given), expected)


@pytest.mark.parametrize("T", [1, 2, 7, 33, 257, 4096])
@pytest.mark.parametrize("name", HALVING)
def test_random_rows_route_as_in_eager_pytorch(name: str, T: int, cuda: torch.device) -> None:
    spec = SPECS[name]
    random = torch.Generator(device=cuda).manual_seed(T)
    normal = torch.randn(T, spec.num_experts, generator=random, device=cuda, dtype=torch.float64)
    logits_TE = (normal * 1.5).to(spec.gate.output_dtype)
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
@pytest.mark.parametrize("name", [name for name in HALVING if SPECS[name].has_bias])
def test_every_bias_and_score_from_given_scores(name: str, bias: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    rows = torch.cat(list(logit_rows(spec).values())).to(cuda)
    given = on(cuda, operands(spec, bias))
    for scores_TE in (scores(rows, spec), rows.to(spec.chain_dtype)):
        expected = reference_from_scores(scores_TE, eager(spec), **given)
        assert_same(kernel_route_from_scores(scores_TE, spec, **given), expected)


@pytest.mark.parametrize("name", [name for name in SPECS if name not in HALVING])
def test_another_order_of_summation_is_the_references(name: str, cuda: torch.device) -> None:
    """Of another release of PyTorch, so that there is nothing here to compare the reference with."""
    spec = SPECS[name]
    given = on(cuda, operands(spec))
    rows = torch.cat(list(logit_rows(spec).values())).to(cuda)
    random = torch.Generator(device=cuda).manual_seed(0)
    normal = torch.randn(4096, spec.num_experts, generator=random, device=cuda, dtype=torch.float64)
    for logits_TE in (rows, normal.to(spec.gate.output_dtype)):
        expected = reference(logits_TE, spec, **given)
        assert_same(route(logits_TE, spec, **given), expected)
    if spec.chain_dtype == torch.float64:
        return  # a sum of fp32 scores is exact there, in any order
    halving = dataclasses.replace(spec, sum_order=SumOrder.HALVING)
    assert (bits(reference(logits_TE, halving, **given).weights_TK) != bits(expected.weights_TK)).any()


@pytest.mark.parametrize("name", ["glm4", "qwen3", "megatron, fp64", "twenty-two slots of 96"])
def test_padding_and_counts_are_the_references(name: str, cuda: torch.device) -> None:
    spec = SPECS[name]
    logits_TE = torch.cat(list(logit_rows(spec).values())).to(cuda)
    for T in (0, 1, len(logits_TE) // 2, len(logits_TE)):
        results = []
        for path in (route, reference):
            counts_E = torch.zeros(spec.num_experts, dtype=torch.int32, device=cuda)
            tokens = torch.tensor(T, dtype=torch.int32, device=cuda)
            found = path(logits_TE, spec, **on(cuda, operands(spec)), num_tokens=tokens, counts_E=counts_E)
            results.append((found, counts_E))
        assert_same(results[0][0], results[1][0])
        assert results[0][1].tolist() == results[1][1].tolist()
        assert int(results[0][1].sum()) == T * spec.top_k


def test_a_function_and_the_fused_form_agree_on_the_gpu(cuda: torch.device) -> None:
    spec = SPECS["glm4"]
    logits_TE = torch.cat(list(logit_rows(spec).values())).to(cuda)
    given = on(cuda, operands(spec))
    called = route(logits_TE, spec, **given, topk_reduce_func=lambda s: s.sum(dim=-1, keepdim=True) + 1e-20)
    assert_same(called, route(logits_TE, spec, **given))
