"""The result of routing, and the step before it. T tokens, K slots of a token."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, eq=False)
class Chosen:
    """The chosen experts with their raw scores: what a reduce function is given."""

    expert_ids_TK: Tensor
    """int32, in slot order."""
    scores_TK: Tensor
    """In the spec's chain dtype."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Assignment:
    """Which experts each token goes to, and the factor of each one's output in the sum."""

    expert_ids_TK: Tensor
    """int32, in slot order."""
    weights_TK: Tensor
    """Combine weights, in the spec's weight dtype."""

    def __post_init__(self) -> None:
        assert self.expert_ids_TK.ndim == 2, self.expert_ids_TK.shape
        assert self.expert_ids_TK.dtype == torch.int32, self.expert_ids_TK.dtype
        assert self.expert_ids_TK.shape == self.weights_TK.shape, (self.expert_ids_TK.shape, self.weights_TK.shape)
        assert self.expert_ids_TK.device == self.weights_TK.device, (self.expert_ids_TK.device, self.weights_TK.device)
