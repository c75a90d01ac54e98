"""StreamPayload: nothing before the commit; then bucket after bucket, each written as it comes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from weights.aside import aside
from weights.bucket import Bucket
from weights.errors import ManifestError
from weights.laid import Laid
from weights.payload import checked_part
from weights.placement import Placement
from weights.way import Way


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
