# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""What a Form does to an element, on bits: 16 wire bits to a float32 and back, as the kernels need it.

Everything is int32: a float32 as its bits, wire bits in the lower half.
"""

import triton
import triton.language as tl

from weights.spans import Form

_BFLOAT16_IN_FLOAT32 = tl.constexpr(Form.BFLOAT16_IN_FLOAT32.value)


@triton.jit
def widened(wire, FORM: tl.constexpr):
    """The float32 of 16 wire bits. A bfloat16 is its upper half, so that NaNs keep their payloads; float16 as Tensor.to
    on CUDA."""
    if FORM == _BFLOAT16_IN_FLOAT32:
        held = wire << 16
    else:
        held = wire.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32).to(tl.int32, bitcast=True)
    return held


@triton.jit
def rounded(held, FORM: tl.constexpr):
    """The 16 wire bits nearest to a float32, ties to even, as Tensor.to on CUDA, where every NaN becomes 0x7FFF."""
    magnitude = held & 0x7FFFFFFF
    if FORM == _BFLOAT16_IN_FLOAT32:
        nearest = (held + 0x7FFF + ((held >> 16) & 1)) >> 16
        wire = tl.where(magnitude > 0x7F800000, 0x7FFF, nearest & 0xFFFF)
    else:
        # From 65520 on it is infinity; said here, since the interpreter's conversion warns of it.
        is_too_large = (magnitude >= 0x477FF000) & (magnitude < 0x7F800000)
        capped = tl.where(is_too_large, (held & ~0x7FFFFFFF) | 0x7F800000, held)
        wire = capped.to(tl.float32, bitcast=True).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return wire


@triton.jit
def narrowed(held, FORM: tl.constexpr):
    """(wire bits of a widened element, 1 where it is no widening of any): the inverse of `widened`."""
    if FORM == _BFLOAT16_IN_FLOAT32:
        wire = (held >> 16) & 0xFFFF
    else:
        wire = rounded(held, FORM)
    return wire, (widened(wire, FORM) != held).to(tl.int32)
