"""SplitMix64's finaliser, a bijection of 64 bits, on Python integers and on int64 tensors that hold their patterns.

Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014. Digests mix with it, and so does
whoever needs random numbers as a function of a counter.
"""

from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, odd: the generator's step from one counter to the next."""

_MASK = (1 << 64) - 1
FIRST_FACTOR = 0xBF58476D1CE4E5B9
SECOND_FACTOR = 0x94D049BB133111EB
"""The odd factors of the finaliser."""


def mix(value: int) -> int:
    """The finaliser of an integer mod 2^64."""
    value &= _MASK
    value = ((value ^ (value >> 30)) * FIRST_FACTOR) & _MASK
    value = ((value ^ (value >> 27)) * SECOND_FACTOR) & _MASK
    return value ^ (value >> 31)


def mix_tensor(values: Tensor) -> Tensor:
    """The finaliser of every element of an int64 tensor."""
    values = (values ^ logical_shift(values, 30)) * signed(FIRST_FACTOR)
    values = (values ^ logical_shift(values, 27)) * signed(SECOND_FACTOR)
    return values ^ logical_shift(values, 31)


def logical_shift(values: Tensor, by: int) -> Tensor:
    """int64 shifted right as if unsigned; torch's own shift copies the sign."""
    return (values >> by) & ((1 << (64 - by)) - 1)


def signed(value: int) -> int:
    """A 64-bit pattern as the int64 that torch takes."""
    return value - (1 << 64) if value >> 63 else value
