"""Cargo: an update at the learner's end, loaded and ready to be offered; and who loads it, one per transport."""

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from weights.delivery import Delivery
from weights.lease import Lease, SlotTerms, WireTerms
from weights.manifest import Manifest
from weights.source import Source


class Segment(Protocol):
    """Flat bytes that a publisher fills and hosts map."""

    @property
    def data(self) -> Tensor:
        """uint8, flat, on the CPU."""
        ...

    def lock(self) -> None:
        """Page-locks it, where a GPU is to write into it; once."""
        ...

    def close(self) -> None:
        """The publisher lets go; hosts that map it keep it."""
        ...


class Cargo:
    """Segments that are filled, or a lease; what a kind of cargo has no use for stays as it is here."""

    delivery = Delivery.SEGMENTS

    def __init__(self, manifest: Manifest, *, bucket_bytes: int) -> None:
        self.manifest = manifest
        self.bucket_bytes = bucket_bytes

    @property
    def stages(self) -> int:
        """Stage requests before the vote."""
        return 0

    @property
    def buckets(self) -> int:
        """Deliver requests in the commit."""
        return 0

    @property
    def lease(self) -> Lease | None:
        """What the hosts read, where it is the learner's own memory."""
        return None

    def way(self, joined: Mapping[str, str]) -> SlotTerms | WireTerms | None:
        """What the hosts have to join for the buckets; None: nothing.

        joined: for every host the name of the way that it has joined, empty without one. The terms are the same again
        as long as that works for all of them.
        """
        return None

    def meet(self) -> None:
        """The learner's share of joining, while the hosts do theirs. TransportError if they do not meet."""

    def segment(self, part: int) -> Segment | None:
        """What travels beside a Stage."""
        return None

    def prepare(self, bucket: int) -> None:
        """Before a bucket's request is sent: fills it."""

    def transmit(self, bucket: int) -> None:
        """After it was sent to all hosts: brings it to them. TransportError if that fails; the way is dead then."""


class Loader(Protocol):
    """Loads updates for one publisher; keeps what it can between them."""

    def load(self, source: Source, tied: Mapping[str, str]) -> Cargo:
        """tied: wire names that the hosts do not want, with the names that host their content.

        ValueError for a source that cannot be sent.
        """
        ...

    def unload(self, *, complete: bool) -> None:
        """The update is at its end: holds on to none of the learner's tensors. complete: every host took all of it."""
        ...

    def doubt(self) -> None:
        """A host may still read what was loaded last: never write into it again."""
        ...

    def close(self) -> None: ...
