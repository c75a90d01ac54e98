"""Recomputes a completion's log-probabilities, each key and value rebuilt with the version that wrote it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from rollout.model.batch import ForwardBatch
from rollout.model.decoder import Decoder
from rollout.model.hosted import HostedModel
from rollout.request import Completion
from weights.version import WeightVersion


def load(model: HostedModel, wire: Mapping[str, Tensor]) -> None:
    """Overwrites a hosted model, in place, with tensors under wire names."""
    for name, block in model.layout.state_dict(model.parameters):
        block.copy_(wire[name])


@torch.inference_mode()
def replayed_logprobs(
    completion: Completion, model: HostedModel, weights: Mapping[WeightVersion, Mapping[str, Tensor]]
) -> list[float]:
    """Log-probabilities (temperature 1) of the sampled tokens.

    Args:
        model: scratch; its parameters are overwritten.
        weights: the wire tensors of every version that the completion names.
    """
    tokens = [*completion.prompt_token_ids, *completion.token_ids]
    prompt_length, length = len(completion.prompt_token_ids), len(tokens) - 1
    assert completion.kv_version_spans[0].start == 0
    assert completion.kv_version_spans[-1].stop == length
    kv = model.kv_cache(blocks=1, block_size=len(tokens))
    decoder = Decoder(model.spec, model.parameters)
    logprobs: list[float] = []
    for before, span in zip((None, *completion.kv_version_spans), completion.kv_version_spans, strict=False):
        assert before is None or before.stop == span.start, "a position has no version, or two"
        load(model, weights[span.version])
        positions = torch.arange(span.start, span.stop)
        predicts = [p for p in positions.tolist() if p + 1 >= prompt_length]
        batch = ForwardBatch(
            token_ids_T=torch.tensor(tokens[span.start : span.stop]),
            positions_T=positions,
            slots_T=positions,
            query_lengths=(span.stop - span.start,),
            context_lengths=(span.stop,),
            block_tables_SB=torch.zeros((1, 1), dtype=torch.int64),
            logit_rows_R=torch.tensor(predicts, dtype=torch.int64) - span.start,
        )
        logits_RV = decoder.forward(batch, kv, record_routing=False).logits_RV
        targets = torch.tensor([tokens[p + 1] for p in predicts], dtype=torch.int64)
        logprobs += torch.log_softmax(logits_RV, dim=1).gather(1, targets[:, None])[:, 0].tolist()
    return logprobs


def versions_by_position(completion: Completion) -> tuple[list[WeightVersion], list[WeightVersion]]:
    """The version of every sampled token, and of every position's keys and values."""
    tokens = [span.version for span in completion.version_spans for _ in range(span.start, span.stop)]
    keys = [span.version for span in completion.kv_version_spans for _ in range(span.start, span.stop)]
    return tokens, keys
