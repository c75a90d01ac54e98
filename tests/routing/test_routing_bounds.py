"""The bounds of the kernel decide nearly every ordinary row, and never one that they cannot."""

import dataclasses
import math
from collections.abc import Iterator

import pytest
import torch
from certainty_kernel import certain_rows
from hypothesis import given, settings
from hypothesis import strategies as st
from near_ties import near_ties, number_at, place_of
from router_rows import BF16, bias_rows, bits, has_distinct_ids, make_spec, operands, sigmoid_spec
from score_kernel import score_bounds
from torch import Tensor

from routing import (
    Assignment,
    GateSpec,
    GroupScore,
    GroupSpec,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    kernel_route,
    kernel_route_from_scores,
    reference,
    reference_from_scores,
)
from routing.kernel import INTERPRETED, launch_shape
from routing.kernel_bound import BIAS_SLACK

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


@settings(max_examples=20)
@given(name=st.sampled_from(sorted(BOUNDED)), seed=st.integers(0, 1000), T=st.integers(2, 33))
def test_permuting_tokens_permutes_their_experts_which_are_distinct_and_exist(name: str, seed: int, T: int) -> None:
    spec = BOUNDED[name]
    rows = random_rows(spec, T, seed=seed)
    shuffled = torch.randperm(T, generator=torch.Generator().manual_seed(seed))
    found, permuted = (kernel_route(x, spec, **operands(spec)) for x in (rows, rows[shuffled]))
    assert has_distinct_ids(found, spec.num_experts)
    assert torch.equal(permuted.expert_ids_TK, found.expert_ids_TK[shuffled])
    assert torch.equal(bits(permuted.weights_TK), bits(found.weights_TK[shuffled]))


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


EDGES = {
    "K = 1 of 8": make_spec(num_experts=8, top_k=1, score=ScoreFunction.SOFTMAX_TOPK),
    "all but one of 9": make_spec(num_experts=9, top_k=8, score=ScoreFunction.SQRT_SOFTPLUS),
    "two of 16, biased": make_spec(num_experts=16, top_k=2, has_bias=True),
    "softmax of 33": make_spec(num_experts=33, top_k=5, slot_order=SlotOrder.UNSORTED),
    "sqrt_softplus of 60": make_spec(num_experts=60, top_k=6, score=ScoreFunction.SQRT_SOFTPLUS),
    "sigmoid of 160, biased": sigmoid_spec(num_experts=160, top_k=8),
    "softmax of 512": make_spec(num_experts=512, top_k=10),
    "twenty-two of 300": sigmoid_spec(num_experts=300, top_k=22, slot_order=SlotOrder.SORTED, has_bias=False),
    "a whole group of 64": sigmoid_spec(num_experts=64, top_k=32, groups=GroupSpec(count=2, kept=1)),
    "groups of 32": sigmoid_spec(num_experts=256, top_k=8, groups=GroupSpec(count=8, kept=4)),
    "groups of 96": sigmoid_spec(num_experts=192, top_k=6, groups=GroupSpec(count=2, kept=1, mask_value=0.0)),
    "groups of the best one": make_spec(
        num_experts=128, top_k=6, groups=GroupSpec(count=4, kept=2, top=1, score=GroupScore.MAX, mask_value=0.0)
    ),
}
LARGEST = torch.finfo(torch.float32).max
FORMS = {
    "fp32 words": (False, False),
    "fp32 words and a spare": (False, True),
    "integer words": (True, False),
    "integer words and a spare": (True, True),
}
"""(ORDERED, HAS_SPARE)"""


@pytest.fixture(params=FORMS)
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches take one of the forms of the bounds, whatever the number of tokens."""
    is_ordered, has_spare = FORMS[request.param]

    def shape(T: int, spec: RouterSpec, *, dtype: torch.dtype) -> dict[str, object]:
        usual = launch_shape(T, spec, dtype=dtype)
        fills_with_zeros = spec.groups is not None and spec.groups.mask_value == 0.0
        rows = {"BLOCK_T": 128, "EXACT_T": 128} if INTERPRETED else {}
        return {**usual, **rows, "ORDERED": is_ordered, "HAS_SPARE": has_spare and not fills_with_zeros}

    monkeypatch.setattr("routing.kernel.launch_shape", shape)


def assert_same(found: Assignment, expected: Assignment) -> None:
    assert found.expert_ids_TK.tolist() == expected.expert_ids_TK.tolist()
    assert bits(found.weights_TK).tolist() == bits(expected.weights_TK).tolist()


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("name", EDGES)
def test_rows_on_an_edge_are_the_references_or_in_doubt(name: str) -> None:
    spec = EDGES[name]
    rows = near_ties(spec, 128, bias_E=operands(spec).get("bias_E"), of_logits=False, seed=len(name))
    assert_same(
        kernel_route_from_scores(rows, spec, **operands(spec)), reference_from_scores(rows, spec, **operands(spec))
    )


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("form", ["fp32 words", "integer words and a spare"], indirect=True)
@pytest.mark.parametrize("name", EDGES)
def test_from_logits_on_an_edge_bounds_and_the_definition_agree(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = EDGES[name]
    bias = "zero" if spec.score is ScoreFunction.SOFTMAX else "small"  # a softmax has its scores up to a factor only
    given = {"bias_E": bias_rows(spec.num_experts)[bias]} if spec.has_bias else {}
    rows = near_ties(spec, 128, bias_E=given.get("bias_E"), of_logits=True, seed=len(name))
    certain = certain_rows(rows, spec, bias_E=given.get("bias_E"))
    assert certain.any()
    assert not certain.all()
    found = kernel_route(rows, spec, **given)
    monkeypatch.setattr("routing.kernel.is_bounded", lambda _spec: False)
    assert_same(found, kernel_route(rows, spec, **given))


@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("masked", [-LARGEST, -1e30])
def test_where_few_values_are_not_at_the_far_end_no_expert_is_made_up(masked: float) -> None:
    """Numbers that lie below the filling of a tile: the experts that fill it do not exist, those of a masked group may
    not be chosen, and a spare does exist."""
    padded, whole = (make_spec(num_experts=E, score=ScoreFunction.SIGMOID) for E in (60, 64))
    for spec in (padded, whole):
        rows = torch.full((8, spec.num_experts), masked)
        for row in range(1, 8):
            rows[row, [5, 59, 30, 7, 31, 2][:row]] = torch.arange(6.0)[:row]
        assert_same(kernel_route_from_scores(rows, spec), reference_from_scores(rows, spec))
    grouped = sigmoid_spec(num_experts=64, top_k=8, groups=GroupSpec(count=2, kept=1))
    few = torch.where(torch.arange(64) % 32 < 6, torch.where(torch.arange(64) < 32, 1.0, 0.1), masked)
    few[40:] = -0.5
    rows = torch.rand(8, 64, generator=torch.Generator().manual_seed(0))
    assert_same(kernel_route_from_scores(rows, grouped, bias_E=few), reference_from_scores(rows, grouped, bias_E=few))


@pytest.mark.usefixtures("form")
def test_the_best_of_a_group_may_add_up_to_infinity() -> None:
    for kept in (1, 2):
        spec = sigmoid_spec(num_experts=128, groups=GroupSpec(count=4, kept=kept), has_bias=False)
        rows = torch.rand(12, 4, 32, generator=torch.Generator().manual_seed(kept))
        for row, (huge, large) in enumerate((a, b) for a in range(4) for b in range(4) if a != b):
            rows[row, huge, [8, 9]] = 3e38
            rows[row, large] = torch.linspace(1e38, 1.5e38, 32)
        rows = rows.view(12, 128)
        assert_same(kernel_route_from_scores(rows, spec), reference_from_scores(rows, spec))


@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
def test_scores_rise_with_logits_and_approximations_are_near_as_the_bounds_assume(score: str) -> None:
    largest = 0.0 if score == "softmax" else LARGEST
    turns = [(-104.0, -87.0), (-1e-44, 0.0), *([] if score == "softmax" else [(19.99, 20.01)])]
    for first, last, step in [(-LARGEST, largest, 4099), *((*ends, 5) for ends in turns)]:
        assert_bounded(ascending(first, last, step, torch.device("cpu")), score)


@pytest.mark.gpu
@pytest.mark.parametrize("score", ["sigmoid", "softmax", "sqrt_softplus"])
def test_on_a_gpu_they_are_so_over_every_logit(score: str, cuda: torch.device) -> None:
    assert_bounded(ascending(-LARGEST, 0.0 if score == "softmax" else LARGEST, 1, cuda), score)


def assert_bounded(parts: Iterator[Tensor], score: str) -> None:
    """Of ascending logits: no score is above the bound that a larger logit gives, or far from the approximate one."""
    highest = torch.zeros(())
    for x in parts:
        approximate, exact, raised = score_bounds(x, score)
        so_far = torch.maximum(exact.cummax(dim=0).values, highest.to(x.device))
        assert not (so_far > raised).any()
        assert not ((approximate - exact).abs() > BIAS_SLACK.value / 8 * (1 + exact.abs())).any()
        highest = so_far[-1]


def ascending(first: float, last: float, step: int, device: torch.device) -> Iterator[Tensor]:
    """Every step-th fp32 number from the first to the last, in parts."""
    start, end = (int(place_of(torch.tensor(x))) for x in (first, last))
    for part in range(start, end + 1, step << 24):
        yield number_at(torch.arange(part, min(part + (step << 24), end + 1), step, device=device))


@pytest.mark.gpu
@pytest.mark.parametrize("T", [256, 4096])
@pytest.mark.parametrize("name", EDGES)
def test_on_a_gpu_rows_on_an_edge_are_eager_pytorchs(name: str, T: int, cuda: torch.device) -> None:
    """Few rows and many: the forms in which the kernel is launched."""
    spec = EDGES[name]
    eager = dataclasses.replace(spec, platform="cpu")
    given = {key: tensor.to(cuda) for key, tensor in operands(spec).items()}
    for of_logits, found_by, judged_by in (
        (False, kernel_route_from_scores, reference_from_scores),
        (True, kernel_route, reference),
    ):
        rows = near_ties(spec, T, bias_E=operands(spec).get("bias_E"), of_logits=of_logits, seed=T).to(cuda)
        assert_same(found_by(rows, spec, **given), judged_by(rows, eager, **given))
