"""The seam under a wire: what NCCL and gloo have to offer. Neither knows deadlines; `weights.wire` has them."""

from typing import Protocol

import torch
from torch import Tensor


class Transfer(Protocol):
    """One broadcast under way. Its two questions never wait."""

    def begun(self) -> bool:
        """Whether the channel takes another one. TransportError if this one failed."""
        ...

    def done(self) -> bool:
        """Whether the bytes are here, for any stream and for the CPU (on the root: whether they have left).

        TransportError if it failed.
        """
        ...


class Channel(Protocol):
    """Connected ranks, each with its number."""

    @property
    def device(self) -> torch.device:
        """On which the bytes lie."""
        ...

    def start(self, data: Tensor, root: int, deadline_s: float) -> Transfer:
        """Never waits. Every rank starts the same broadcasts in the same order, with as many bytes; work that is queued
        on the caller's stream goes first. TransportError if it cannot."""
        ...

    def stop(self) -> None:
        """Ends what is under way, and everything else; returns when nothing writes into anybody's tensors any more.

        It may wait, for ever at worst: its caller waits in another thread. Called once.
        """
        ...
