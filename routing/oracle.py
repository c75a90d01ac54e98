"""A trainer's router as the trainer's own code calls PyTorch, step by step: what parity holds the serving path against.

Written from the trainers' modules, and apart from routing.reference and the kernels on purpose: what two write-ups of a
formula agree upon is worth more than one write-up. It has no orders of its own: they are those of the PyTorch that
runs it. T tokens, E experts, K slots of a token, G groups.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import softplus

from routing.reduce_function import ReduceFunction, normalise, resolve
from routing.spec import RouterSpec
from routing.terms import GroupScore, GroupSpec, ReduceKind, ScoreFunction, SlotOrder, TopkReduce


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """What a router computes on its way from logits to combine weights."""

    scores_TE: Tensor
    """For SOFTMAX_TOPK: the logits."""
    weighing_TE: Tensor
    """What weights are gathered from: the scores, masked like the choice where the groups say so."""
    biased_TE: Tensor
    """Scores plus bias."""
    choice_TE: Tensor
    """The same, with the experts of groups that were not kept masked."""
    ids_TK: Tensor
    """int64, in slot order."""
    chosen_TK: Tensor
    """The raw scores of the chosen; for SOFTMAX_TOPK their softmax."""
    reduced_TK: Tensor
    scaled_TK: Tensor
    expert_scaled_TK: Tensor
    weights_TK: Tensor
    """In the weight dtype."""


class Oracle(Protocol):
    """Whatever says what a trainer computes from logits."""

    def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages: ...


@dataclass(frozen=True, kw_only=True, eq=False)
class EagerOracle:
    """Eager PyTorch on whatever device the logits are on."""

    spec: RouterSpec
    """The trainer's; its platform and sum_order play no part."""
    function: ReduceFunction | None = None
    """In place of the spec's reduce."""

    def __call__(self, logits_TE: Tensor, *, bias_E: Tensor | None, expert_scale_E: Tensor | None) -> Stages:
        """All stages of logits in the spec's gate output dtype."""
        spec = self.spec
        scores_TE = _scores(logits_TE, spec)
        biased_TE = scores_TE if bias_E is None else scores_TE + bias_E
        choice_TE, weighing_TE = biased_TE, scores_TE
        if spec.groups is not None:
            is_masked_TE = ~_kept(biased_TE, spec.groups)
            choice_TE = biased_TE.masked_fill(is_masked_TE, spec.groups.mask_value)
            if spec.groups.masks_scores:
                weighing_TE = scores_TE.masked_fill(is_masked_TE, spec.groups.mask_value)
        values_TK, ids_TK = torch.topk(choice_TE, k=spec.top_k, dim=-1, sorted=spec.slot_order is SlotOrder.SORTED)
        chosen_TK = values_TK if choice_TE is scores_TE else weighing_TE.gather(1, ids_TK)
        if spec.score is ScoreFunction.SOFTMAX_TOPK:
            chosen_TK = _softmax(chosen_TK, spec.chain_dtype)
        reduced_TK = reduced(chosen_TK, spec.reduce, self.function)
        scaled_TK = reduced_TK if spec.scale is None else reduced_TK * spec.scale
        expert_scaled_TK = scaled_TK if expert_scale_E is None else scaled_TK * expert_scale_E[ids_TK]
        return Stages(
            scores_TE=scores_TE,
            weighing_TE=weighing_TE,
            biased_TE=biased_TE,
            choice_TE=choice_TE,
            ids_TK=ids_TK,
            chosen_TK=chosen_TK,
            reduced_TK=reduced_TK,
            scaled_TK=scaled_TK,
            expert_scaled_TK=expert_scaled_TK,
            weights_TK=expert_scaled_TK.to(spec.weight_dtype),
        )


def reduced(scores_TK: Tensor, reduce: TopkReduce, function: ReduceFunction | None = None) -> Tensor:
    """[T, K]: raw scores as combine weights before the scale, by a reduce or by the function in its place."""
    if function is None and reduce.kind is ReduceKind.CALLABLE:
        assert reduce.path is not None
        function = resolve(reduce.path)
    if function is not None:
        return normalise(scores_TK, function)
    match reduce.kind:
        case ReduceKind.NONE:
            return scores_TK
        case ReduceKind.SOFTMAX:
            return torch.softmax(scores_TK, dim=-1)
        case ReduceKind.L1:
            norm_T1: Tensor = torch.norm(scores_TK, p=1, dim=-1, keepdim=True)
            return scores_TK / norm_T1
        case _:
            return scores_TK / denominator(scores_TK.sum(dim=-1, keepdim=True), reduce)


def denominator(sum_T1: Tensor, reduce: TopkReduce) -> Tensor:
    """[T, 1]: what SUM, SUM_EPS and CLAMPED_SUM divide by, given the sum."""
    match reduce.kind:
        case ReduceKind.SUM_EPS:
            assert reduce.eps is not None
            return sum_T1 + reduce.eps
        case ReduceKind.CLAMPED_SUM:
            return torch.clamp(sum_T1, min=reduce.eps)
        case _:
            assert reduce.kind is ReduceKind.SUM, reduce
            return sum_T1


def _scores(logits_TE: Tensor, spec: RouterSpec) -> Tensor:
    chain = spec.chain_dtype
    working = torch.float32 if chain == torch.float64 else chain
    match spec.score:
        case ScoreFunction.SOFTMAX:
            return _softmax(logits_TE, chain)
        case ScoreFunction.SIGMOID:
            return torch.sigmoid(logits_TE.to(working)).to(chain)
        case ScoreFunction.SQRT_SOFTPLUS:
            return torch.sqrt(softplus(logits_TE.to(working))).to(chain)
        case ScoreFunction.SOFTMAX_TOPK:
            return logits_TE.to(chain)


def _softmax(values_TW: Tensor, chain: torch.dtype) -> Tensor:
    """In fp32 for a chain of fp32 or fp64, which trainers ask for by dtype; else in the chain's own dtype."""
    if chain in (torch.float32, torch.float64):
        return torch.softmax(values_TW, dim=-1, dtype=torch.float32).to(chain)
    return torch.softmax(values_TW.to(chain), dim=-1)


def _kept(biased_TE: Tensor, groups: GroupSpec) -> Tensor:
    """bool [T, E]: whether an expert's group is kept."""
    T, E = biased_TE.shape
    grouped_TGE = biased_TE.view(T, groups.count, E // groups.count)
    if groups.score is GroupScore.MAX:
        group_scores_TG = grouped_TGE.max(dim=-1).values
    else:
        group_scores_TG = grouped_TGE.topk(groups.top, dim=-1)[0].sum(dim=-1)
    kept = torch.topk(group_scores_TG, k=groups.kept, dim=-1, sorted=False)[1]
    mask_TG = torch.zeros_like(group_scores_TG).scatter_(1, kept, 1)
    return mask_TG.unsqueeze(-1).expand(T, groups.count, E // groups.count).reshape(T, E).bool()
