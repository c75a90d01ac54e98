"""Recomputes a completion's log-probabilities, each key and value rebuilt with the version that wrote it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from rollout.model.batch import ForwardBatch
from rollout.model.decoder import Decoder, ForwardOutput
from rollout.model.hosted import HostedModel
from rollout.request import Completion, VersionSpan
from weights.version import WeightVersion

Weights = Mapping[WeightVersion, Mapping[str, Tensor]]


def load(model: HostedModel, wire: Mapping[str, Tensor]) -> None:
    """Overwrites a hosted model, in place, with tensors under wire names."""
    for name, block in model.layout.state_dict(model.parameters):
        block.copy_(wire[name])


NEAR_TIE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Segment:
    """Sampled tokens that were made with the same keys and values, recomputed."""

    logprobs: list[float]
    expert_ids_TLK: Tensor | None
    expert_weights_TLK: Tensor | None


def agreement(completion: Completion, model: HostedModel, weights: Weights) -> tuple[list[float], int]:
    """How far each sampled token's log-probability is from its replay, and how many tokens cannot be compared.

    A replay runs the tokens in other batches, so its sums differ in the last bits, and where two experts tie for the
    last slot it may choose the other one. Such a row has other experts with the same combine weights; from it on a
    completion that recorded its routing is not compared. Other experts with other weights are compared, and fail.
    """
    apart: list[float] = []
    skipped = 0
    stop = len(completion.token_ids)
    first = completion.discarded_kv[-1].stop if completion.discarded_kv else 0
    parts = [
        (kv.kv_version_spans, kv.start, kv.stop, kv.expert_ids, kv.expert_weights) for kv in completion.discarded_kv
    ]
    parts.append((completion.kv_version_spans, first, stop, completion.expert_ids, completion.expert_weights))
    for spans, start, end, ids, mixed in parts:
        segment = replayed(completion, spans, start, end, model, weights)
        row = len(completion.prompt_token_ids) - 1 + start
        alike = _rows_alike(segment, ids, mixed) - row
        found = completion.model_logprobs[start:end]
        kept = min(max(alike, 0), end - start)
        apart += [abs(a - b) for a, b in zip(found[:kept], segment.logprobs[:kept], strict=True)]
        skipped += end - start - kept
    return apart, skipped


def _rows_alike(segment: Segment, ids: Any, mixed: Any) -> int:
    """Rows before the first one where a tie went the other way; very many where none did."""
    if ids is None or segment.expert_ids_TLK is None or segment.expert_weights_TLK is None:
        return 1 << 30
    rows = len(segment.expert_ids_TLK)
    ours_TLK, theirs_TLK = torch.from_numpy(ids[:rows]).long(), segment.expert_ids_TLK.long()
    other_TL = (ours_TLK.sort(-1).values != theirs_TLK.sort(-1).values).any(-1)
    if not other_TL.any():
        return 1 << 30
    first = int(other_TL.any(1).nonzero()[0])
    layer = int(other_TL[first].nonzero()[0])
    ours_K = torch.from_numpy(mixed[first, layer]).sort().values
    theirs_K = segment.expert_weights_TLK[first, layer].float().sort().values
    return first if (ours_K - theirs_K).abs().max() < NEAR_TIE else 1 << 30


def replayed_logprobs(completion: Completion, model: HostedModel, weights: Weights) -> list[float]:
    """Log-probabilities (temperature 1) of the sampled tokens.

    Tokens that were made with keys and values that were thrown away later are replayed with those.

    Args:
        model: scratch; its parameters are overwritten.
        weights: the wire tensors of every version that the completion names.
    """
    logprobs: list[float] = []
    for lost in completion.discarded_kv:
        assert lost.start == len(logprobs)
        logprobs += replayed(completion, lost.kv_version_spans, lost.start, lost.stop, model, weights).logprobs
    stop = len(completion.token_ids)
    return logprobs + replayed(completion, completion.kv_version_spans, len(logprobs), stop, model, weights).logprobs


@torch.inference_mode()
def replayed(
    completion: Completion, kv: Sequence[VersionSpan], start: int, stop: int, model: HostedModel, weights: Weights
) -> Segment:
    """Log-probabilities of sampled tokens [start, stop), which were made with keys and values of these spans."""
    if start == stop:
        return Segment(logprobs=[], expert_ids_TLK=None, expert_weights_TLK=None)
    tokens = [*completion.prompt_token_ids, *completion.token_ids]
    first = len(completion.prompt_token_ids) + start - 1  # the row that the first of these tokens was drawn from
    length = len(completion.prompt_token_ids) + stop - 1
    assert kv[0].start == 0
    assert kv[-1].stop == length
    assert all(before.stop == after.start for before, after in pairwise(kv))
    cache = model.kv_cache(blocks=1, block_size=len(tokens))
    decoder = Decoder(model.spec, model.parameters)
    logprobs: list[float] = []
    outputs: list[ForwardOutput] = []
    for span in kv:
        load(model, weights[span.version])
        positions = torch.arange(span.start, span.stop)
        predicts = [p for p in positions.tolist() if p >= first]
        batch = ForwardBatch(
            token_ids_T=torch.tensor(tokens[span.start : span.stop]),
            positions_T=positions,
            slots_T=positions,
            query_lengths=(span.stop - span.start,),
            context_lengths=(span.stop,),
            block_tables_SB=torch.zeros((1, 1), dtype=torch.int64),
            logit_rows_R=torch.tensor(predicts, dtype=torch.int64) - span.start,
        )
        outputs.append(decoder.forward(batch, cache, record_routing=True))
        logits_RV = outputs[-1].logits_RV
        targets = torch.tensor([tokens[p + 1] for p in predicts], dtype=torch.int64)
        logprobs += torch.log_softmax(logits_RV, dim=1).gather(1, targets[:, None])[:, 0].tolist()
    ids = [output.expert_ids_TLK for output in outputs if output.expert_ids_TLK is not None]
    mixed = [output.expert_weights_TLK for output in outputs if output.expert_weights_TLK is not None]
    return Segment(
        logprobs=logprobs,
        expert_ids_TLK=torch.cat(ids) if ids else None,
        expert_weights_TLK=torch.cat(mixed) if mixed else None,
    )


def versions_by_position(completion: Completion) -> tuple[list[WeightVersion], list[WeightVersion]]:
    """The version of every sampled token, and of every position's keys and values."""
    tokens = [span.version for span in completion.version_spans for _ in range(span.start, span.stop)]
    keys = [span.version for span in completion.kv_version_spans for _ in range(span.start, span.stop)]
    return tokens, keys
