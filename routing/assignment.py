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

    def check(self, num_experts: int) -> None:
        """ValueError naming the tokens that have an id out of range or twice. Waits for the device."""
        ids = self.expert_ids_TK
        outside_T = ((ids < 0) | (ids >= num_experts)).any(dim=1)
        ascending = ids.sort(dim=1).values
        repeated_T = (ascending[:, 1:] == ascending[:, :-1]).any(dim=1)
        faults = [
            f"{what} in tokens {tokens.tolist()}"
            for what, tokens in (
                (f"ids outside 0..{num_experts - 1}", outside_T.nonzero().flatten()),
                ("repeated ids", repeated_T.nonzero().flatten()),
            )
            if tokens.numel() > 0
        ]
        if faults:
            raise ValueError(f"Assignment: {'; '.join(faults)}")
