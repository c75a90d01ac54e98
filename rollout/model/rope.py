"""Rotary position embedding, default type, as transformers computes it.

T tokens, r rotary dimensions.
"""

import torch
from torch import Tensor

from rollout.model.spec import RopeSpec


def rotation(positions_T: Tensor, rope: RopeSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines of a step, the same for all heads and layers.

    Args:
        positions_T: int64, from 0.
        rope: base and rotary dimensions.
        dtype: of the activations; angles are fp32 and rounded to it at the end.

    Returns:
        cos and sin, each [T, 1, r], the angles of the first half repeated in the second.
    """
    steps = torch.arange(0, rope.rotary_dim, 2, dtype=torch.float32, device=positions_T.device)
    inverse_frequencies = 1.0 / (rope.theta ** (steps / rope.rotary_dim))
    angles = positions_T.float()[:, None, None] * inverse_frequencies
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the first r dimensions of every head; the others pass through.

    Args:
        heads: [T, heads, head_dim].
        cos: [T, 1, r], r <= head_dim.
        sin: the same.
    """
    rotary_dim = cos.shape[-1]
    rotary = heads[..., :rotary_dim]
    first, second = rotary.chunk(2, dim=-1)
    rotated = rotary * cos + torch.cat((-second, first), dim=-1) * sin
    return rotated if rotary_dim == heads.shape[-1] else torch.cat((rotated, heads[..., rotary_dim:]), dim=-1)
