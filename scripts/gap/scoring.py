"""The learner's odds for tokens that the engine sampled, with its own routing and with the engine's.

B rows of a batch, N positions that are fed, C sampled tokens of each, V vocabulary.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rollout import Completion
from routing import Replay, ReplayReport, RoutingRecord, observe, padded_record, replay

ROWS = 8
"""Of a batch: the log-probabilities over the vocabulary are what takes memory."""


class Routing(StrEnum):
    """Whose experts, and whose combine weights, the learner uses."""

    OWN = "own"
    IDS = "ids replayed"
    IDS_AND_WEIGHTS = "ids and weights replayed"

    def block(self, model: PreTrainedModel, record: RoutingRecord) -> AbstractContextManager[Replay]:
        """Around a forward."""
        weights = "recorded" if self is Routing.IDS_AND_WEIGHTS else "own"
        open_block = observe if self is Routing.OWN else partial(replay, weights=weights)
        return open_block(model, record)


def gap(model: PreTrainedModel, completions: Sequence[Completion], routing: Routing) -> dict[str, Any]:
    """How far the learner's log-probabilities are from those that the engine gave, and how their routing differs."""
    diffs: list[Tensor] = []
    reports: list[ReplayReport] = []
    for first in range(0, len(completions), ROWS):
        batch = completions[first : first + ROWS]
        logprobs_BC, report = scored(model, batch, routing)
        theirs_BC = torch.tensor([c.model_logprobs for c in batch], dtype=torch.float64)
        diffs.append((logprobs_BC.double().cpu() - theirs_BC).flatten())
        reports.append(report)
    return {**log_probability_figures(torch.cat(diffs)), **routing_figures(reports)}


@torch.no_grad()
def scored(model: PreTrainedModel, completions: Sequence[Completion], routing: Routing) -> tuple[Tensor, ReplayReport]:
    """Log-probabilities [B, C] of the sampled tokens."""
    tokens = torch.tensor([(*c.prompt_token_ids, *c.token_ids) for c in completions], device=model.device)
    fed_BN = tokens[:, :-1]
    record = padded_record(completions, fed_BN)
    with routing.block(model, record) as replaying:
        logits_BNV = model(input_ids=fed_BN, use_cache=False).logits
    start = len(completions[0].prompt_token_ids) - 1
    logprobs_BCV = logits_BNV[:, start:].float().log_softmax(dim=-1)
    return logprobs_BCV.gather(2, tokens[:, start + 1 :, None])[..., 0], replaying.report()


def log_probability_figures(diffs: Tensor) -> dict[str, Any]:
    """Of learner minus engine, per sampled token."""
    if not diffs.isfinite().all():
        raise ValueError(f"{int((~diffs.isfinite()).sum())} of {diffs.numel()} differences are not finite")
    sizes = diffs.abs()
    return {
        "tokens": diffs.numel(),
        "logprob_abs_diff_mean": float(sizes.mean()),
        "logprob_abs_diff_p99": float(sizes.quantile(0.99)),
        "logprob_abs_diff_max": float(sizes.max()),
        "kl_estimate": float((diffs.exp() - 1 - diffs).mean()),
    }


def routing_figures(reports: Sequence[ReplayReport]) -> dict[str, Any]:
    """Of all batches together; what the learner would decide by itself, given the hidden states that it has."""
    positions, decisions = sum(r.positions for r in reports), sum(r.decisions for r in reports)
    weights = [r.weight_abs_diff_max for r in reports if r.weight_abs_diff_max is not None]
    return {
        "positions": positions,
        "decisions": decisions,
        "own_decisions_differing_share": sum(r.differing for r in reports) / decisions,
        "own_positions_differing_share": sum(r.positions_differing for r in reports) / positions,
        "weight_abs_diff_max": max(weights) if weights else None,
    }
