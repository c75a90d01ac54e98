"""The definition of routing: what every other path must equal, bit for bit. Plain PyTorch; runs on any device.

With platform "cpu" it is the trainer's own sequence of PyTorch operations; with "cuda" the platform's orders are
written out. T tokens, E experts, K slots of a token, G groups.

num_tokens, an int32 scalar tensor on the device, says from which row on all is padding: ids -1, scores and weights 0,
never counted. counts_E, int32 [E], has the tokens of each expert added to it.
"""

import torch
from torch import Tensor

from routing.arithmetic import Arithmetic, arithmetic_of
from routing.assignment import Assignment, Chosen
from routing.operands import check_operands
from routing.spec import RouterSpec
from routing.terms import GroupScore, GroupSpec, ReduceKind, ScoreFunction, SlotOrder


def reference(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    num_tokens: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> Assignment:
    """Routes logits in the gate's output dtype. ValueError for operands that do not fit, and for a CALLABLE reduce."""
    check_operands(
        logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E,
        num_tokens=num_tokens, counts_E=counts_E,
    )  # fmt: skip
    chosen = _chosen(scores(logits_TE, spec), spec, bias_E)
    weights_TK = _reduced(chosen.scores_TK, spec)
    return scaled(_counted(chosen, num_tokens, counts_E).expert_ids_TK, weights_TK, spec, expert_scale_E)


def reference_from_scores(
    scores_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Assignment:
    """As `reference`, from given scores (for SOFTMAX_TOPK: logits) in the chain dtype."""
    check_operands(scores_TE, spec, dtype=spec.chain_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    chosen = _chosen(scores_TE, spec, bias_E)
    return scaled(chosen.expert_ids_TK, _reduced(chosen.scores_TK, spec), spec, expert_scale_E)


def reference_chosen(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    num_tokens: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> Chosen:
    """The chosen experts and their raw scores, before any reduce."""
    check_operands(
        logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E,
        num_tokens=num_tokens, counts_E=counts_E,
    )  # fmt: skip
    return _counted(_chosen(scores(logits_TE, spec), spec, bias_E), num_tokens, counts_E)


def scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    """[T, E] in the chain dtype; for SOFTMAX_TOPK the logits themselves."""
    arithmetic = arithmetic_of(spec)
    if spec.score is ScoreFunction.SOFTMAX_TOPK:
        return logits_TE.to(spec.chain_dtype)
    logits_TE = logits_TE.to(_score_dtype(spec))
    match spec.score:
        case ScoreFunction.SOFTMAX:
            found = arithmetic.softmax(logits_TE)
        case ScoreFunction.SIGMOID:
            found = arithmetic.sigmoid(logits_TE)
        case ScoreFunction.SQRT_SOFTPLUS:
            found = arithmetic.sqrt_softplus(logits_TE)
    return found.to(spec.chain_dtype)


def _score_dtype(spec: RouterSpec) -> torch.dtype:
    """What score functions take and give: never fp64, whose exponentials no trainer computes."""
    return torch.float32 if spec.chain_dtype == torch.float64 else spec.chain_dtype


def _chosen(scores_TE: Tensor, spec: RouterSpec, bias_E: Tensor | None) -> Chosen:
    arithmetic = arithmetic_of(spec)
    choice_TE = scores_TE if bias_E is None else scores_TE + bias_E
    if spec.groups is not None:
        is_masked_TE = _is_masked(choice_TE, spec.groups, arithmetic)
        choice_TE = choice_TE.masked_fill(is_masked_TE, spec.groups.mask_value)
        if spec.groups.masks_scores:
            scores_TE = scores_TE.masked_fill(is_masked_TE, spec.groups.mask_value)
    ids_TK = arithmetic.topk(choice_TE, spec.top_k, is_sorted=spec.slot_order is SlotOrder.SORTED)
    scores_TK = scores_TE.gather(1, ids_TK)
    if spec.score is ScoreFunction.SOFTMAX_TOPK:
        scores_TK = arithmetic.softmax(scores_TK.to(_score_dtype(spec))).to(spec.chain_dtype)
    return Chosen(expert_ids_TK=ids_TK.int(), scores_TK=scores_TK)


def _is_masked(choice_TE: Tensor, groups: GroupSpec, arithmetic: Arithmetic) -> Tensor:
    """[T, E] bool: whether the expert's group is none of the kept ones."""
    T, E = choice_TE.shape
    G, size = groups.count, E // groups.count
    grouped = choice_TE.reshape(T * G, size)
    if groups.score is GroupScore.MAX:
        group_scores_TG = arithmetic.largest(grouped).view(T, G)
    else:
        best = grouped.gather(1, arithmetic.topk(grouped, groups.top, is_sorted=True))
        group_scores_TG = arithmetic.sum(best).view(T, G)
    kept_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool)
    kept_TG.scatter_(1, arithmetic.topk(group_scores_TG, groups.kept, is_sorted=False), True)
    return ~kept_TG.unsqueeze(-1).expand(T, G, size).reshape(T, E)


def _counted(chosen: Chosen, num_tokens: Tensor | None, counts_E: Tensor | None) -> Chosen:
    """`chosen` with its padding blanked, once the rest is counted."""
    ids_TK, scores_TK = chosen.expert_ids_TK, chosen.scores_TK
    if num_tokens is not None:
        is_padding_T1 = (torch.arange(len(ids_TK), device=ids_TK.device) >= num_tokens).unsqueeze(1)
        ids_TK, scores_TK = ids_TK.masked_fill(is_padding_T1, -1), scores_TK.masked_fill(is_padding_T1, 0.0)
    if counts_E is not None:
        places = (ids_TK.long() + 1).flatten()  # padding is counted in front of expert 0, and dropped
        counted = counts_E.new_zeros(len(counts_E) + 1).scatter_add_(
            0, places, torch.ones_like(places, dtype=torch.int32)
        )
        counts_E += counted[1:]
    return Chosen(expert_ids_TK=ids_TK, scores_TK=scores_TK)


def _reduced(scores_TK: Tensor, spec: RouterSpec) -> Tensor:
    arithmetic, eps = arithmetic_of(spec), spec.reduce.eps
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
    """The end of every path: times the scale, times the experts' own factors, in the weight dtype; 0 for padding."""
    if spec.scale is not None:
        weights_TK = arithmetic_of(spec).times(weights_TK, spec.scale)
    if expert_scale_E is not None:
        weights_TK = weights_TK * expert_scale_E[expert_ids_TK.long()]
    weights_TK = weights_TK.masked_fill(expert_ids_TK < 0, 0.0)
    return Assignment(expert_ids_TK=expert_ids_TK, weights_TK=weights_TK.to(spec.weight_dtype))
