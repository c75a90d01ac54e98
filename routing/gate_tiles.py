"""Which tile the gate's kernel takes for how many tokens: speed only, never a bit. T tokens, E experts, D hidden."""

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
    """fp32 operands on tensor cores, which read their first 19 bits, one fp32 sum along D."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class _Row:
    up_to: int | None
    """Tokens; None: any number."""
    tile: Tile


TILES: Mapping[Arithmetic, tuple[_Row, ...]] = {
    Arithmetic.HALF: (
        _Row(up_to=16, tile=Tile(tokens=16, experts=16, depth=256, warps=2, stages=4)),
        _Row(up_to=256, tile=Tile(tokens=64, experts=16, depth=128, warps=4, stages=4)),
        _Row(up_to=2048, tile=Tile(tokens=64, experts=32, depth=128, warps=4, stages=4)),
        _Row(up_to=None, tile=Tile(tokens=128, experts=128, depth=64, warps=8, stages=4)),
    ),
    Arithmetic.TF32: (
        _Row(up_to=16, tile=Tile(tokens=16, experts=16, depth=128, warps=2, stages=4)),
        _Row(up_to=256, tile=Tile(tokens=64, experts=16, depth=64, warps=4, stages=4)),
        _Row(up_to=2048, tile=Tile(tokens=64, experts=32, depth=64, warps=4, stages=4)),
        _Row(up_to=None, tile=Tile(tokens=128, experts=128, depth=32, warps=8, stages=3)),
    ),
    Arithmetic.FP32: (
        _Row(up_to=4, tile=Tile(walk=Walk.LANES, depth=8, warps=1, stages=16)),
        _Row(up_to=256, tile=Tile(walk=Walk.CHUNKS, tokens=32, experts=32, depth=32, warps=4, stages=4)),
        _Row(
            up_to=1024,
            tile=Tile(
                walk=Walk.CHUNKS, tokens=64, experts=64, depth=32, is_transposed=True, warps=4, stages=3
            ),
        ),
        _Row(
            up_to=None,
            tile=Tile(tokens=128, experts=128, depth=16, is_transposed=True, warps=8, stages=3),
        ),
    ),
    Arithmetic.FP64: (
        _Row(up_to=256, tile=Tile(tokens=16, experts=16, depth=64, warps=2, stages=3)),
        _Row(up_to=None, tile=Tile(tokens=64, experts=64, depth=16, warps=4, stages=3)),
    ),
}  # fmt: skip
"""As scripts/tune_gate.py found them on an H200, all shapes of its list together."""


def tile_for(arithmetic: Arithmetic, T: int) -> Tile:
    """The fastest known."""
    return next(row.tile for row in TILES[arithmetic] if row.up_to is None or row.up_to >= T)
