"""The bounds of the kernel decide nearly every ordinary row, and never one that they cannot."""

import math

import pytest
import torch
from certainty_kernel import certain_rows
from router_rows import BF16, bits, make_spec, operands, sigmoid_spec
from torch import Tensor

from routing import GateSpec, GroupSpec, RouterSpec, ScoreFunction, SlotOrder, kernel_route, reference

BOUNDED = {
    "softmax": make_spec(num_experts=128, top_k=8),
    "softmax, 60 experts": make_spec(num_experts=60),
    "softmax over the chosen": make_spec(num_experts=128, score=ScoreFunction.SOFTMAX_TOPK),
    "softmax with a bias": make_spec(num_experts=64, top_k=6, has_bias=True),
    "sigmoid with a bias": sigmoid_spec(num_experts=160, top_k=8),
    "sigmoid, sorted": sigmoid_spec(num_experts=128, top_k=6, has_bias=False, slot_order=SlotOrder.SORTED),
    "sqrt_softplus": sigmoid_spec(num_experts=64, top_k=6, score=ScoreFunction.SQRT_SOFTPLUS),
    "groups": sigmoid_spec(num_experts=256, top_k=8, groups=GroupSpec(count=8, kept=4)),
    "groups of two tiles": sigmoid_spec(num_experts=256, top_k=8, groups=GroupSpec(count=4, kept=2, mask_value=0.0)),
    "512 experts": make_spec(num_experts=512, top_k=10),
}


def random_rows(spec: RouterSpec, T: int, seed: int = 0) -> Tensor:
    return torch.randn(T, spec.num_experts, generator=torch.Generator().manual_seed(seed)) * 1.5


@pytest.mark.parametrize("name", BOUNDED)
def test_nearly_every_random_row_is_decided(name: str) -> None:
    spec = BOUNDED[name]
    certain = certain_rows(random_rows(spec, 257), spec, bias_E=operands(spec).get("bias_E"))
    assert certain.float().mean() >= 0.97


@pytest.mark.parametrize("name", BOUNDED)
def test_a_row_alone_with_a_warp_to_itself_is_the_row_of_the_batch(name: str) -> None:
    spec = BOUNDED[name]
    rows = random_rows(spec, 9, seed=1)
    batch = kernel_route(rows, spec, **operands(spec))
    for index in range(9):
        alone = kernel_route(rows[index : index + 1], spec, **operands(spec))
        assert torch.equal(alone.expert_ids_TK[0], batch.expert_ids_TK[index])
        assert torch.equal(bits(alone.weights_TK[0]), bits(batch.weights_TK[index]))


@pytest.mark.parametrize("steps", [0, 1, 3, 40, 1000])
@pytest.mark.parametrize("name", ["softmax", "sigmoid with a bias", "sigmoid, sorted", "softmax over the chosen"])
def test_logits_a_few_steps_apart_around_the_boundary_are_told_apart(name: str, steps: int) -> None:
    """The K-th best and the next one `steps` representable numbers apart, with the better one on either side."""
    spec = BOUNDED[name]
    E, K = spec.num_experts, spec.top_k
    flat = torch.zeros(E) if spec.has_bias else None
    base = torch.linspace(-2, 1, E).repeat(6, 1)
    for row, (kth, rival) in enumerate([(3, 40), (40, 3), (0, E - 1), (E - 1, 0), (31, 32), (33, 32)]):
        base[row, torch.arange(E - K, E - 1)] += 1.0
        base[row, [kth, rival]] = 1.25
        near = torch.tensor(1.25)
        for _ in range(steps):
            near = torch.nextafter(near, torch.tensor(math.inf))
        base[row, kth] = near
    found = kernel_route(base, spec, bias_E=flat)
    expected = reference(base, spec, bias_E=flat)
    assert found.expert_ids_TK.tolist() == expected.expert_ids_TK.tolist()


@pytest.mark.parametrize("name", BOUNDED)
def test_ties_and_what_is_no_number_are_left_to_the_definition(name: str) -> None:
    spec = BOUNDED[name]
    rows = random_rows(spec, 3, seed=2)
    rows[0, 7] = math.nan
    rows[1] = 0.0
    best = rows[2].topk(spec.top_k + 2).indices
    if spec.groups is not None:  # ties among those that may be chosen
        best = torch.arange(spec.top_k + 2)
        rows[2, : spec.num_experts // 2] += 2
        rows[2, best] = 9 - 0.25 * best
    rows[2, best[-2:]] = rows[2, best[-3]].item()
    bias_E = torch.zeros(spec.num_experts) if spec.has_bias else None
    assert certain_rows(rows, spec, bias_E=bias_E).tolist() == [False] * 3


@pytest.mark.parametrize("name", ["softmax", "softmax over the chosen", "sigmoid, sorted"])
def test_infinite_logits_have_no_word_and_are_left_to_the_definition(name: str) -> None:
    spec = BOUNDED[name]
    rows = random_rows(spec, 2, seed=3)
    rows[0, 3], rows[1, 3] = math.inf, -math.inf
    assert certain_rows(rows, spec, bias_E=None).tolist() == [False, False]


def test_in_few_bits_one_tie_across_the_boundary_is_decided_and_two_are_not() -> None:
    spec = make_spec(num_experts=128, top_k=8, gate=GateSpec(operand_dtype=BF16, output_dtype=BF16))
    rows = random_rows(spec, 1024).to(BF16)
    best = rows.float().topk(spec.top_k + 2).values
    last, spare, next_one = best[:, -3], best[:, -2], best[:, -1]
    certain = certain_rows(rows, spec, bias_E=None)
    assert ((last == spare) & (spare > next_one)).sum() > 20
    assert ((last == spare) & (spare == next_one)).sum() > 0
    assert not certain[last == next_one].any()
    assert certain[last > next_one].float().mean() >= 0.97
