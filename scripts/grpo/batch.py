"""What the trainer hands the learner for one update: completions as arrays, versions as counts of updates.

S samples (prompt after prompt), P prompt tokens, C completion tokens, N = P + C - 1 positions with keys and values,
L MoE layers, K experts of a token. Knows nothing of the rollout, so that the learner need not either.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """All samples of one update; all prompts have one length, and so have all completions."""

    prompt_tokens: int
    """P"""
    samples: int
    """Samples per prompt: the group that advantages are normalised over."""
    token_ids_SM: NDArray[np.int64]
    """M = P + C: prompt and completion."""
    rewards_S: NDArray[np.float32]
    logprobs_SC: NDArray[np.float32]
    """Under the distribution that each token was sampled from."""
    model_logprobs_SC: NDArray[np.float32]
    """Under the hosted model's own distribution."""
    updates_SC: NDArray[np.int64]
    """How many updates the weights had seen that made each token."""
    kv_updates_SN: NDArray[np.int64]
    """The same for each position's keys and values, the prompt's included."""
    expert_ids_SNLK: NDArray[np.unsignedinteger]
