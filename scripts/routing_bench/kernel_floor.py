"""What no router can go below: a node of a graph that does nothing, and one that only moves the router's bytes."""

import triton
import triton.language as tl
from torch import Tensor

SHAPES = ((4, 1), (8, 1), (8, 4), (16, 4), (32, 4), (32, 8), (64, 8))
"""Rows of a program, and its warps."""


@triton.jit
def _empty_kernel(anything_ptr):
    pass


@triton.jit
def _moving_kernel(logits_ptr, ids_ptr, weights_ptr, E: tl.constexpr, E_P: tl.constexpr, K: tl.constexpr,
                   ROWS: tl.constexpr):  # fmt: skip
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    expert, slot = tl.arange(0, E_P)[None, :], tl.arange(0, K)[None, :]
    largest = tl.max(tl.load(logits_ptr + row * E + expert, mask=expert < E, other=0.0), axis=1)
    answer = tl.broadcast_to(largest[:, None], [ROWS, K])
    tl.store(weights_ptr + row * K + slot, answer)
    tl.store(ids_ptr + row * K + slot, answer.to(tl.int32, bitcast=True))


def do_nothing(anything: Tensor) -> None:
    """One launch."""
    _empty_kernel[(1,)](anything, num_warps=1)


def move_bytes(logits_TE: Tensor, ids_TK: Tensor, weights_TK: Tensor, shape: tuple[int, int]) -> None:
    """Reads fp32 logits [T, E] once; writes int32 [T, K] and fp32 [T, K] once. T is a multiple of the shape's rows, K a
    power of two."""
    (T, E), (rows, warps) = logits_TE.shape, shape
    assert T % rows == 0, (T, rows)
    _moving_kernel[(T // rows,)](
        logits_TE, ids_TK, weights_TK, E=E, E_P=triton.next_power_of_2(E), K=ids_TK.shape[1], ROWS=rows,
        num_warps=warps,
    )  # fmt: skip


def least_bytes(T: int, E: int, K: int) -> int:
    """Of fp32 logits in, ids and weights out."""
    return 4 * T * (E + 2 * K)
