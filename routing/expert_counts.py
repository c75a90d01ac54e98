"""Counters of the tokens that each expert gets."""

import torch
from torch import Tensor

LINE = 32
"""int32 numbers in a line of a GPU's L2 cache, 128 bytes."""


def expert_counts(num_experts: int, device: torch.device | str) -> Tensor:
    """int32 zeros [E], each in a cache line of its own: for `route(..., counts_E=...)`.

    A GPU adds to numbers of one line one after another; counters side by side would make 65,536 tokens five times as
    slow to route.
    """
    return torch.zeros(num_experts, LINE, dtype=torch.int32, device=device)[:, 0]
