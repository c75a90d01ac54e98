# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The functions of one number that the kernels are made of, by themselves, so that they can be compared with PyTorch's.

Needs a GPU: libdevice does not run under Triton's interpreter. N numbers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

OPERATIONS = ("exp", "sigmoid", "log1p", "sqrt of softplus", "sqrt", "division")
"""In the order of the rows that `elementwise` returns."""
BLOCK = 1024


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    is_in = i < N
    x = tl.load(x_ptr + i, mask=is_in, other=0.0)
    y = tl.load(y_ptr + i, mask=is_in, other=1.0)
    exp = libdevice.exp(x)
    softplus = tl.where(x > 20.0, x, libdevice.log1p(exp))
    tl.store(out_ptr + i, exp, mask=is_in)
    tl.store(out_ptr + N + i, tl.math.div_rn(tl.full([BLOCK], 1.0, tl.float32), 1.0 + libdevice.exp(-x)), mask=is_in)
    tl.store(out_ptr + 2 * N + i, libdevice.log1p(x), mask=is_in)
    tl.store(out_ptr + 3 * N + i, tl.math.sqrt_rn(softplus), mask=is_in)
    tl.store(out_ptr + 4 * N + i, tl.math.sqrt_rn(x), mask=is_in)
    tl.store(out_ptr + 5 * N + i, tl.math.div_rn(x, y), mask=is_in)


def elementwise(x_N: Tensor, y_N: Tensor) -> Tensor:
    """[6, N] fp32: every one of OPERATIONS on x, the division by y. Both fp32, contiguous, on a GPU."""
    out = torch.empty(len(OPERATIONS), len(x_N), device=x_N.device)
    with torch.cuda.device(x_N.device):
        _elementwise_kernel[(triton.cdiv(len(x_N), BLOCK),)](
            x_N, y_N, out, len(x_N), BLOCK=BLOCK, enable_fp_fusion=False, enable_reflect_ftz=False
        )
    return out
