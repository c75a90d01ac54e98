"""Recomputes a completion's log-probabilities, each key and value rebuilt with the version that wrote it."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from rollout.model.batch import ForwardBatch
from rollout.model.decoder import Decoder
from rollout.model.hosted import HostedModel
from rollout.request import Completion, VersionSpan
from weights.version import WeightVersion

Weights = Mapping[WeightVersion, Mapping[str, Tensor]]


def load(model: HostedModel, wire: Mapping[str, Tensor]) -> None:
    """Overwrites a hosted model, in place, with tensors under wire names."""
    for name, block in model.layout.state_dict(model.parameters):
        block.copy_(wire[name])


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
        logprobs += replayed(completion, lost.kv_version_spans, lost.start, lost.stop, model, weights)
    stop = len(completion.token_ids)
    return logprobs + replayed(completion, completion.kv_version_spans, len(logprobs), stop, model, weights)


@torch.inference_mode()
def replayed(
    completion: Completion, kv: Sequence[VersionSpan], start: int, stop: int, model: HostedModel, weights: Weights
) -> list[float]:
    """Log-probabilities of sampled tokens [start, stop), which were made with keys and values of these spans."""
    if start == stop:
        return []
    tokens = [*completion.prompt_token_ids, *completion.token_ids]
    first = len(completion.prompt_token_ids) + start - 1  # the row that the first of these tokens was drawn from
    length = len(completion.prompt_token_ids) + stop - 1
    assert kv[0].start == 0
    assert kv[-1].stop == length
    assert all(before.stop == after.start for before, after in pairwise(kv))
    cache = model.kv_cache(blocks=1, block_size=len(tokens))
    decoder = Decoder(model.spec, model.parameters)
    logprobs: list[float] = []
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
        logits_RV = decoder.forward(batch, cache, record_routing=False).logits_RV
        targets = torch.tensor([tokens[p + 1] for p in predicts], dtype=torch.int64)
        logprobs += torch.log_softmax(logits_RV, dim=1).gather(1, targets[:, None])[:, 0].tolist()
    return logprobs


def versions_by_position(completion: Completion) -> tuple[list[WeightVersion], list[WeightVersion]]:
    """The version of every sampled token, and of every position's keys and values."""
    tokens = [span.version for span in completion.version_spans for _ in range(span.start, span.stop)]
    keys = [span.version for span in completion.kv_version_spans for _ in range(span.start, span.stop)]
    return tokens, keys
