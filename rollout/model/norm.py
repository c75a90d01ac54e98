"""RMSNorm in transformers' order: fp32 inside, rounded to the input's dtype before the weight multiplies."""

import torch
from torch import Tensor


def rms_norm(hidden: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    Args:
        hidden: [..., D], any float dtype.
        weight: broadcasts against hidden.
        eps: added to the mean square.

    Returns:
        hidden's shape and dtype (transformers' Qwen3MoeRMSNorm and Glm4MoeRMSNorm, the same formula).
    """
    wide = hidden.float()  # the same tensor where it is fp32 already
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(hidden.dtype)
