"""What one forward pass reads and writes: the rows of a step, and the paged keys and values.

T tokens of this step (rows), S sequences, B blocks of a sequence's table, R rows whose logits are wanted, G key/value
heads.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardBatch:
    """The rows of one engine step: sequences one after the other, each with one row (decode) or a chunk of rows
    (prefill)."""

    token_ids_T: Tensor
    """int64: the tokens to run."""
    positions_T: Tensor
    """int64: the position of each token in its own sequence, from 0."""
    slots_T: Tensor
    """int64: where each token's key and value go, block id * block size + offset in the block."""
    query_lengths: tuple[int, ...]
    """Rows of each sequence in this step; they add up to T."""
    context_lengths: tuple[int, ...]
    """Keys that the last row of each sequence sees, itself included."""
    block_tables_SB: Tensor
    """int64: the block ids of each sequence in order; entries past its last block are 0 and never read."""
    logit_rows_R: Tensor
    """int64: the rows of T whose logits are wanted."""


class KvCache:
    """Keys and values of all layers in blocks of fixed size; allocated once, never moved.

    `keys[layer]` and `values[layer]` have shape [blocks, block_size, G, head_dim].
    """

    def __init__(
        self,
        *,
        layers: int,
        blocks: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (layers, blocks, block_size, kv_heads, head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.block_size = block_size

    def copy_block(self, source: int, target: int) -> None:
        """Copies one block's keys and values, in all layers."""
        self.keys[:, target] = self.keys[:, source]
        self.values[:, target] = self.values[:, source]

    def write(self, layer: int, slots_T: Tensor, keys_TGd: Tensor, values_TGd: Tensor) -> None:
        """Stores one key and one value per token at its slot of `layer`."""
        self.keys[layer].view(-1, *keys_TGd.shape[1:])[slots_T] = keys_TGd
        self.values[layer].view(-1, *values_TGd.shape[1:])[slots_T] = values_TGd
