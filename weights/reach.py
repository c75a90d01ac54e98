"""What a host can reach of its learner besides messages: its memory, and wires. Fakes stand here in tests."""

from typing import Protocol

from torch import Tensor

from weights.errors import TransportError
from weights.lease import Memory, WireTerms


class OpenMemory(Protocol):
    """A learner's memory, readable here until it is closed."""

    @property
    def data(self) -> Tensor:
        """Flat uint8, no copy."""
        ...

    def close(self) -> None: ...


class HostWire(Protocol):
    """A host's end of a wire: what the learner broadcasts arrives here."""

    @property
    def alive(self) -> bool:
        """False after anything went wrong on it: it has to be joined anew."""
        ...

    def receive(self, data: Tensor) -> None:
        """Fills flat uint8 memory and waits for it. TransportError, or DeadlineExceeded: the wire is dead then."""
        ...

    def close(self) -> None: ...


class Reach(Protocol):
    """How a host opens what a learner names. TransportError where it cannot."""

    def open(self, memory: Memory) -> OpenMemory: ...

    def join(self, terms: WireTerms, host: str) -> HostWire:
        """Waits until the learner and all other hosts of the wire have joined, or a deadline."""
        ...


class NoReach:
    """Of a host whose learner sends it nothing but messages and segments."""

    def open(self, memory: Memory) -> OpenMemory:
        raise TransportError("this host opens no learner's memory: its transport is not cuda_ipc")

    def join(self, terms: WireTerms, host: str) -> HostWire:
        raise TransportError("this host joins no wire: its transport is not nccl")
