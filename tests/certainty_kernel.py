# mypy: ignore-errors
"""Asks the bounds alone which rows they decide."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing import RouterSpec
from routing.kernel import LAUNCH_OPTIONS, kernel_constants, launch_shape, quietly
from routing.kernel_bound import bounded_rows


@triton.jit
def _certain_kernel(
    values_ptr, bias_ptr, certain_ptr, T, stride_t, E: tl.constexpr, BLOCK_T: tl.constexpr, C: tl.constexpr,
    LOG_C: tl.constexpr, J: tl.constexpr, DEPTH: tl.constexpr, E_P: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr,
    SCORE: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr,
    KEPT: tl.constexpr, TOP: tl.constexpr, MASK_VALUE: tl.constexpr, ORDERED: tl.constexpr, HAS_SPARE: tl.constexpr,
    LIBDEVICE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    _ids, _scores, certain = bounded_rows(
        values_ptr, bias_ptr, row, stride_t, 1, row < T, E, BLOCK_T, C, LOG_C, J, DEPTH, E_P - 1, K, K_P, SCORE, SORTED,
        HAS_BIAS, COUNT, COUNT_P, KEPT, TOP, MASK_VALUE, ORDERED, HAS_SPARE, LIBDEVICE,
    )  # fmt: skip
    tl.store(certain_ptr + row, certain.to(tl.int32), mask=row < T)


def certain_rows(logits_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None) -> Tensor:
    """[T] bool: rows that the bounds decide; the others go to the definition."""
    T = len(logits_TE)
    constants = kernel_constants(spec, score=str(spec.score), is_raw=False)
    shape = launch_shape(T, spec, dtype=logits_TE.dtype)
    found = torch.full((T,), -1, dtype=torch.int32, device=logits_TE.device)
    names = set(_certain_kernel.arg_names)
    with quietly():
        _certain_kernel[(triton.cdiv(T, shape["BLOCK_T"]),)](
            logits_TE, bias_E, found, T, logits_TE.stride(0), num_warps=shape["num_warps"], **LAUNCH_OPTIONS,
            **{name: value for name, value in {**constants, **shape}.items() if name in names},
        )  # fmt: skip
    assert set(found.tolist()) <= {0, 1}
    return found.bool()
