"""From logits to one token per row, with its log-probabilities.

A token is the argmax of (logits / temperature + Gumbel noise) over what top-k and top-p keep, which draws from their
softmax;
greedy takes the lowest id among the largest logits. Rows never look at each other. R rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rollout.engine.logprobs import chosen_logprobs
from rollout.engine.noise import gumbel
from rollout.request import SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRow:
    """One row's outcome; None where its logits cannot be sampled from (NaN, +inf, or nothing finite)."""

    token_id: int
    logprob: float
    model_logprob: float
    kept: NDArray[np.int32] | None = None
    """The ids that top-k and top-p kept, ascending; None unless asked for."""


def sample(
    logits_RV: Tensor, params_R: Sequence[SamplingParams], seeds_R: Sequence[int], positions_R: Sequence[int]
) -> list[SampledRow | None]:
    """Samples one token per row.

    Args:
        logits_RV: fp32.
        params_R: the sampling parameters of each row.
        seeds_R: the seed of each row's sample (`noise.sample_seed`).
        positions_R: the position in its sequence that each sampled token will have.
    """
    device = logits_RV.device
    greedy_R = torch.tensor([params.temperature == 0 for params in params_R], device=device)
    temperature_R = torch.tensor([params.temperature or 1.0 for params in params_R], dtype=torch.float32, device=device)
    scaled_RV = logits_RV / temperature_R[:, None]
    if any(params.top_k is not None or params.top_p < 1 for params in params_R):
        scaled_RV = scaled_RV.masked_fill(~kept(scaled_RV, params_R), -torch.inf)
    noisy_RV = scaled_RV
    if not all(params.temperature == 0 for params in params_R):
        noise_RV = gumbel(seeds_R, positions_R, logits_RV.shape[1], device)
        noisy_RV = torch.where(greedy_R[:, None], logits_RV, scaled_RV + noise_RV)
    token_R = lowest_argmax(noisy_RV)
    logprob_R = torch.where(greedy_R, 0.0, chosen_logprobs(scaled_RV, token_R))
    columns = torch.stack((logprob_R, chosen_logprobs(logits_RV, token_R), logits_RV.amax(dim=1))).tolist()
    return [
        SampledRow(
            token_id=token,
            logprob=logprob,
            model_logprob=model_logprob,
            kept=_ids(scaled_V > -torch.inf) if params.return_kept else None,
        )
        if abs(largest) < torch.inf
        else None
        for token, logprob, model_logprob, largest, params, scaled_V in zip(
            token_R.tolist(), *columns, params_R, scaled_RV, strict=True
        )
    ]


def kept(scaled_RV: Tensor, params_R: Sequence[SamplingParams]) -> Tensor:
    """Which tokens top-k and then top-p keep, bool [R, V].

    Top-k keeps every token that ties with the k-th. Top-p goes down the tokens in order of probability, lowest id
    first among
    equals, and keeps each whose predecessors have not yet reached top_p; the likeliest is always kept.
    """
    vocab_size = scaled_RV.shape[1]
    k_R = torch.tensor([min(params.top_k or vocab_size, vocab_size) for params in params_R], device=scaled_RV.device)
    p_R = torch.tensor([params.top_p for params in params_R], dtype=torch.float32, device=scaled_RV.device)
    sorted_RV, order_RV = torch.sort(scaled_RV, dim=1, descending=True, stable=True)
    kth_R1 = sorted_RV.gather(1, k_R[:, None] - 1)
    sorted_RV = sorted_RV.masked_fill(sorted_RV < kth_R1, -torch.inf)
    probability_RV = torch.softmax(sorted_RV, dim=1)
    before_RV = probability_RV.cumsum(dim=1) - probability_RV
    keep_sorted_RV = ((before_RV < p_R[:, None]) | (p_R[:, None] >= 1)) & (sorted_RV > -torch.inf)
    keep_sorted_RV[:, 0] = True
    return torch.zeros_like(keep_sorted_RV).scatter_(1, order_RV, keep_sorted_RV)


def lowest_argmax(values_RV: Tensor) -> Tensor:
    """int64 [R]: the lowest column that holds the row's maximum (torch.argmax promises no order among equals); 0 for
    a row of NaN."""
    vocab_size = values_RV.shape[1]
    column_V = torch.arange(vocab_size, device=values_RV.device)
    is_largest_RV = values_RV == values_RV.amax(dim=1, keepdim=True)
    return torch.where(is_largest_RV, column_V, vocab_size).amin(dim=1) % vocab_size


def _ids(chosen_V: Tensor) -> NDArray[np.int32]:
    """The indices that are true, ascending."""
    return chosen_V.nonzero()[:, 0].to(torch.int32).cpu().numpy()
