"""The kernel equals the cuda reference: exactly from given scores, and within the interpreter's own exp from logits."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_rows import SPECS, bias_rows, bits, has_distinct_ids, logit_rows, make_spec, operands, sigmoid_spec, ulps
from torch import Tensor

from routing import (
    Assignment,
    GateSpec,
    GroupSpec,
    ReduceKind,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    TopkReduce,
    kernel_chosen,
    kernel_route,
    kernel_route_from_scores,
    reference,
    reference_chosen,
    reference_from_scores,
)
from routing.reference import scores

TIE_ORDERS = {
    2: [1, 0],
    4: [1, 0, 2, 3],
    6: [1, 0, 4, 5, 2, 3],
    8: [7, 6, 4, 5, 1, 0, 2, 3],
    10: [7, 6, 4, 5, 1, 0, 2, 3, 8, 9],
}
"""What torch.topk(sorted=True) makes of K equal values on an H200."""


DENORMAL = {"denormal sigmoid", "denormal softmax", "zero denominator"}
"""Rows of denormal scores, of which one ulp is many of their quotient's."""


def has_exp_after_choice(spec: RouterSpec) -> bool:
    return spec.score is ScoreFunction.SOFTMAX_TOPK or spec.reduce.kind is ReduceKind.SOFTMAX


def offenders(families: dict[str, Tensor], is_wrong_T: Tensor) -> dict[str, int]:
    """How many rows are wrong in each family that has any."""
    parts = is_wrong_T.split([len(rows) for rows in families.values()])
    return {name: int(part.sum()) for name, part in zip(families, parts, strict=True) if part.any()}


def assert_same(found: Assignment, expected: Assignment) -> None:
    assert found.expert_ids_TK.tolist() == expected.expert_ids_TK.tolist()
    assert found.weights_TK.dtype == expected.weights_TK.dtype
    assert bits(found.weights_TK).tolist() == bits(expected.weights_TK).tolist()


@pytest.mark.parametrize("tokens", ["few", "many"])
@pytest.mark.parametrize("name", SPECS)
def test_from_given_scores_every_id_and_bit_is_the_references(
    name: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tokens == "many":
        monkeypatch.setattr("routing.kernel.FEW_TOKENS", 0)
    spec = SPECS[name]
    families = {key: scores(rows, spec) for key, rows in logit_rows(spec).items()}
    families |= {f"raw {key}": rows.to(spec.chain_dtype) for key, rows in logit_rows(spec).items()}
    scores_TE = torch.cat(list(families.values()))
    expected = reference_from_scores(scores_TE, spec, **operands(spec))
    found = kernel_route_from_scores(scores_TE, spec, **operands(spec))
    assert offenders(families, (found.expert_ids_TK != expected.expert_ids_TK).any(dim=1)) == {}
    assert found.weights_TK.dtype == expected.weights_TK.dtype == spec.weight_dtype
    allowed = 4 if has_exp_after_choice(spec) else 0
    assert offenders(families, (ulps(found.weights_TK, expected.weights_TK) > allowed).any(dim=1)) == {}


@pytest.mark.parametrize("name", SPECS)
def test_from_logits_ids_differ_in_ties_only_and_weights_by_four_ulp(name: str) -> None:
    spec = SPECS[name]
    families = logit_rows(spec)
    logits_TE = torch.cat(list(families.values()))
    expected = reference(logits_TE, spec, **operands(spec))
    found = kernel_route(logits_TE, spec, **operands(spec))
    assert has_distinct_ids(found, spec.num_experts)
    same_T = (found.expert_ids_TK == expected.expert_ids_TK).all(dim=1)
    choice_TE = scores(logits_TE, spec).float()
    if spec.has_bias:
        choice_TE = choice_TE + operands(spec)["bias_E"]
    chosen, wanted = (choice_TE.gather(1, ids.long()) for ids in (found.expert_ids_TK, expected.expert_ids_TK))
    is_tie_T = (ulps(chosen, wanted) <= 8).all(dim=1)
    assert offenders(families, ~same_T & ~is_tie_T) == {}
    assert same_T[: len(families["normal"])].all()
    is_off_T = (ulps(found.weights_TK, expected.weights_TK) > 4).any(dim=1)
    off = offenders(families, is_off_T & same_T)
    assert off.keys() <= DENORMAL, off


@pytest.mark.parametrize("bias", bias_rows(8))
@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3",
        "deepseek_v3, groups of 32",
        "zero-filled groups",
        "zero-filled groups of 64",
        "ernie",
        "twenty-two slots of 96",
    ],
)
def test_every_bias_moves_the_choice_as_in_the_reference(name: str, bias: str) -> None:
    spec = SPECS[name]
    rows = torch.cat(list(logit_rows(spec).values()))
    for scores_TE in (scores(rows, spec), rows.to(spec.chain_dtype)):
        found = kernel_route_from_scores(scores_TE, spec, **operands(spec, bias))
        assert_same(found, reference_from_scores(scores_TE, spec, **operands(spec, bias)))


@pytest.mark.parametrize("K", TIE_ORDERS)
def test_equal_scores_fall_in_the_measured_order(K: int) -> None:
    """Positions in the list of chosen experts, which for equal scores are experts 0 to K - 1."""
    spec = make_spec(num_experts=40, top_k=K)
    ids = kernel_route_from_scores(torch.full((1, 40), 0.5), spec).expert_ids_TK
    assert ids.tolist() == [TIE_ORDERS[K]]
    unsorted = dataclasses.replace(spec, slot_order=SlotOrder.UNSORTED)
    assert kernel_route_from_scores(torch.full((1, 40), 0.5), unsorted).expert_ids_TK.tolist() == [list(range(K))]


@pytest.mark.parametrize("T", [0, 1, 2, 7, 33, 70])
def test_any_number_of_tokens_and_any_stride(T: int) -> None:
    spec = make_spec(num_experts=12)
    wide = torch.full((T, 40), math.nan)
    wide[:, ::2][:, :12] = torch.randn(T, 12, generator=torch.Generator().manual_seed(T))
    logits_TE = wide[:, ::2][:, :12]
    found = kernel_route(logits_TE, spec)
    assert found.expert_ids_TK.shape == found.weights_TK.shape == (T, 4)
    assert_same(found, kernel_route(logits_TE.contiguous(), spec))
    assert found.expert_ids_TK.tolist() == reference(logits_TE, spec).expert_ids_TK.tolist()


def test_a_row_alone_is_a_row_of_the_batch() -> None:
    for spec in (SPECS["gemma4"], SPECS["zero-filled groups"]):
        logits_TE = torch.cat(list(logit_rows(spec).values()))
        batch = kernel_route(logits_TE, spec, **operands(spec))
        for token in (0, 5, len(logits_TE) - 1):
            alone = kernel_route(logits_TE[token : token + 1], spec, **operands(spec))
            assert alone.expert_ids_TK[0].tolist() == batch.expert_ids_TK[token].tolist()
            assert bits(alone.weights_TK[0]).tolist() == bits(batch.weights_TK[token]).tolist()


@settings(max_examples=25)
@given(
    num_experts=st.integers(2, 24),
    seed=st.integers(0, 2**31),
    is_sorted=st.booleans(),
    has_bias=st.booleans(),
    levels=st.sampled_from([2, 5, 1000]),
    data=st.data(),
)
def test_any_router_over_any_ties_equals_the_reference(
    num_experts: int, seed: int, is_sorted: bool, has_bias: bool, levels: int, data: st.DataObject
) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    counts = [count for count in (2, 3, 4) if num_experts % count == 0 and num_experts // count >= 2]
    count = data.draw(st.sampled_from([None, *counts]))
    groups = None
    if count is not None:
        least = -(-top_k * count // num_experts)
        groups = GroupSpec(count=count, kept=data.draw(st.integers(least, count)))
    kind, eps = data.draw(st.sampled_from([(ReduceKind.SUM, None), (ReduceKind.SUM_EPS, 1e-9), (ReduceKind.L1, None)]))
    spec = sigmoid_spec(
        num_experts=num_experts,
        top_k=top_k,
        groups=groups,
        has_bias=has_bias,
        reduce=TopkReduce(kind=kind, eps=eps),
        slot_order=SlotOrder.SORTED if is_sorted else SlotOrder.UNSORTED,
    )
    random = torch.Generator().manual_seed(seed)
    scores_TE = torch.randint(-levels, levels, (3, num_experts), generator=random) / levels
    bias = {"bias_E": torch.randint(-2, 3, (num_experts,), generator=random) / 2} if has_bias else {}
    assert_same(kernel_route_from_scores(scores_TE, spec, **bias), reference_from_scores(scores_TE, spec, **bias))


def test_the_raw_scores_of_the_chosen_are_the_references() -> None:
    for name in ("glm4", "qwen3", "lfm2, a bf16 chain"):
        spec = SPECS[name]
        logits_TE = logit_rows(spec)["normal"]
        found = kernel_chosen(logits_TE, spec, **operands(spec))
        expected = reference_chosen(logits_TE, spec, **operands(spec))
        assert found.expert_ids_TK.tolist() == expected.expert_ids_TK.tolist()
        assert found.scores_TK.dtype == expected.scores_TK.dtype == spec.chain_dtype
        assert ulps(found.scores_TK, expected.scores_TK).max() <= 4


@pytest.mark.parametrize("name", ["qwen3", "glm4"])
def test_another_formula_would_be_noticed(name: str) -> None:
    """The corpus tells near misses apart: another order of scaling, another sum, a reciprocal, other slots."""
    spec = SPECS[name]
    rows = torch.randn(64, spec.num_experts, generator=torch.Generator().manual_seed(3)) * 1.5
    scores_TE = scores(rows, spec)
    found = kernel_route_from_scores(scores_TE, spec, **operands(spec))
    chosen_TK = scores_TE.gather(1, found.expert_ids_TK.long())
    sequential, scale = chosen_TK[:, :1], 2.5 if spec.scale is None else spec.scale
    for slot in range(1, spec.top_k):
        sequential = sequential + chosen_TK[:, slot : slot + 1]
    total = scores_TE.new_tensor([[row.double().sum()] for row in chosen_TK])
    scaled = dataclasses.replace(spec, scale=scale)
    found = kernel_route_from_scores(scores_TE, scaled, **operands(spec))
    for wrong_TK in (chosen_TK / sequential * scale, chosen_TK * scale / total, chosen_TK * (1 / total) * scale):
        assert (bits(wrong_TK) != bits(found.weights_TK)).any()
    order = SlotOrder.UNSORTED if spec.slot_order is SlotOrder.SORTED else SlotOrder.SORTED
    other = kernel_route_from_scores(scores_TE, dataclasses.replace(scaled, slot_order=order), **operands(spec))
    by_expert = [run.weights_TK.gather(1, run.expert_ids_TK.argsort(dim=1)) for run in (found, other)]
    assert (bits(by_expert[0]) != bits(by_expert[1])).any()


def test_zero_filled_groups_are_not_minus_inf_filled_groups() -> None:
    spec = SPECS["zero-filled groups"]
    assert spec.groups is not None
    scores_TE = scores(logit_rows(spec)["normal"], spec)
    zero = kernel_route_from_scores(scores_TE, spec, **operands(spec, "negative"))
    excluding = dataclasses.replace(spec, groups=dataclasses.replace(spec.groups, mask_value=-math.inf))
    minus_inf = kernel_route_from_scores(scores_TE, excluding, **operands(spec, "negative"))
    assert zero.expert_ids_TK.tolist() != minus_inf.expert_ids_TK.tolist()


def test_what_the_kernel_cannot_honour_is_refused() -> None:
    logits_TE = torch.zeros(2, 16)
    with pytest.raises(ValueError, match="platform 'cuda'; the spec asks for 'cpu'"):
        kernel_route(logits_TE, make_spec(platform="cpu"))
    with pytest.raises(ValueError, match=r"bfloat16.*the spec says torch\.float32"):
        kernel_route(logits_TE.bfloat16(), make_spec())
    with pytest.raises(ValueError, match=r"bias_E missing.*expert_scale_E missing"):
        kernel_route(logits_TE, make_spec(has_bias=True, expert_scale=True))
    with pytest.raises(ValueError, match=r"\[T, 16\] expected.*bias_E given.*bias_E of shape \(3,\).*float32 expected"):
        kernel_route(logits_TE[:, :8], make_spec(), bias_E=torch.zeros(3, dtype=torch.float64))
    narrow = make_spec(expert_scale=True, chain_dtype=torch.bfloat16, gate=GateSpec())
    with pytest.raises(ValueError, match="it would widen the chain"):
        kernel_route(logits_TE, narrow, expert_scale_E=torch.ones(16))
