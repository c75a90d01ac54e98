"""SegmentPayload, ShadowPayload: bytes that are all in host memory before the vote, mapped or of the host's own."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from weights.aside import aside
from weights.bucket import Bucket
from weights.digests import Digests
from weights.errors import ManifestError
from weights.laid import Laid, laid
from weights.payload import Hashing, checked_part
from weights.placement import Placement
from weights.way import Way


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
