"""Random numbers as a function of request seed, position and token: no state, so the batch cannot touch them.

The generator is counter-based: SplitMix64's output function (Steele, Lea and Flood, "Fast splittable pseudorandom
number generators", OOPSLA 2014) over a key made of seed and position, and the token. R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of a prompt's n samples."""
    return _mix(seed + (sample + 1) * _GOLDEN)


def gumbel(seeds_R: Sequence[int], positions_R: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise, fp32 [R, V]: element (r, v) depends on seeds_R[r], positions_R[r] and v alone."""
    keys = [_signed(_mix(_mix(seed) + position * _GOLDEN)) for seed, position in zip(seeds_R, positions_R, strict=True)]
    key_R1 = torch.tensor(keys, dtype=torch.int64, device=device)[:, None]
    token_V = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * _signed(_GOLDEN)
    bits_RV = _logical_shift(_mix_tensor(key_R1 + token_V), 32)
    # u in (0, 1) with all 32 bits where it is small, which is where the Gumbel is large and picks the token.
    u_RV = (bits_RV.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u_RV.clamp_(max=1 - 2.0**-24)))


def _mix(x: int) -> int:
    x &= _MASK
    x = ((x ^ (x >> 30)) * _FIRST) & _MASK
    x = ((x ^ (x >> 27)) * _SECOND) & _MASK
    return x ^ (x >> 31)


def _mix_tensor(x: Tensor) -> Tensor:
    x = (x ^ _logical_shift(x, 30)) * _signed(_FIRST)
    x = (x ^ _logical_shift(x, 27)) * _signed(_SECOND)
    return x ^ _logical_shift(x, 31)


def _logical_shift(x: Tensor, bits: int) -> Tensor:
    """int64 shifted right as if unsigned; torch's own shift copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _signed(x: int) -> int:
    """The int64 with the same 64 bits."""
    return x - (1 << 64) if x >= 1 << 63 else x
