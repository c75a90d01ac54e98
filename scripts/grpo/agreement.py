"""How far the hosts and the learner agree, token by token, where both computed with the same weights.

S samples, C completion tokens, N positions, T = S * N rows of a forward pass, L MoE layers, K experts of a token.
"""

import math
from dataclasses import dataclass, field
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Agreement:
    """What was compared, and what differed; adds up."""

    tokens: int = 0
    """Sampled tokens whose log-probabilities were compared."""
    logprob_abs_diff_max: float = 0.0
    decisions: int = 0
    """Routing decisions compared (a token in a layer), near ties left out."""
    mismatches: int = 0
    """Of these, the ones where the hosts chose another set of experts."""
    near_ties: int = 0

    def __add__(self, other: Self) -> "Agreement":
        return Agreement(
            tokens=self.tokens + other.tokens,
            logprob_abs_diff_max=max(self.logprob_abs_diff_max, other.logprob_abs_diff_max),
            decisions=self.decisions + other.decisions,
            mismatches=self.mismatches + other.mismatches,
            near_ties=self.near_ties + other.near_ties,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Replayed:
    """What became of the hosts' decisions when the learner replayed them; adds up."""

    decisions: int = 0
    """That were replayed: all that the hosts recorded, of older weights too."""
    differing: int = 0
    """Of these, the ones in which the learner by itself would have chosen another set of experts."""
    tokens: int = 0
    """Sampled tokens whose log-probabilities under replay were compared: those of the present weights, without
    exception, since no tie can fall the other way."""
    logprob_abs_diff_max: float = 0.0

    def __add__(self, other: Self) -> "Replayed":
        return Replayed(
            decisions=self.decisions + other.decisions,
            differing=self.differing + other.differing,
            tokens=self.tokens + other.tokens,
            logprob_abs_diff_max=max(self.logprob_abs_diff_max, other.logprob_abs_diff_max),
        )


@dataclass(slots=True)
class RouterDecisions:
    """The learner's own, in one forward pass, layer after layer."""

    expert_ids: list[Tensor] = field(default_factory=list)
    """Per layer [T, K]."""
    near_ties: list[Tensor] = field(default_factory=list)
    """Per layer [T], bool."""


def compare(
    logprobs_SC: Tensor,
    hosted_logprobs_SC: Tensor,
    routing: RouterDecisions,
    hosted_expert_ids_SNLK: Tensor,
    chosen_S: Tensor,
) -> Agreement:
    """The learner's pass over S samples beside what the hosts said, over the samples in `chosen_S` (bool).

    Where a near tie fell the other way, this position and the later ones of its sample are left out: both sides go on
    from different experts there, each rightly.
    """
    samples, positions, layers, _ = hosted_expert_ids_SNLK.shape
    ids_SNLK = torch.stack(routing.expert_ids, dim=1).view(samples, positions, layers, -1)
    ties_SNL = torch.stack(routing.near_ties, dim=1).view(samples, positions, layers)[chosen_S]
    ours_SNLK, theirs_SNLK = (ids[chosen_S].long().sort(dim=-1).values for ids in (ids_SNLK, hosted_expert_ids_SNLK))
    differ_SNL = (ours_SNLK != theirs_SNLK).any(dim=-1)
    alike_SN = (differ_SNL & ties_SNL).any(dim=-1).cumsum(dim=1) == 0
    compared_SNL = ~ties_SNL & alike_SN.unsqueeze(-1)
    diffs_SC = gaps(logprobs_SC, hosted_logprobs_SC)[chosen_S]
    diffs = diffs_SC[alike_SN[:, positions - diffs_SC.shape[1] :]]
    return Agreement(
        tokens=diffs.numel(),
        logprob_abs_diff_max=float(diffs.max()) if diffs.numel() else 0.0,
        decisions=int(compared_SNL.sum()),
        mismatches=int((differ_SNL & compared_SNL).sum()),
        near_ties=int(ties_SNL.sum()),
    )


def gaps(logprobs_SC: Tensor, hosted_logprobs_SC: Tensor) -> Tensor:
    """[S, C]: how far apart; what is not a number is infinitely far."""
    return (logprobs_SC.detach() - hosted_logprobs_SC).abs().nan_to_num(nan=math.inf)
