"""Bits of floating-point tensors, compared."""

import torch
from torch import Tensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def differs(found: Tensor, expected: Tensor) -> Tensor:
    """bool, elementwise: other bits, where +0.0 is not -0.0 and every NaN is one. Another dtype differs everywhere."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if found.dtype != expected.dtype:
        return torch.ones_like(found, dtype=torch.bool)
    integers = _INTEGERS[found.element_size()]
    are_other = found.contiguous().view(integers) != expected.contiguous().view(integers)
    return are_other & ~(found.isnan() & expected.isnan())


def rows_differ(found: Tensor, expected: Tensor) -> Tensor:
    """bool [T]: whether anything in a row differs, of floats by their bits, of integers by value."""
    if found.is_floating_point():
        return differs(found, expected).any(dim=1)
    return (found != expected).any(dim=1)
