"""SegmentLoader: copies a learner's tensors into segments that the hosts map."""

from collections.abc import Mapping

import torch
from torch import Tensor

from weights.cargo import Cargo, Segment
from weights.gather import Gathered, SegmentPool, gather
from weights.held import Held
from weights.manifest import Manifest
from weights.source import Named, Source, in_place
from weights.transports.seam import Transport


class SegmentCargo(Cargo):
    """Filled segments."""

    def __init__(self, gathered: Gathered, *, bucket_bytes: int) -> None:
        super().__init__(gathered.manifest, bucket_bytes=bucket_bytes)
        self._segments = gathered.segments

    @property
    def stages(self) -> int:
        return len(self._segments)

    def segment(self, part: int) -> Segment:
        return self._segments[part]


class SegmentLoader:
    """Keeps its segments from one update to the next.

    Tensors that stay on one GPU are hashed there by a table, packed there into a bucket, and leave it bucket by bucket:
    at the speed of its bus, where one by one they would take as long as that many launches.
    """

    def __init__(self, transport: Transport, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._pool = SegmentPool(transport, bucket_bytes)
        self._held: Held | None = None
        self._tied: Mapping[str, str] = {}
        self._slot: Tensor | None = None

    def load(self, source: Source, tied: Mapping[str, str]) -> SegmentCargo:
        named = in_place(source)
        held = None if named is None else self._on_device(named, tied)
        gathered = gather(source, tied, self._pool, self._bucket_bytes) if held is None else self._brought(held)
        return SegmentCargo(gathered, bucket_bytes=self._bucket_bytes)

    def unload(self, *, complete: bool) -> None:
        if self._held is not None:
            self._held.let_go()

    def doubt(self) -> None:
        self._pool.drop()

    def close(self) -> None:
        self._pool.drop()
        self._held = self._slot = None

    def _on_device(self, named: Named, tied: Mapping[str, str]) -> Held | None:
        """None where the tensors are not all contiguous and on one GPU."""
        if any(tensor.device.type == "cpu" for tensor in named.values()):
            return None
        if self._held is None or self._tied != tied or not self._held.take(named):
            self._held = None
            try:
                self._held = Held(named, tied)
            except ValueError:
                return None
            self._tied = dict(tied)
        return self._held

    def _brought(self, held: Held) -> Gathered:
        manifest = Manifest(held.catalogue, held.digests())
        if self._slot is None:
            self._slot = torch.empty(self._bucket_bytes, dtype=torch.uint8, device=held.device)
        segments = []
        for index, bucket in enumerate(held.buckets(self._bucket_bytes)):
            segments.append(self._pool.take(index, from_device=True))
            held.fill(index, self._bucket_bytes, self._slot)
            segments[index].data[: bucket.bytes].copy_(self._slot[: bucket.bytes])
        return Gathered(manifest, tuple(segments))
