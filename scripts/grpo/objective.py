"""GRPO's objective: advantages normalised within a prompt's group, ratios clipped, tokens that are too old left out.

S samples, G groups (prompts), C completion tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

ADVANTAGE_EPS = 1e-4  # a group whose samples all score the same has no spread to divide by


@dataclass(frozen=True, kw_only=True, slots=True)
class Objective:
    """The clipped objective over the tokens that count."""

    loss: Tensor
    """Scalar, to minimise."""
    staleness: float
    """Updates between the weights that made a token and the learner's, the mean over all tokens."""
    masked_tokens: int
    """Tokens left out because they are older than the limit."""


def advantages(rewards_S: Tensor, samples: int) -> Tensor:
    """(reward - mean) / (standard deviation + eps) within each group of `samples`; DeepSeekMath, section 4.1.2.

    The standard deviation is the unbiased one (divides by samples - 1).
    """
    rewards_Gn = rewards_S.view(-1, samples)
    centred = rewards_Gn - rewards_Gn.mean(dim=1, keepdim=True)
    return (centred / (rewards_Gn.std(dim=1, keepdim=True) + ADVANTAGE_EPS)).view(-1)


def objective(
    logprobs_SC: Tensor,
    behaviour_logprobs_SC: Tensor,
    advantages_S: Tensor,
    staleness_SC: Tensor,
    *,
    clip: float,
    max_staleness: int,
) -> Objective:
    """Minus the mean over tokens of min(ratio * A, clamp(ratio, 1 - clip, 1 + clip) * A); Schulman et al. 2017, eq. 7.

    Args:
        logprobs_SC: under the learner's present weights, with gradient.
        behaviour_logprobs_SC: under the weights that made each token.
        advantages_S: one per sample, the same for all of its tokens.
        staleness_SC: updates between the two, int64.
        max_staleness: tokens older than this are left out; where none is left the loss is 0.

    Raises:
        ValueError: a token comes from weights newer than the learner's.
    """
    if (staleness_SC < 0).any():
        raise ValueError(f"tokens from the future: staleness down to {int(staleness_SC.min())}, must be at least 0")
    counted_SC = staleness_SC <= max_staleness
    # Left out before exp: an infinite ratio times a gradient of 0 would be NaN.
    ratio_SC = torch.exp(torch.where(counted_SC, logprobs_SC - behaviour_logprobs_SC, 0.0))
    advantages_S1 = advantages_S.unsqueeze(1)
    gain_SC = torch.minimum(ratio_SC * advantages_S1, ratio_SC.clamp(1 - clip, 1 + clip) * advantages_S1)
    counted = int(counted_SC.sum())
    return Objective(
        loss=-torch.where(counted_SC, gain_SC, 0.0).sum() / max(counted, 1),
        staleness=float(staleness_SC.double().mean()),
        masked_tokens=staleness_SC.numel() - counted,
    )
