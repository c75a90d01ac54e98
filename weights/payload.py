"""Payload: the bytes of one update at a host, from its first Stage to the copy into the parameters.

One class per `Delivery`, in files of their own: staged_payload, lease_payload, stream_payload. All of them hash what
arrives and copy it by `Laid`; they differ in where the bytes are.

Legend: N tensors of the catalogue, 2 lanes of a digest.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from weights.aside import aside
from weights.bucket import Bucket
from weights.catalogue import Catalogue
from weights.digests import Digests
from weights.errors import ManifestError
from weights.laid import Laid, laid
from weights.placement import Placement


class Payload(Protocol):
    """An update's bytes."""

    @property
    def stages(self) -> int:
        """How many parts are staged before the vote; 0 where all of it comes after."""
        ...

    def stage(self, part: int, segment: Tensor | None) -> None:
        """Takes a part and hashes it; one that is here already is not taken again.

        ManifestError if it is none of the update's, or too short; TransportError if it cannot be read.
        """
        ...

    def missing(self) -> list[int]:
        """Parts that did not arrive."""
        ...

    def found(self) -> Digests | None:
        """The digests of what arrived; None where nothing is staged."""
        ...

    def ready(self) -> None:
        """Does ahead whatever the copy needs."""
        ...

    def write(self) -> None:
        """Copies all of it to its places. Not waited for."""
        ...


class Hashing:
    """What has been hashed of an update so far."""

    def __init__(self, catalogue: Catalogue, device: torch.device) -> None:
        self._device = device
        with aside(device):
            self._lanes_N2 = catalogue.headers.to(device, copy=True)

    def add(self, part: Laid) -> None:
        with aside(self._device):
            part.add_lanes(self._lanes_N2)

    def digests(self) -> Digests:
        """Waits for the device."""
        with aside(self._device):
            return Digests.of_lanes(self._lanes_N2)


def in_slots(placement: Placement, buckets: Sequence[Bucket], slots: Sequence[Tensor]) -> tuple[Laid, ...]:
    """Every bucket as it lies in its slot: the n-th in slot n mod their number."""
    return tuple(
        laid(
            placement.catalogue,
            [replace(piece, bucket=index % len(slots)) for piece in bucket.pieces],
            slots,
            placement.device,
        )
        for index, bucket in enumerate(buckets)
    )


def checked_part(part: int, buckets: Sequence[Bucket]) -> Bucket:
    """ManifestError if there is no such bucket."""
    if part >= len(buckets):
        raise ManifestError(f"bucket {part} is none of the update's {len(buckets)}")
    return buckets[part]
