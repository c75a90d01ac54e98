# mypy: ignore-errors
"""Asks the bounds what they make of single logits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing.kernel import INTERPRETED, LAUNCH_OPTIONS, quietly
from routing.kernel_bound import _approximate_score, _raised, _score

BLOCK = 1 << 18 if INTERPRETED else 1024


@triton.jit
def _score_kernel(
    x_ptr, approximate_ptr, exact_ptr, raised_ptr, N, SCORE: tl.constexpr, LIBDEVICE: tl.constexpr, BLOCK: tl.constexpr
):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < N, other=0.0)[None, :]
    peak, total = tl.zeros([1, 1], tl.float32), tl.full([1, 1], 1.0, tl.float32)
    exact = _score(x, peak, total, SCORE, LIBDEVICE)
    approximate = tl.reshape(_approximate_score(x, peak, total, SCORE, LIBDEVICE), [BLOCK])
    tl.store(approximate_ptr + place, approximate, mask=place < N)
    tl.store(exact_ptr + place, tl.reshape(exact, [BLOCK]), mask=place < N)
    tl.store(raised_ptr + place, tl.reshape(_raised(exact, SCORE), [BLOCK]), mask=place < N)


def score_bounds(x: Tensor, score: str) -> tuple[Tensor, Tensor, Tensor]:
    """Of fp32 logits [N]: the approximate score, the score, and the bound on the scores of smaller logits.

    A softmax's maximum is 0 and its total 1.
    """
    approximate, exact, raised = (torch.empty_like(x) for _ in range(3))
    with quietly():
        _score_kernel[(triton.cdiv(len(x), BLOCK),)](
            x, approximate, exact, raised, len(x), SCORE=score, LIBDEVICE=not INTERPRETED, BLOCK=BLOCK, **LAUNCH_OPTIONS
        )
    return approximate, exact, raised
