"""The definition of routing: near fp64, and at its edges what it says it is."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from router_rows import FP64_CHAIN, SPECS, bits, has_distinct_ids, logit_rows, make_spec, operands, sigmoid_spec

from routing import (
    GroupSpec,
    ReduceKind,
    ScoreFunction,
    SlotOrder,
    TopkReduce,
    reference,
    reference_chosen,
    reference_from_scores,
)
from routing.arithmetic import CudaArithmetic
from routing.cuda_order import halving_sum


@pytest.mark.parametrize("name", SPECS)
def test_weights_are_near_fp64(name: str) -> None:
    """The bound: a handful of roundings of the chain dtype (no finer than scores) and one of the weight dtype."""
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
    coarsest = max(torch.finfo(dtype).eps for dtype in (spec.chain_dtype, torch.float32))
    tolerance = 8 * coarsest + torch.finfo(spec.weight_dtype).eps
    torch.testing.assert_close(found.weights_TK.double(), w, rtol=tolerance, atol=0)


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


def test_an_fp64_chain_holds_fp32_scores_and_does_all_else_in_fp64() -> None:
    spec = sigmoid_spec(top_k=8, slot_order=SlotOrder.SORTED, **FP64_CHAIN)
    logits_TE = torch.randn(40, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bias_E = torch.linspace(-0.1, 0.1, 16)
    found = reference(logits_TE, spec, bias_E=bias_E)
    scores_TE = CudaArithmetic().sigmoid(logits_TE.float()).double()
    ids_TK = CudaArithmetic().topk(scores_TE + bias_E, 8, is_sorted=True)
    chosen_TK = scores_TE.gather(1, ids_TK)
    expected = chosen_TK / (halving_sum(chosen_TK) + 1e-20) * 2.5
    assert found.expert_ids_TK.tolist() == ids_TK.tolist()
    assert bits(found.weights_TK).tolist() == bits(expected).tolist()
    in_fp32 = reference(logits_TE.float(), sigmoid_spec(top_k=8, slot_order=SlotOrder.SORTED), bias_E=bias_E)
    assert (found.weights_TK.float() != in_fp32.weights_TK).any()


def test_fp64_logits_choose_by_all_their_bits_and_weigh_in_fp32() -> None:
    spec = make_spec(num_experts=4, top_k=2, score=ScoreFunction.SOFTMAX_TOPK, reduce=_none(), **FP64_CHAIN)
    logits_TE = torch.tensor([[1.0, 1.0 + 2**-50, 1.0 + 2**-51, 0.0]], dtype=torch.float64)
    found = reference(logits_TE, spec)
    assert found.expert_ids_TK.tolist() == [[1, 2]]
    assert found.weights_TK.tolist() == [[0.5, 0.5]]
    assert found.weights_TK.dtype == torch.float64


def test_a_masked_score_is_a_weight_of_nothing() -> None:
    """Where the kept groups hold nothing above 0, experts of the others are chosen: for their score, or for 0."""
    groups = GroupSpec(count=2, kept=1, top=1, mask_value=0.0)
    spec = make_spec(num_experts=4, top_k=2, groups=groups, slot_order=SlotOrder.UNSORTED, reduce=_none())
    scores_TE = torch.tensor([[0.25, 0.0, 0.75, -0.5]])
    assert reference_from_scores(scores_TE, spec).expert_ids_TK.tolist() == [[2, 0]]
    assert reference_from_scores(scores_TE, spec).weights_TK.tolist() == [[0.75, 0.25]]
    masking = dataclasses.replace(spec, groups=dataclasses.replace(groups, masks_scores=True))
    assert reference_from_scores(scores_TE, masking).expert_ids_TK.tolist() == [[2, 0]]
    assert reference_from_scores(scores_TE, masking).weights_TK.tolist() == [[0.75, 0.0]]


def test_padding_is_routed_nowhere_and_not_counted() -> None:
    spec = sigmoid_spec(expert_scale=True)
    logits_TE = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    logits_TE[4:] = math.nan
    given = operands(spec)
    whole = reference(logits_TE[:4], spec, **given)
    counts_E = torch.full((16,), 100, dtype=torch.int32)
    found = reference(logits_TE, spec, **given, num_tokens=torch.tensor(4, dtype=torch.int32), counts_E=counts_E)
    assert found.expert_ids_TK.tolist() == whole.expert_ids_TK.tolist() + [[-1] * 4] * 2
    assert bits(found.weights_TK[:4]).tolist() == bits(whole.weights_TK).tolist()
    assert bits(found.weights_TK[4:]).tolist() == [[0] * 4] * 2
    assert (counts_E - 100).tolist() == whole.expert_ids_TK.flatten().bincount(minlength=16).tolist()
    chosen = reference_chosen(logits_TE, spec, **given, num_tokens=torch.tensor(4, dtype=torch.int32))
    assert chosen.expert_ids_TK.tolist() == found.expert_ids_TK.tolist()
    assert chosen.scores_TK[4:].tolist() == [[0.0] * 4] * 2


def test_a_count_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_tokens of shape \(1,\) in torch\.int64; an int32 scalar.*counts_E in"):
        reference(torch.zeros(2, 16), make_spec(), num_tokens=torch.tensor([1]), counts_E=torch.zeros(16))


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
