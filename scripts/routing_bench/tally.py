"""Rows compared bit by bit, and counted on the device: nothing waits for it until the end. T tokens, K slots."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from routing import Assignment
from routing.bits import rows_differ


@dataclass(frozen=True, kw_only=True)
class Count:
    """Of tokens compared, and of those whose expert ids, or whose combine weights, have a wrong bit."""

    tokens: int = 0
    ids_rows_wrong: int = 0
    weights_rows_wrong: int = 0

    def __add__(self, other: "Count") -> "Count":
        return Count(
            tokens=self.tokens + other.tokens,
            ids_rows_wrong=self.ids_rows_wrong + other.ids_rows_wrong,
            weights_rows_wrong=self.weights_rows_wrong + other.weights_rows_wrong,
        )

    @property
    def is_clean(self) -> bool:
        """Whether something was compared, and all of it was equal."""
        return self.tokens > 0 and self.ids_rows_wrong == self.weights_rows_wrong == 0


class Tally:
    """Counts as batches come."""

    def __init__(self, device: torch.device) -> None:
        self._wrong = torch.zeros(2, dtype=torch.int64, device=device)
        self._tokens = 0

    def add(self, found: Assignment, ids_TK: Tensor, weights_TK: Tensor) -> None:
        """One batch, beside the slots and weights that it should have; another dtype of weights is wrong everywhere."""
        ids_wrong_T = rows_differ(found.expert_ids_TK.long(), ids_TK)
        self._wrong += torch.stack([ids_wrong_T.sum(), rows_differ(found.weights_TK, weights_TK).sum()])
        self._tokens += len(ids_TK)

    def count(self) -> Count:
        """So far; waits for the device."""
        ids, weights = self._wrong.tolist()
        return Count(tokens=self._tokens, ids_rows_wrong=ids, weights_rows_wrong=weights)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, new tensors hold NaN or the largest integer, so that a row that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
