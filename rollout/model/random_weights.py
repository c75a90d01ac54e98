"""Weights drawn at random, for measuring a model's shape without its checkpoint."""

from collections.abc import Mapping

import torch
from torch import Tensor

STD = 0.02
"""What transformers initialises linear layers with."""


@torch.no_grad()
def fill_at_random(parameters: Mapping[str, Tensor], seed: int = 0) -> None:
    """Normal with a standard deviation of 0.02, and 1 for norms, whose tensors have one dimension; in place.

    The same on every device of a kind, whatever it holds.
    """
    for index, tensor in enumerate(parameters.values()):
        if tensor.dim() == 1:
            tensor.fill_(1.0)
        else:
            generator = torch.Generator(tensor.device).manual_seed(seed * 1_000_003 + index)
            tensor.normal_(0.0, STD, generator=generator)
