"""Random numbers as a function of request seed, position and token: no state, so the batch cannot touch them.

The generator is SplitMix64 used as a counter-based one: its finaliser over a key made of seed and position, and the
token. R rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from weights.split_mix import GOLDEN, logical_shift, mix, mix_tensor, signed


def sample_seed(seed: int, sample: int) -> int:
    """The seed of one of a prompt's n samples."""
    return mix(seed + (sample + 1) * GOLDEN)


def gumbel(seeds_R: Sequence[int], positions_R: Sequence[int], vocab_size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise, fp32 [R, V]: element (r, v) depends on seeds_R[r], positions_R[r] and v alone."""
    keys = [signed(mix(mix(seed) + position * GOLDEN)) for seed, position in zip(seeds_R, positions_R, strict=True)]
    key_R1 = torch.tensor(keys, dtype=torch.int64, device=device)[:, None]
    token_V = torch.arange(1, vocab_size + 1, dtype=torch.int64, device=device) * signed(GOLDEN)
    bits_RV = logical_shift(mix_tensor(key_R1 + token_V), 32)
    # u in (0, 1) with all 32 bits where it is small, which is where the Gumbel is large and picks the token.
    u_RV = (bits_RV.to(torch.float32) + 0.5) * 2.0**-32
    return -torch.log(-torch.log1p(-u_RV.clamp_(max=1 - 2.0**-24)))
