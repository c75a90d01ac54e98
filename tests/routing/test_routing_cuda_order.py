"""The written-out orders of eager CUDA PyTorch, against literal trees, literal slot orders and fp64."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_rows import SPECS, bits, has_distinct_ids, logit_rows, make_spec, operands, sigmoid_spec

from routing import GroupSpec, ReduceKind, SlotOrder, TopkReduce, reference, reference_from_scores
from routing.arithmetic import CudaArithmetic
from routing.cuda_order import halving_sum, softmax, sort_slots, topk_unsorted

TREES = {
    1: "0",
    2: "0+1",
    3: "(0+2)+1",
    4: "(0+2)+(1+3)",
    5: "((0+4)+2)+(1+3)",
    6: "((0+4)+2)+((1+5)+3)",
    7: "((0+4)+(2+6))+((1+5)+3)",
    8: "((0+4)+(2+6))+((1+5)+(3+7))",
    10: "(((0+8)+4)+(2+6))+(((1+9)+5)+(3+7))",
}
TIE_ORDERS = {
    2: [1, 0],
    4: [1, 0, 2, 3],
    6: [1, 0, 4, 5, 2, 3],
    8: [7, 6, 4, 5, 1, 0, 2, 3],
    10: [7, 6, 4, 5, 1, 0, 2, 3, 8, 9],
}


def by_tree(tree: str, x: torch.Tensor) -> torch.Tensor:
    """The sum that a tree such as "(0+2)+1" spells, over columns."""
    names = {f"x{i}": x[:, i] for i in range(x.shape[1])}
    spelled = "".join(f"x{part}" if part.isdigit() else part for part in _tokens(tree))
    total: torch.Tensor = eval(spelled, names)
    return total.unsqueeze(1)


def _tokens(tree: str) -> list[str]:
    return ["".join(group) for _, group in itertools.groupby(tree, lambda c: "digit" if c.isdigit() else object())]


@pytest.mark.parametrize("K", TREES)
def test_the_sum_over_slots_is_the_halving_tree(K: int) -> None:
    x = torch.rand(500, K, generator=torch.Generator().manual_seed(K))
    assert bits(halving_sum(x)).tolist() == bits(by_tree(TREES[K], x)).tolist()


@pytest.mark.parametrize("K", [4, 6, 8, 10])
def test_other_trees_give_other_bits(K: int) -> None:
    x = torch.rand(500, K, generator=torch.Generator().manual_seed(K))
    sequential = "+".join(map(str, range(K)))
    pairs = {4: "(0+1)+(2+3)", 6: "((0+4)+(1+5))+(2+3)", 8: "((0+1)+(2+3))+((4+5)+(6+7))"}.get(K, sequential)
    for tree in (sequential, pairs):
        assert (bits(halving_sum(x)) != bits(by_tree(tree, x))).float().mean() > 0.05


@pytest.mark.parametrize("K", [33, 64])
def test_the_sum_of_more_than_a_warp_halves_as_well(K: int) -> None:
    x = torch.rand(50, K, generator=torch.Generator().manual_seed(K))
    padded = torch.cat([x, torch.zeros(50, 64 - K)], dim=1)
    assert bits(halving_sum(x)).tolist() == bits(halving_sum(padded[:, :32] + padded[:, 32:])).tolist()


def test_orders_that_are_not_established_are_never_computed() -> None:
    with pytest.raises(AssertionError, match="65"):
        halving_sum(torch.zeros(2, 65))
    with pytest.raises(AssertionError, match="33"):
        sort_slots(torch.zeros(2, 40), torch.arange(33).repeat(2, 1))


def test_a_sum_of_negative_zeros_is_positive_zero() -> None:
    assert bits(halving_sum(torch.full((1, 8), -0.0))).tolist() == [[0]]


@pytest.mark.parametrize("E", [2, 8, 32, 60, 64, 160, 512])
def test_softmax_adds_strided_lanes_and_is_near_fp64(E: int) -> None:
    x = torch.randn(20, E, generator=torch.Generator().manual_seed(E)) * 3
    exps = torch.exp(x - x.amax(dim=1, keepdim=True))
    lanes = []
    for lane in range(min(32, E)):
        total = exps[:, lane]
        for strided in range(lane + 32, E, 32):
            total = total + exps[:, strided]
        lanes.append(total)
    assert bits(softmax(x)).tolist() == bits(exps / halving_sum(torch.stack(lanes, dim=1))).tolist()
    torch.testing.assert_close(softmax(x).double(), x.double().softmax(dim=1), rtol=2e-6, atol=0)
    assert (bits(softmax(x)) != bits(exps * (1 / halving_sum(torch.stack(lanes, dim=1))))).any()


@pytest.mark.parametrize("name", SPECS)
def test_weights_are_near_fp64(name: str) -> None:
    """The bound: a handful of roundings of the chain dtype and one of the weight dtype."""
    spec = SPECS[name]
    logits_TE = logit_rows(spec)["normal"]
    found = reference(logits_TE, spec, **operands(spec))
    assert has_distinct_ids(found, spec.num_experts)
    x, ids = logits_TE.double(), found.expert_ids_TK.long()
    scores = {
        "softmax": x.softmax(dim=1),
        "sigmoid": x.sigmoid(),
        "sqrt_softplus": torch.nn.functional.softplus(x).sqrt(),
        "softmax_topk": x,
    }[str(spec.score)]
    s = scores.gather(1, ids)
    s = s.softmax(dim=1) if str(spec.score) == "softmax_topk" else s
    total, eps = s.sum(dim=1, keepdim=True), spec.reduce.eps or 0.0
    w = {
        ReduceKind.NONE: s,
        ReduceKind.SUM: s / total,
        ReduceKind.SUM_EPS: s / (total + eps),
        ReduceKind.CLAMPED_SUM: s / total.clamp(min=eps),
        ReduceKind.SOFTMAX: s.softmax(dim=1),
        ReduceKind.L1: s / total,
    }[spec.reduce.kind]
    w = w * (1.0 if spec.scale is None else spec.scale)
    if spec.expert_scale:
        w = w * operands(spec)["expert_scale_E"].double()[ids]
    tolerance = 8 * torch.finfo(spec.chain_dtype).eps + torch.finfo(spec.weight_dtype).eps
    torch.testing.assert_close(found.weights_TK.double(), w, rtol=tolerance, atol=0)


@pytest.mark.parametrize("K", TIE_ORDERS)
def test_equal_values_sort_in_the_measured_order(K: int) -> None:
    rows = torch.zeros(2, 64)
    arithmetic = CudaArithmetic()
    assert arithmetic.topk(rows, K, is_sorted=True).tolist() == [TIE_ORDERS[K]] * 2
    assert arithmetic.topk(rows, K, is_sorted=False).tolist() == [list(range(K))] * 2


def test_unsorted_slots_ascend_with_the_kth_value_last() -> None:
    row = torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.5, 0.7, 0.5]])
    assert topk_unsorted(row, 4).tolist() == [[1, 5, 3, 4]]
    assert topk_unsorted(row, 5).tolist() == [[1, 5, 3, 4, 6]]
    assert topk_unsorted(row, 6).tolist() == [[1, 3, 4, 5, 6, 0]]


def test_the_reported_tie_of_six_values_comes_out_as_reported() -> None:
    """torch.topk([3, 2, 3, 2, 1, 1], 2) gives [2, 0] on CUDA."""
    row = torch.tensor([[3.0, 2.0, 3.0, 2.0, 1.0, 1.0]])
    assert CudaArithmetic().topk(row, 2, is_sorted=True).tolist() == [[2, 0]]


def test_nan_ranks_highest_and_positive_zero_above_negative() -> None:
    row = torch.tensor([[math.inf, -0.0, math.nan, 0.0, -math.nan, -math.inf]])
    arithmetic = CudaArithmetic()
    assert set(arithmetic.topk(row, 2, is_sorted=True)[0].tolist()) == {2, 4}
    assert arithmetic.topk(row, 3, is_sorted=False).tolist() == [[2, 4, 0]]
    assert arithmetic.topk(row, 4, is_sorted=False).tolist() == [[0, 2, 4, 3]]
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0]])
    assert arithmetic.topk(zeros, 2, is_sorted=False).tolist() == [[1, 3]]
    assert arithmetic.topk(zeros, 2, is_sorted=True).tolist() == [[3, 1]]  # both zeros tie in the sort


def test_a_row_with_nan_or_infinity_routes_to_nan() -> None:
    spec = make_spec()
    for value in (math.nan, math.inf):
        found = reference(torch.zeros(1, 16).index_fill(1, torch.tensor([5]), value), spec)
        assert sorted(found.expert_ids_TK[0].tolist()) == [0, 1, 2, 3]
        assert found.weights_TK.isnan().all()


@pytest.mark.parametrize(
    ("kind", "eps", "expected"),
    [
        ("sum", None, math.nan),
        ("sum_eps", 1e-20, 0.0),
        ("clamped_sum", 1e-12, 0.0),
        ("none", None, 0.0),
        ("l1", None, math.nan),
    ],
)
def test_a_zero_denominator_gives_what_each_reduce_says(kind: str, eps: float | None, expected: float) -> None:
    spec = sigmoid_spec(has_bias=False, reduce=TopkReduce(kind=ReduceKind(kind), eps=eps))
    weights_TK = reference(torch.full((1, 16), -120.0), spec).weights_TK
    assert bits(weights_TK).tolist() == bits(torch.full((1, 4), expected)).tolist()


def test_a_clamped_sum_lets_nan_through() -> None:
    spec = make_spec(reduce=TopkReduce(kind=ReduceKind.CLAMPED_SUM, eps=1e-12))
    scores_TE = torch.full((1, 16), 0.1).index_fill(1, torch.tensor([3]), math.nan)
    assert reference_from_scores(scores_TE, spec).weights_TK.isnan().all()


def test_groups_are_ranked_by_their_best_and_only_kept_ones_are_chosen_from() -> None:
    spec = sigmoid_spec(
        num_experts=8, top_k=2, has_bias=False, groups=GroupSpec(count=4, kept=1), reduce=_none(), scale=None
    )
    scores_TE = torch.tensor([[0.9, 0.0, 0.5, 0.5, 0.2, 0.2, 0.1, 0.1]])
    assert reference_from_scores(scores_TE, spec).expert_ids_TK.tolist() == [[2, 3]]
    tied = torch.tensor([[0.1, 0.1, 0.5, 0.5, 0.5, 0.5, 0.1, 0.1]])
    assert reference_from_scores(tied, spec).expert_ids_TK.tolist() == [[2, 3]]


def _none() -> TopkReduce:
    return TopkReduce(kind=ReduceKind.NONE)


@given(seed=st.integers(0, 2**31), K=st.integers(1, 10), levels=st.sampled_from([2, 4, 1000]), is_sorted=st.booleans())
def test_laws_of_routing(seed: int, K: int, levels: int, is_sorted: bool) -> None:
    """Distinct ids in range; a row alone is that of the batch; permuting tokens commutes; scale is never gated."""
    random = torch.Generator().manual_seed(seed)
    logits_TE = torch.randint(-levels, levels, (6, 12), generator=random) * (4 / levels)
    order = SlotOrder.SORTED if is_sorted else SlotOrder.UNSORTED
    bias = {"bias_E": torch.randint(-2, 3, (12,), generator=random) / 8}
    spec = sigmoid_spec(num_experts=12, top_k=K, slot_order=order)
    batch = reference(logits_TE, spec, **bias)
    assert has_distinct_ids(batch, 12)
    shuffled = torch.randperm(6, generator=random)
    permuted = reference(logits_TE[shuffled], spec, **bias)
    assert permuted.expert_ids_TK.tolist() == batch.expert_ids_TK[shuffled].tolist()
    assert bits(permuted.weights_TK).tolist() == bits(batch.weights_TK[shuffled]).tolist()
    alone = reference(logits_TE[2:3], spec, **bias)
    assert bits(alone.weights_TK[0]).tolist() == bits(batch.weights_TK[2]).tolist()
    for reduce in (spec.reduce, _none()):
        one, scaled = (
            reference(
                logits_TE, sigmoid_spec(num_experts=12, top_k=K, slot_order=order, reduce=reduce, scale=scale), **bias
            )
            for scale in (None, 2.446)
        )
        assert bits(scaled.weights_TK).tolist() == bits(one.weights_TK * 2.446).tolist()
