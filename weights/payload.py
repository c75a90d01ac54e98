"""Payload: the bytes of one update at a host, from its first Stage to the copy into the parameters.

One class per `Delivery`. All of them hash what arrives and copy it by `Laid`; they differ in where the bytes are.

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
from weights.lease import Lease
from weights.placement import Placement
from weights.reach import OpenMemory, Reach
from weights.way import Way


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


class SegmentPayload:
    """Segments in host memory, mapped or of the host's own. On a GPU each passes through one bucket on the device.

    Args:
        placement: of the update's catalogue.
        buckets: of the catalogue.
        slots: on a GPU, places for buckets on the device, flat uint8; none on a CPU.
        in_slots: the buckets as they lie there, see `in_slots`.
    """

    def __init__(
        self, placement: Placement, buckets: Sequence[Bucket], slots: Sequence[Tensor], in_slots: Sequence[Laid]
    ) -> None:
        self._placement = placement
        self._buckets = buckets
        self._slots = slots
        self._in_slots = in_slots
        self._segments: dict[int, Tensor] = {}
        self._hashing = Hashing(placement.catalogue, placement.device)

    @property
    def stages(self) -> int:
        return len(self._buckets)

    def stage(self, part: int, segment: Tensor | None) -> None:
        if part in self._segments:
            return
        needed = checked_part(part, self._buckets).bytes
        if segment is None:
            raise ManifestError(f"bucket {part} came without a segment")
        if segment.numel() < needed:
            raise ManifestError(f"the segment of bucket {part} has {segment.numel()} bytes, its tensors take {needed}")
        with aside(self._placement.device):
            self._hashing.add(self._brought(part, segment))
        self._segments[part] = segment

    def keep(self, part: int, segment: Tensor) -> None:
        """As `stage`, for what lies in the part's slot as well."""
        with aside(self._placement.device):
            self._hashing.add(self._in_slots[part] if self._slots else self._brought(part, segment))
        self._segments[part] = segment

    def missing(self) -> list[int]:
        return [part for part in range(self.stages) if part not in self._segments]

    def found(self) -> Digests:
        return self._hashing.digests()

    def ready(self) -> None:
        for part in self._in_slots:
            part.ready(self._placement)

    def write(self) -> None:
        with aside(self._placement.device):
            for part, segment in sorted(self._segments.items()):
                self._brought(part, segment).copy_to(self._placement)

    def _brought(self, part: int, segment: Tensor) -> Laid:
        """A bucket where the host's device can read it: in its segment, or after this in the slot."""
        bucket = self._buckets[part]
        if not self._slots:
            pieces = [replace(piece, bucket=0) for piece in bucket.pieces]
            return laid(self._placement.catalogue, pieces, [segment], self._placement.device)
        slot = self._slots[part % len(self._slots)]
        slot[: bucket.bytes].copy_(segment[: bucket.bytes], non_blocking=True)
        return self._in_slots[part]


class ShadowPayload:
    """Buckets over a wire, each kept in host memory of its own: after the vote nothing depends on the learner."""

    def __init__(self, inner: SegmentPayload, buckets: Sequence[Bucket], way: Way, shadow: "Shadow") -> None:
        self._inner = inner
        self._buckets = buckets
        self._way = way
        self._shadow = shadow

    @property
    def stages(self) -> int:
        return self._inner.stages

    def stage(self, part: int, segment: Tensor | None) -> None:
        if part not in self._inner.missing():
            checked_part(part, self._buckets)
            return
        size = checked_part(part, self._buckets).bytes
        arrived = self._way.take(part, size)
        kept = self._shadow.take(part)[:size]
        with aside(arrived.device):
            kept.copy_(arrived)
        self._inner.keep(part, kept)

    def missing(self) -> list[int]:
        return self._inner.missing()

    def found(self) -> Digests:
        return self._inner.found()

    def ready(self) -> None:
        self._inner.ready()

    def write(self) -> None:
        self._inner.write()


class Shadow:
    """Host memory for a full second copy, bucket by bucket; page-locked beside a GPU. Kept between updates."""

    def __init__(self, bucket_bytes: int, device: torch.device) -> None:
        self._bucket_bytes = bucket_bytes
        self._pinned = device.type != "cpu"
        self._buckets: dict[int, Tensor] = {}

    def take(self, part: int) -> Tensor:
        if part not in self._buckets:
            self._buckets[part] = torch.empty(self._bucket_bytes, dtype=torch.uint8, pin_memory=self._pinned)
        return self._buckets[part]


class OpenLease:
    """A learner's memory, opened once, and a catalogue's tensors in it."""

    def __init__(self, lease: Lease, catalogue: Catalogue, reach: Reach, device: torch.device) -> None:
        """ManifestError if it is not that catalogue's, TransportError if a memory cannot be opened."""
        pieces = lease.pieces(catalogue)
        self.id = lease.id
        self.catalogue = lease.catalogue
        self._memories: list[OpenMemory] = []
        try:
            for memory in lease.memories:
                self._memories.append(reach.open(memory))
            short = [
                f"memory {place} has {opened.data.numel()} bytes, expected {memory.bytes}"
                for place, (opened, memory) in enumerate(zip(self._memories, lease.memories, strict=True))
                if opened.data.numel() < memory.bytes
            ]
            if short:
                raise ManifestError("the lease is of more memory than there is: " + "; ".join(short))
            self.tensors = laid(catalogue, pieces, [memory.data for memory in self._memories], device)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        while self._memories:
            self._memories.pop().close()


class LeasePayload:
    """Everything at once, where the learner has it."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._lease: OpenLease | None = None
        self._hashing = Hashing(placement.catalogue, placement.device)
        self.stages = 1

    def stage(self, part: int, segment: Tensor | None) -> None:
        raise ManifestError("a leased update is staged by its lease, and none came")

    def read(self, part: int, lease: OpenLease) -> None:
        """Hashes the learner's memory; once. ManifestError if there is no such part."""
        if part >= self.stages:
            raise ManifestError(f"part {part} is none of a leased update's {self.stages}")
        if self._lease is None:
            self._hashing.add(lease.tensors)
            self._lease = lease

    def missing(self) -> list[int]:
        return [0] if self._lease is None else []

    def found(self) -> Digests:
        return self._hashing.digests()

    def ready(self) -> None:
        assert self._lease is not None
        self._lease.tensors.ready(self._placement)

    def write(self) -> None:
        assert self._lease is not None
        with aside(self._placement.device):
            self._lease.tensors.copy_to(self._placement)


class StreamPayload:
    """Nothing before the commit; then bucket after bucket, each written as it comes."""

    def __init__(self, placement: Placement, buckets: Sequence[Bucket], in_slots: Sequence[Laid], way: Way) -> None:
        self._placement = placement
        self._buckets = buckets
        self._in_slots = in_slots
        self._way = way
        self._delivered = 0
        self.stages = 0

    def stage(self, part: int, segment: Tensor | None) -> None:
        raise ManifestError(f"a streamed update is delivered after the votes, and part {part} came before")

    def missing(self) -> list[int]:
        return []

    def found(self) -> None:
        return None

    def ready(self) -> None:
        for part in self._in_slots:
            part.ready(self._placement)

    @property
    def buckets(self) -> int:
        """How many there are."""
        return len(self._buckets)

    @property
    def delivered(self) -> int:
        """Buckets that were written, in order."""
        return self._delivered

    @property
    def missing_buckets(self) -> int:
        """Buckets that were not."""
        return self.buckets - self.delivered

    def arrive(self, bucket: int) -> None:
        """Waits for the next bucket; nothing is written.

        ManifestError if it is another one, TransportError if it does not come.
        """
        size = checked_part(bucket, self._buckets).bytes
        if bucket != self._delivered:
            raise ManifestError(f"bucket {bucket} was delivered, and {self._delivered} is next")
        self._way.take(bucket, size)

    def place(self, bucket: int) -> None:
        """Writes the bucket that has arrived; its slot is free when this returns."""
        with aside(self._placement.device):
            self._in_slots[bucket].copy_to(self._placement)
            if self._placement.device.type != "cpu":
                torch.cuda.current_stream(self._placement.device).synchronize()
        self._delivered += 1

    def write(self) -> None:
        """All of it is written already. ManifestError if some is not."""
        if self._delivered != len(self._buckets):
            raise ManifestError(f"{self._delivered} of {len(self._buckets)} buckets were delivered")


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
