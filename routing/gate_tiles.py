"""Which tile the gate's kernel takes for how many tokens, and how many tokens at a time: speed and memory, never a bit.

T tokens, E experts, D hidden.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

import torch

from routing.terms import GateSpec


class Arithmetic(StrEnum):
    """Whose sums a gate's product is made of."""

    HALF = "half"
    """bf16 or fp16 operands on tensor cores, one fp32 sum along D."""
    TF32 = "tf32"
    """fp32 operands rounded to TF32 (10 fraction bits, ties to even), on tensor cores, one fp32 sum along D."""
    FP32 = "fp32"
    """IEEE fp32 in chunks along D: routing.gate_reference."""
    FP64 = "fp64"
    """fp64 operands on tensor cores, one fp64 sum along D."""

    @classmethod
    def of(cls, gate: GateSpec) -> "Arithmetic":
        """That of a gate."""
        if gate.operand_dtype == torch.float32:
            return cls.TF32 if gate.tf32 else cls.FP32
        return cls.FP64 if gate.operand_dtype == torch.float64 else cls.HALF


class Walk(StrEnum):
    """How programs share the sum along D. Only FP32, whose sum is defined in chunks, has a choice."""

    WHOLE = "whole"
    """A program walks all of D for its tile."""
    CHUNKS = "chunks"
    """A program walks one chunk for its tile; another kernel adds the chunks."""
    LANES = "lanes"
    """A program computes one logit, a lane a chunk."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tile:
    """One launch shape."""

    walk: Walk = Walk.WHOLE
    tokens: int = 1
    experts: int = 1
    depth: int
    """Of D in one step; for FP32 a divisor of the chunk."""
    is_transposed: bool = False
    """FP32: the weight is first copied to [D, E] in fp32, which shared memory serves without bank conflicts."""
    warps: int
    stages: int

    def check(self, arithmetic: Arithmetic) -> None:
        """ValueError where the tile would give this arithmetic other bits, or cannot be launched for it.

        On Hopper a warp group's tensor instruction adds TF32 products in another order than one warp's does, so all
        tiles keep to the warp group's, as cuBLAS does; Triton emits it from 64 tokens, 16 experts and 4 warps on. In
        bf16, fp16 and fp64 tiles of both kinds were found equal.
        """
        faults = []
        if arithmetic is Arithmetic.TF32 and (self.tokens < 64 or self.experts < 16 or self.warps % 4 != 0):
            faults.append("64 tokens, 16 experts and a multiple of 4 warps at least, for the warp group's instruction")
        if arithmetic is not Arithmetic.FP32 and (self.walk is not Walk.WHOLE or self.is_transposed):
            faults.append("a whole walk on the weight as it is, for a sum that is not in chunks")
        if faults:
            raise ValueError(f"gate in {arithmetic}: {self}; expected {'; '.join(faults)}")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    up_to: int | None
    """Tokens; None: any number."""
    tile: Tile


TILES: Mapping[Arithmetic, tuple[_Row, ...]] = {
    Arithmetic.HALF: (
        _Row(up_to=128, tile=Tile(tokens=16, experts=8, depth=512, warps=2, stages=5)),
        _Row(up_to=512, tile=Tile(tokens=16, experts=8, depth=256, warps=1, stages=3)),
        _Row(up_to=2048, tile=Tile(tokens=64, experts=32, depth=256, warps=4, stages=3)),
        _Row(up_to=8192, tile=Tile(tokens=64, experts=64, depth=128, warps=4, stages=3)),
        _Row(up_to=32768, tile=Tile(tokens=128, experts=128, depth=64, warps=8, stages=5)),
        _Row(up_to=None, tile=Tile(tokens=128, experts=128, depth=64, warps=8, stages=3)),
    ),
    Arithmetic.TF32: (
        _Row(up_to=32, tile=Tile(tokens=64, experts=16, depth=64, warps=4, stages=3)),
        _Row(up_to=2048, tile=Tile(tokens=64, experts=16, depth=128, warps=4, stages=3)),
        _Row(up_to=8192, tile=Tile(tokens=64, experts=64, depth=64, warps=4, stages=3)),
        _Row(up_to=None, tile=Tile(tokens=128, experts=64, depth=32, warps=4, stages=3)),
    ),
    Arithmetic.FP32: (
        _Row(up_to=1, tile=Tile(walk=Walk.LANES, depth=16, warps=1, stages=4)),
        _Row(up_to=5, tile=Tile(walk=Walk.LANES, depth=16, warps=1, stages=3)),
        _Row(
            up_to=128,
            tile=Tile(walk=Walk.CHUNKS, tokens=16, experts=32, depth=64, is_transposed=True, warps=2, stages=2),
        ),
        _Row(
            up_to=2048,
            tile=Tile(walk=Walk.CHUNKS, tokens=64, experts=64, depth=32, is_transposed=True, warps=4, stages=2),
        ),
        _Row(up_to=8192, tile=Tile(tokens=32, experts=64, depth=32, is_transposed=True, warps=4, stages=3)),
        _Row(up_to=None, tile=Tile(tokens=128, experts=64, depth=16, is_transposed=True, warps=8, stages=3)),
    ),
    Arithmetic.FP64: (
        _Row(up_to=512, tile=Tile(tokens=16, experts=8, depth=128, warps=1, stages=3)),
        _Row(up_to=2048, tile=Tile(tokens=16, experts=32, depth=32, warps=2, stages=3)),
        _Row(up_to=None, tile=Tile(tokens=64, experts=32, depth=32, warps=4, stages=3)),
    ),
}
"""As scripts/tune_gate.py found them on an H200, all shapes of its list together."""


def tile_for(arithmetic: Arithmetic, T: int) -> Tile:
    """The fastest known."""
    return next(row.tile for row in TILES[arithmetic] if row.up_to is None or row.up_to >= T)


SCRATCH_BYTES = 128 * 2**20
"""At most, in one launch, of memory that grows with the number of tokens; those past it wait for the next launch."""


def tokens_at_a_time(bytes_per_token: int) -> int:
    """A multiple of 64, which keeps every launch's rows as aligned as the first one's."""
    return max(64, SCRATCH_BYTES // bytes_per_token // 64 * 64)
