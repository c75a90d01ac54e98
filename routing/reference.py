"""The definition of routing: what every other path must equal, bit for bit. Plain PyTorch; runs on any device.

With platform "cpu" it is the trainer's own sequence of PyTorch operations; with "cuda" the platform's orders are
written out. T tokens, E experts, K slots of a token, G groups.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from routing.arithmetic import Arithmetic, CudaArithmetic, EagerArithmetic
from routing.assignment import Assignment, Chosen
from routing.operands import check_operands
from routing.spec import RouterSpec
from routing.terms import GroupScore, GroupSpec, Platform, ReduceKind, ScoreFunction, SlotOrder

ARITHMETIC: Mapping[Platform, Arithmetic] = {"cpu": EagerArithmetic(), "cuda": CudaArithmetic()}


def reference(
    logits_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Assignment:
    """Routes logits in the gate's output dtype. ValueError for operands that do not fit, and for a CALLABLE reduce."""
    chosen = reference_chosen(logits_TE, spec, bias_E=bias_E, expert_scale_E=expert_scale_E)
    return _combined(chosen, spec, expert_scale_E)


def reference_from_scores(
    scores_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Assignment:
    """As `reference`, from given scores (for SOFTMAX_TOPK: logits) in the chain dtype."""
    check_operands(scores_TE, spec, dtype=spec.chain_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    return _combined(_chosen(scores_TE, spec, bias_E), spec, expert_scale_E)


def reference_chosen(
    logits_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Chosen:
    """The chosen experts and their raw scores, before any reduce."""
    check_operands(logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    return _chosen(scores(logits_TE, spec), spec, bias_E)


def scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E] in the chain dtype; for SOFTMAX_TOPK the logits themselves."""
    arithmetic = ARITHMETIC[spec.platform]
    logits_TE = logits_TE.to(spec.chain_dtype)
    match spec.score:
        case ScoreFunction.SOFTMAX:
            return arithmetic.softmax(logits_TE)
        case ScoreFunction.SIGMOID:
            return arithmetic.sigmoid(logits_TE)
        case ScoreFunction.SQRT_SOFTPLUS:
            return arithmetic.sqrt_softplus(logits_TE)
        case ScoreFunction.SOFTMAX_TOPK:
            return logits_TE


def _chosen(scores_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> Chosen:
    arithmetic = ARITHMETIC[spec.platform]
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.groups is not None:
        choice_TE = _masked(choice_TE, spec.groups, arithmetic)
    ids_TK = arithmetic.topk(choice_TE, spec.top_k, is_sorted=spec.slot_order is SlotOrder.SORTED)
    scores_TK = scores_TE.gather(1, ids_TK)
    if spec.score is ScoreFunction.SOFTMAX_TOPK:
        scores_TK = arithmetic.softmax(scores_TK)
    return Chosen(expert_ids_TK=ids_TK.int(), scores_TK=scores_TK)


def _masked(choice_TE: Tensor, groups: GroupSpec, arithmetic: Arithmetic) -> Tensor:
    T, E = choice_TE.shape
    G, size = groups.count, E // groups.count
    grouped = choice_TE.reshape(T * G, size)
    if groups.score is GroupScore.MAX:
        group_scores_TG = grouped.amax(dim=1).view(T, G)
    else:
        best = grouped.gather(1, arithmetic.topk(grouped, groups.top, is_sorted=True))
        group_scores_TG = arithmetic.sum(best).view(T, G)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG.scatter_(1, arithmetic.topk(group_scores_TG, groups.kept, is_sorted=False), True)
    kept_TE = kept_TG.unsqueeze(-1).expand(T, G, size).reshape(T, E)
    return choice_TE.masked_fill(~kept_TE, groups.mask_value)


def _combined(chosen: Chosen, spec: RouterSpec, expert_scale_E: Tensor | None) -> Assignment:
    weights_TK = _reduced(chosen.scores_TK, spec)
    return scaled(chosen.expert_ids_TK, weights_TK, spec, expert_scale_E)


def _reduced(scores_TK: Tensor, spec: RouterSpec) -> Tensor:
    arithmetic, eps = ARITHMETIC[spec.platform], spec.reduce.eps
    match spec.reduce.kind:
        case ReduceKind.NONE:
            return scores_TK
        case ReduceKind.SUM:
            return scores_TK / arithmetic.sum(scores_TK)
        case ReduceKind.SUM_EPS:
            assert eps is not None
            return scores_TK / arithmetic.plus(arithmetic.sum(scores_TK), eps)
        case ReduceKind.CLAMPED_SUM:
            assert eps is not None
            return scores_TK / arithmetic.sum(scores_TK).clamp(min=eps)
        case ReduceKind.SOFTMAX:
            return arithmetic.softmax(scores_TK)
        case ReduceKind.L1:
            return scores_TK / arithmetic.abs_sum(scores_TK)
        case ReduceKind.CALLABLE:
            raise ValueError(f"the reduce of this spec is the function {spec.reduce.path}: call routing.route")


def scaled(expert_ids_TK: Tensor, weights_TK: Tensor, spec: RouterSpec, expert_scale_E: Tensor | None) -> Assignment:
    """The end of every path: times the scale, times the experts' own factors, in the weight dtype."""
    if spec.scale is not None:
        weights_TK = ARITHMETIC[spec.platform].times(weights_TK, spec.scale)
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E[expert_ids_TK.long()]
    return Assignment(expert_ids_TK=expert_ids_TK, weights_TK=weights_TK.to(spec.weight_dtype))
