"""Parity certifies what has the trainer's bits, and where one differs it names the operation."""

import dataclasses
import math
import pickle
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from router_specs import NONE, SPECS, SUM, make_spec, sigmoid_spec
from torch import Tensor

from routing import (
    Assignment,
    GroupScore,
    GroupSpec,
    ReduceKind,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    SumOrder,
    TopkReduce,
    reference,
    returns_weights,
)
from routing.arithmetic import Arithmetic, CudaArithmetic, arithmetic_of
from routing.oracle import EagerOracle, Oracle, Stages, denominator
from routing.orders import SEQUENTIAL, rounded_sum
from routing.parity import ParityRefused, certify, examine
from routing.probes import SMALL_BATCHES, batches
from routing.stages import Operation
from routing.verdict import Verdict

CPU = torch.device("cpu")
CLAMPED = TopkReduce(kind=ReduceKind.CLAMPED_SUM, eps=1e-12)
EXPERTS = GroupSpec(count=4, kept=2)


def sum_eps(eps: float) -> TopkReduce:
    return TopkReduce(kind=ReduceKind.SUM_EPS, eps=eps)


def on_cpu(spec: RouterSpec, **changes: Any) -> RouterSpec:
    return dataclasses.replace(spec, platform="cpu", sum_order=SumOrder.HALVING, **changes)


DEEPSEEK = on_cpu(sigmoid_spec(num_experts=32, top_k=6, groups=EXPERTS))
QWEN = on_cpu(make_spec(num_experts=32, top_k=6))


@dataclass(frozen=True)
class Changed:
    """A trainer that is the eager one, but for one thing."""

    spec: RouterSpec

    def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages:
        stages = EagerOracle(spec=self.spec)(logits_TE, bias_E=bias_E, expert_scale_E=expert_scale_E)
        return self.change(stages)

    def change(self, stages: Stages) -> Stages:
        raise NotImplementedError

    def weighing(self, stages: Stages, reduced_TK: Tensor, scaled_TK: Tensor | None = None) -> Stages:
        if scaled_TK is None:
            scaled_TK = reduced_TK if self.spec.scale is None else reduced_TK * self.spec.scale
        return dataclasses.replace(
            stages,
            reduced_TK=reduced_TK,
            scaled_TK=scaled_TK,
            expert_scaled_TK=scaled_TK,
            weights_TK=scaled_TK.to(self.spec.weight_dtype),
        )


class SumsBackwards(Changed):
    def change(self, stages: Stages) -> Stages:
        total_T1 = rounded_sum(SEQUENTIAL, stages.chosen_TK.flip(1))
        return self.weighing(stages, stages.chosen_TK / denominator(total_T1, self.spec.reduce))


class SumsInOrder(Changed):
    def change(self, stages: Stages) -> Stages:
        total_T1 = rounded_sum(SEQUENTIAL, stages.chosen_TK)
        return self.weighing(stages, stages.chosen_TK / denominator(total_T1, self.spec.reduce))


class MultipliesByReciprocal(Changed):
    def change(self, stages: Stages) -> Stages:
        total_T1 = stages.chosen_TK.sum(dim=-1, keepdim=True)
        return self.weighing(stages, stages.chosen_TK * (1 / denominator(total_T1, self.spec.reduce)))


class ScalesBeforeItDivides(Changed):
    def change(self, stages: Stages) -> Stages:
        assert self.spec.scale is not None
        below_T1 = denominator(stages.chosen_TK.sum(dim=-1, keepdim=True), self.spec.reduce)
        return self.weighing(stages, stages.reduced_TK, stages.chosen_TK * self.spec.scale / below_T1)


class TakesTheLastOfEquals(Changed):
    def change(self, stages: Stages) -> Stages:
        flipped = torch.topk(stages.choice_TE.flip(1), self.spec.top_k)
        ids_TK = stages.choice_TE.shape[1] - 1 - flipped.indices
        return self.weighing(dataclasses.replace(stages, ids_TK=ids_TK), stages.reduced_TK)


class WeighsByTheBiasedScore(Changed):
    """As a kernel that subtracts the bias again."""

    def change(self, stages: Stages) -> Stages:
        bias_TE = stages.biased_TE - stages.scores_TE
        scores_TE = stages.biased_TE - bias_TE
        off_TE = torch.where(scores_TE == stages.scores_TE, scores_TE.nextafter(scores_TE + 1), scores_TE)
        chosen_TK = off_TE.gather(1, stages.ids_TK)
        below_T1 = denominator(chosen_TK.sum(dim=-1, keepdim=True), self.spec.reduce)
        stages = dataclasses.replace(stages, scores_TE=off_TE, weighing_TE=off_TE, chosen_TK=chosen_TK)
        return self.weighing(stages, chosen_TK / below_T1)


@pytest.mark.parametrize("name", SPECS)
def test_every_router_is_certified_on_this_machine(name: str) -> None:
    report = examine(on_cpu(SPECS[name]), CPU, stages=True)
    assert (report.other_ids, report.other_weights) == (0, 0)
    assert {row.verdict for row in report.rows} == {Verdict.EQUAL}
    assert report.refusal is None
    assert report.spec == on_cpu(SPECS[name])
    assert report.tokens >= 500


def refused(served: RouterSpec, oracle: Oracle, **more: Any) -> Operation:
    """The operation that the refusal names."""
    with pytest.raises(ParityRefused, match="routing has not the trainer's bits here") as caught:
        certify(served, CPU, oracle=oracle, **more)
    report = examine(served, CPU, oracle=oracle, **more)
    first = report.mismatches[0]
    assert f"bits here: {first.operation}: expected {first.expected}; found {first.found}" in str(caught.value)
    assert report.mismatches[-1].operation is Operation.WHOLE
    assert first.verdict is Verdict.IMPOSSIBLE
    assert report.other_ids or report.other_weights
    return first.operation


@pytest.mark.parametrize(
    ("served", "changes", "operation"),
    [
        (DEEPSEEK, {"score": ScoreFunction.SOFTMAX}, Operation.SCORE),
        (DEEPSEEK, {"score": ScoreFunction.SQRT_SOFTPLUS}, Operation.SCORE),
        (DEEPSEEK, {"chain_dtype": torch.bfloat16}, Operation.SCORE),
        (DEEPSEEK, {"groups": dataclasses.replace(EXPERTS, mask_value=0.0)}, Operation.GROUPS),
        (DEEPSEEK, {"groups": dataclasses.replace(EXPERTS, kept=3)}, Operation.GROUPS),
        (DEEPSEEK, {"groups": dataclasses.replace(EXPERTS, top=3)}, Operation.GROUPS),
        (DEEPSEEK, {"groups": dataclasses.replace(EXPERTS, score=GroupScore.MAX, top=1)}, Operation.GROUPS),
        (DEEPSEEK, {"groups": None}, Operation.GROUPS),
        (DEEPSEEK, {"slot_order": SlotOrder.SORTED}, Operation.SLOTS),
        (QWEN, {"slot_order": SlotOrder.UNSORTED}, Operation.SLOTS),
        (DEEPSEEK, {"reduce": sum_eps(1e-12)}, Operation.REDUCE),
        (DEEPSEEK, {"reduce": sum_eps(1e-6)}, Operation.REDUCE),
        (DEEPSEEK, {"reduce": SUM}, Operation.REDUCE),
        (DEEPSEEK, {"reduce": NONE}, Operation.REDUCE),
        (DEEPSEEK, {"reduce": CLAMPED}, Operation.REDUCE),
        (QWEN, {"reduce": TopkReduce(kind=ReduceKind.SOFTMAX)}, Operation.REDUCE),
        (DEEPSEEK, {"scale": 1.8}, Operation.SCALE),
        (DEEPSEEK, {"scale": 2.5000005}, Operation.SCALE),
        (DEEPSEEK, {"weight_dtype": torch.bfloat16}, Operation.DTYPE),
        (QWEN, {"weight_dtype": torch.float16}, Operation.DTYPE),
    ],
)
def test_a_trainer_that_computes_otherwise_is_refused_by_the_name_of_the_operation(
    served: RouterSpec, changes: dict[str, Any], operation: Operation
) -> None:
    trainer = EagerOracle(spec=dataclasses.replace(served, **changes))
    assert refused(served, trainer) is operation


@pytest.mark.parametrize(
    ("trainer", "operation"),
    [
        (SumsBackwards, Operation.SUM),
        (SumsInOrder, Operation.SUM),
        (MultipliesByReciprocal, Operation.DIVISION),
        (ScalesBeforeItDivides, Operation.SCALE),
        (WeighsByTheBiasedScore, Operation.SCORE),
    ],
)
def test_a_trainer_that_takes_one_step_otherwise_is_refused_by_its_name(
    trainer: type[Changed], operation: Operation
) -> None:
    ungrouped = dataclasses.replace(DEEPSEEK, groups=None)
    assert refused(ungrouped, trainer(ungrouped)) is operation


def test_a_bias_that_takes_no_part_is_told_from_groups_and_choice() -> None:
    class WithoutBias(EagerOracle):
        def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages:
            return super().__call__(logits_TE, bias_E=None, expert_scale_E=expert_scale_E)

    class HalfABias(EagerOracle):
        def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages:
            assert bias_E is not None
            return super().__call__(logits_TE, bias_E=bias_E / 2, expert_scale_E=expert_scale_E)

    for served in (DEEPSEEK, dataclasses.replace(DEEPSEEK, groups=None)):
        assert refused(served, WithoutBias(spec=served)) is Operation.BIAS
        assert refused(served, HalfABias(spec=served)) is Operation.BIAS


def test_a_choice_that_is_no_top_k_is_named_as_such() -> None:
    class SecondBest(Changed):
        def change(self, stages: Stages) -> Stages:
            ids_TK = torch.topk(stages.choice_TE, self.spec.top_k + 1).indices[:, 1:]
            return dataclasses.replace(stages, ids_TK=ids_TK)

    assert refused(QWEN, SecondBest(QWEN)) is Operation.IDS


def test_equals_that_are_taken_in_another_order_are_named_ties() -> None:
    for served in (QWEN, dataclasses.replace(DEEPSEEK, groups=None, slot_order=SlotOrder.SORTED)):
        assert refused(served, TakesTheLastOfEquals(served)) is Operation.TIES


def test_an_experts_factor_is_named() -> None:
    served = on_cpu(SPECS["gemma4"])

    class FactorsFirst(EagerOracle):
        def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages:
            assert expert_scale_E is not None
            return super().__call__(logits_TE, bias_E=bias_E, expert_scale_E=expert_scale_E * 1.5)

    assert refused(served, FactorsFirst(spec=served)) is Operation.EXPERT_SCALE


def test_a_softmax_over_the_chosen_that_differs_is_the_score_function() -> None:
    served = on_cpu(SPECS["gpt_oss"])

    class InHalfPrecision(Changed):
        def change(self, stages: Stages) -> Stages:
            chosen_TK = stages.chosen_TK.bfloat16().float()
            return self.weighing(dataclasses.replace(stages, chosen_TK=chosen_TK), chosen_TK)

    assert refused(served, InHalfPrecision(served)) is Operation.SCORE


def test_ids_and_weights_are_counted_apart() -> None:
    other_order = EagerOracle(spec=dataclasses.replace(QWEN, reduce=NONE, slot_order=SlotOrder.UNSORTED))
    report = examine(dataclasses.replace(QWEN, reduce=NONE, slot_order=SlotOrder.SORTED), CPU, oracle=other_order)
    assert 0 < report.other_weights <= report.other_ids < report.tokens
    scaled = examine(DEEPSEEK, CPU, oracle=EagerOracle(spec=dataclasses.replace(DEEPSEEK, scale=2.0)))
    assert scaled.other_ids == 0 < scaled.other_weights


# A GPU's PyTorch, written out: it picks the kernel's variant. Exponentials are this machine's.


@dataclass(frozen=True)
class WrittenOut:
    """A trainer on a GPU whose PyTorch adds as `arithmetic` does, with slots scored by sigmoids."""

    spec: RouterSpec
    arithmetic: Arithmetic

    def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages:
        assert bias_E is not None
        eps, scale = self.spec.reduce.eps, self.spec.scale
        assert eps is not None
        assert scale is not None
        scores_TE = self.arithmetic.sigmoid(logits_TE)
        biased_TE = scores_TE + bias_E
        ids_TK = self.arithmetic.topk(biased_TE, self.spec.top_k, is_sorted=False)
        chosen_TK = scores_TE.gather(1, ids_TK)
        reduced_TK = chosen_TK / (self.arithmetic.sum(chosen_TK) + eps)
        return Stages(
            scores_TE=scores_TE,
            weighing_TE=scores_TE,
            biased_TE=biased_TE,
            choice_TE=biased_TE,
            ids_TK=ids_TK,
            chosen_TK=chosen_TK,
            reduced_TK=reduced_TK,
            scaled_TK=reduced_TK * scale,
            expert_scaled_TK=reduced_TK * scale,
            weights_TK=reduced_TK * scale,
        )


class Sequential(CudaArithmetic):
    """Sums in an order that no kernel has."""

    def sum(self, rows_TW: Tensor) -> Tensor:
        return rounded_sum(SEQUENTIAL, rows_TW)


def serve_written_out(logits_TE: Tensor, spec: RouterSpec, **given: Any) -> Assignment:
    """The reference for platform "cuda", in place of a kernel."""
    function = given.pop("topk_reduce_func", None)
    assert function is None
    return reference(logits_TE, spec, **given)


ON_A_GPU = sigmoid_spec(num_experts=32, top_k=6)


@pytest.mark.parametrize("order", SumOrder)
def test_the_order_that_pytorch_has_picks_the_variant(order: SumOrder) -> None:
    arithmetic = CudaArithmetic(order)
    report = certify(
        ON_A_GPU, CPU, oracle=WrittenOut(ON_A_GPU, arithmetic), serve=serve_written_out, arithmetic=arithmetic
    )
    assert report.spec == dataclasses.replace(ON_A_GPU, sum_order=order)
    assert arithmetic_of(report.spec) == arithmetic


def test_a_variant_that_is_not_pytorchs_is_caught_by_its_bits_alone() -> None:
    oracle = WrittenOut(ON_A_GPU, CudaArithmetic(SumOrder.ADJACENT))
    wrongly_probed = CudaArithmetic(SumOrder.HALVING)
    assert refused(ON_A_GPU, oracle, serve=serve_written_out, arithmetic=wrongly_probed) is Operation.SUM


def test_an_order_that_no_kernel_has_is_refused_by_name() -> None:
    oracle = WrittenOut(ON_A_GPU, Sequential())
    with pytest.raises(ParityRefused, match=r"sum order: .*found torch\.sum adds in another order \(sequential\)"):
        certify(ON_A_GPU, CPU, oracle=oracle, serve=serve_written_out, arithmetic=Sequential())


def test_a_topk_that_ranks_otherwise_is_refused_by_name_even_where_no_row_shows_it() -> None:
    class NanLast(CudaArithmetic):
        def topk(self, rows_TW: Tensor, k: int, *, is_sorted: bool) -> Tensor:
            return super().topk(torch.where(rows_TW.isnan(), -torch.inf, rows_TW), k, is_sorted=is_sorted)

    oracle = WrittenOut(ON_A_GPU, CudaArithmetic())
    with pytest.raises(ParityRefused, match=r"here: ties: .*found torch\.topk orders ties"):
        certify(ON_A_GPU, CPU, oracle=oracle, serve=serve_written_out, arithmetic=NanLast())


# Callable reduce functions


def test_a_function_that_is_a_form_is_served_fused() -> None:
    report = certify(DEEPSEEK, CPU, function=lambda x: x.sum(-1, keepdim=True) + 1e-20)
    assert report.spec == DEEPSEEK
    assert report.function is None
    assert report.fusion is not None
    assert report.fusion.form == DEEPSEEK.reduce


def test_a_named_function_in_the_spec_is_fused_too_and_its_row_says_so() -> None:
    named = dataclasses.replace(DEEPSEEK, reduce=TopkReduce.of(f"{__name__}:plain_sum"))
    report = examine(named, CPU, stages=True)
    assert report.spec.reduce == SUM
    row = next(row for row in report.rows if row.operation is Operation.REDUCE)
    assert row.expected == f"the function {__name__}:plain_sum"
    assert row.found.startswith("sum; 0 of ")
    assert "the trainer has to run it too" in row.why


def test_a_function_that_is_no_form_is_served_as_it_is() -> None:
    function = returns_weights(lambda x: x * (1 / x.sum(-1, keepdim=True)))
    report = certify(DEEPSEEK, CPU, function=function)
    assert report.spec == DEEPSEEK
    assert report.function is function
    named = dataclasses.replace(DEEPSEEK, reduce=TopkReduce.of(f"{__name__}:odd"))
    report = certify(named, CPU)
    assert report.spec == named
    assert report.function is None


def test_a_fused_form_is_held_against_the_function_itself() -> None:
    other = EagerOracle(spec=DEEPSEEK, function=lambda x: x.sum(-1, keepdim=True) * 1.5)
    with pytest.raises(ParityRefused, match="reduce: expected the function"):
        certify(DEEPSEEK, CPU, function=plain_sum, oracle=other)


def plain_sum(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(dim=-1, keepdim=True)


def odd(scores_TK: Tensor) -> Tensor:
    return scores_TK.sum(dim=-1, keepdim=True).sqrt()


# The rows


def test_probe_rows_are_the_same_every_time_and_of_every_size() -> None:
    first, second = list(batches(DEEPSEEK, CPU, 700)), list(batches(DEEPSEEK, CPU, 700))
    assert [len(batch.logits_TE) for batch in first][: len(SMALL_BATCHES)] == list(SMALL_BATCHES)
    assert sum(len(batch.logits_TE) for batch in first) >= 700
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.logits_TE.nan_to_num(1e9), other.logits_TE.nan_to_num(1e9))
    assert len({batch.bias_E.sum().item() for batch in first if batch.bias_E is not None}) >= 5


@pytest.mark.parametrize("name", ["glm4", "qwen3", "gpt_oss in fp16", "lfm2, a bf16 chain"])
def test_probe_rows_hold_what_routers_get_wrong(name: str) -> None:
    spec = on_cpu(SPECS[name])
    logits_TE = torch.cat([batch.logits_TE for batch in batches(spec, CPU, 2000)]).float()
    assert logits_TE.isnan().any(dim=1).sum() > 40
    assert (logits_TE == math.inf).any()
    assert (logits_TE == -math.inf).any()
    kth_and_next = logits_TE.nan_to_num(0, 0, 0).sort(dim=1, descending=True).values[:, spec.top_k - 1 : spec.top_k + 1]
    assert (kth_and_next[:, 0] == kth_and_next[:, -1]).sum() > 200
    stages = EagerOracle(spec=dataclasses.replace(spec, has_bias=False))(
        logits_TE.to(spec.gate.output_dtype), bias_E=None, expert_scale_E=None
    )
    totals_T = stages.chosen_TK.double().sum(dim=1)
    if spec.score is ScoreFunction.SIGMOID:
        assert (totals_T == 0).any()
        assert ((totals_T > 0) & (totals_T < 1e-12)).any()
        assert (stages.chosen_TK == 1).all(dim=1).any()


def test_a_refusal_survives_its_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(ParityRefused("routing has not the trainer's bits here: sum order")))
    assert isinstance(error, ParityRefused)
    assert "sum order" in str(error)


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_every_router_is_certified_on_a_gpu(name: str, cuda: torch.device) -> None:
    report = certify(SPECS[name], cuda)
    assert (report.other_ids, report.other_weights) == (0, 0)
    assert report.tokens >= 1 << 18


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "deepseek_v3", "gpt_oss"])
def test_every_stage_is_certified_on_a_gpu(name: str, cuda: torch.device) -> None:
    report = examine(SPECS[name], cuda, stages=True, tokens=20_000)
    assert {row.verdict for row in report.rows} == {Verdict.EQUAL}


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("changes", "operation"),
    [
        ({"reduce": sum_eps(1e-12)}, Operation.REDUCE),
        ({"reduce": SUM}, Operation.REDUCE),
        ({"slot_order": SlotOrder.SORTED}, Operation.SLOTS),
        ({"groups": dataclasses.replace(EXPERTS, mask_value=0.0)}, Operation.GROUPS),
        ({"scale": 1.8}, Operation.SCALE),
        ({"score": ScoreFunction.SOFTMAX}, Operation.SCORE),
        ({"weight_dtype": torch.bfloat16}, Operation.DTYPE),
    ],
)
def test_on_a_gpu_a_trainer_that_computes_otherwise_is_refused(
    changes: dict[str, Any], operation: Operation, cuda: torch.device
) -> None:
    served = dataclasses.replace(DEEPSEEK, platform="cuda")
    report = examine(served, cuda, oracle=EagerOracle(spec=dataclasses.replace(served, **changes)), tokens=20_000)
    assert report.mismatches[0].operation is operation


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("trainer", "operation"),
    [
        (SumsBackwards, Operation.SUM),
        (SumsInOrder, Operation.SUM),
        (MultipliesByReciprocal, Operation.DIVISION),
        (ScalesBeforeItDivides, Operation.SCALE),
    ],
)
def test_on_a_gpu_a_step_taken_otherwise_is_refused(
    trainer: type[Changed], operation: Operation, cuda: torch.device
) -> None:
    served = dataclasses.replace(DEEPSEEK, platform="cuda")
    report = examine(served, cuda, oracle=trainer(served), tokens=20_000)
    assert report.mismatches[0].operation is operation


@pytest.mark.gpu
def test_on_a_gpu_a_function_is_fused_and_another_is_not(cuda: torch.device) -> None:
    served = dataclasses.replace(DEEPSEEK, platform="cuda")
    fused = certify(served, cuda, function=lambda x: x.sum(-1, keepdim=True) + 1e-20)
    assert fused.spec == dataclasses.replace(served, sum_order=fused.orders.sum_order)
    assert fused.function is None
    assert certify(served, cuda, function=odd).function is odd
