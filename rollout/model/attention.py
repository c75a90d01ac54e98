"""Attention over paged keys and values, in PyTorch: the CPU's engine, and the definition for faster kernels.

Spans with equally many rows run together: all decoding sequences (one row each) in one go, and prompts of one length as
well. A span is the rows of one sequence, or where its scores would grow too large, a piece of them: rows do not depend
on each other. Keys past a span's own context are never read: padding reads the span's last key, masked.

S spans of a group, Q rows of each, N keys (the longest context of the group), H heads, G key/value heads, d head
size, P slots of the cache, B blocks of a table, T tokens of the step.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rollout.model.batch import ForwardBatch, KvCache

MAX_GROUP_PAIRS = 1 << 20  # row-key pairs of one group: bounds the scores, which have H of them (one row is the least)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Span:
    """Consecutive rows of one sequence."""

    sequence: int
    start: int
    """The first row, of the step."""
    rows: int
    context: int
    """Keys that the last row sees."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionGroup:
    """Spans with equally many rows, and where their rows and keys are; the same for all layers."""

    rows_SQ: Tensor | None
    """int64: rows of the step; None where they are all of the step's rows in order."""
    slots_SN: Tensor
    """int64: cache slots of the keys, those past a span's context replaced by its last one."""
    hidden_S1QN: Tensor | None
    """True where a row may not see a key; None where every row sees every key."""
    spans: int
    queries: int


def plan_attention(batch: ForwardBatch, block_size: int) -> tuple[AttentionGroup, ...]:
    """Which rows attend to which cache slots in this step.

    Args:
        batch: the step.
        block_size: of the KV cache, in tokens.
    """
    by_length: dict[int, list[list[_Span]]] = defaultdict(list)
    for span in _spans(batch):
        groups = by_length[span.rows]
        if groups:
            longest = max(other.context for other in (*groups[-1], span))
        if not groups or (len(groups[-1]) + 1) * span.rows * longest > MAX_GROUP_PAIRS:
            groups.append([])
        groups[-1].append(span)
    return tuple(_group(batch, spans, block_size) for groups in by_length.values() for spans in groups)


def _spans(batch: ForwardBatch) -> Iterator[_Span]:
    """The rows of the step in order, every sequence's in as many even pieces as its scores need."""
    start = 0
    for sequence, (rows, context) in enumerate(zip(batch.query_lengths, batch.context_lengths, strict=True)):
        pieces = -(-rows // max(1, MAX_GROUP_PAIRS // context))
        bounds = [rows * piece // pieces for piece in range(pieces + 1)]
        for first, last in pairwise(bounds):
            yield _Span(sequence=sequence, start=start + first, rows=last - first, context=context - rows + last)
        start += rows


def _group(batch: ForwardBatch, spans: list[_Span], block_size: int) -> AttentionGroup:
    device = batch.token_ids_T.device
    queries = spans[0].rows
    contexts = [span.context for span in spans]
    longest = max(contexts)
    keys_N = torch.arange(longest, device=device)
    last_S1 = torch.tensor(contexts, device=device)[:, None] - 1
    read_SN = torch.minimum(keys_N, last_S1)
    sequences = [span.sequence for span in spans]
    everything = len(spans) * queries == sum(batch.query_lengths)
    in_order = sequences == list(range(len(batch.query_lengths)))
    tables_SB = batch.block_tables_SB if in_order else batch.block_tables_SB[sequences]
    slots_SN = tables_SB.gather(1, read_SN // block_size) * block_size + read_SN % block_size
    hidden_S1QN = None
    if queries > 1 or min(contexts) < longest:
        positions_SQ = last_S1 + torch.arange(1 - queries, 1, device=device)
        hidden_S1QN = (keys_N > positions_SQ[:, :, None])[:, None]
    rows_SQ = None
    if not everything:
        starts_S1 = torch.tensor([span.start for span in spans], device=device)[:, None]
        rows_SQ = starts_S1 + torch.arange(queries, device=device)
    return AttentionGroup(
        rows_SQ=rows_SQ, slots_SN=slots_SN, hidden_S1QN=hidden_S1QN, spans=len(spans), queries=queries
    )


def attend(queries_THd: Tensor, kv: KvCache, layer: int, groups: tuple[AttentionGroup, ...]) -> Tensor:
    """softmax(q k / sqrt(d)) v for every row of the step; keys and values of this step are in the cache already.

    Products in the queries' dtype, softmax in fp32 (transformers' eager attention).

    Returns:
        [T, H, d].
    """
    keys_PGd = kv.keys[layer].flatten(0, 1)
    values_PGd = kv.values[layer].flatten(0, 1)
    if len(groups) == 1 and groups[0].rows_SQ is None:
        return _attend(queries_THd, keys_PGd, values_PGd, groups[0])
    out_THd = torch.empty_like(queries_THd)
    for group in groups:
        assert group.rows_SQ is not None
        rows = group.rows_SQ.flatten()
        out_THd[rows] = _attend(queries_THd[rows], keys_PGd, values_PGd, group)
    return out_THd


def _attend(queries_THd: Tensor, keys_PGd: Tensor, values_PGd: Tensor, group: AttentionGroup) -> Tensor:
    _, heads, head_dim = queries_THd.shape
    kv_heads = keys_PGd.shape[1]
    shape = (group.spans, group.queries, heads, head_dim)
    per_kv = (
        group.spans,
        kv_heads,
        heads // kv_heads * group.queries,
        -1,
    )  # query heads of one key head, as its rows
    queries_SHQd = queries_THd.view(shape).transpose(1, 2)
    keys_SGdN = keys_PGd[group.slots_SN].permute(0, 2, 3, 1)
    values_SGNd = values_PGd[group.slots_SN].transpose(1, 2)
    scores = torch.matmul(queries_SHQd.reshape(per_kv), keys_SGdN) * head_dim**-0.5
    if group.hidden_S1QN is not None:
        scores = scores.view(group.spans, heads, group.queries, -1).masked_fill(group.hidden_S1QN, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(queries_THd.dtype)
    out_SHQd = torch.matmul(weights.view(per_kv), values_SGNd).view(group.spans, heads, group.queries, head_dim)
    return out_SHQd.transpose(1, 2).reshape(queries_THd.shape)
