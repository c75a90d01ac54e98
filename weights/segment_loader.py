"""SegmentLoader: copies a learner's tensors into segments that the hosts map."""

from collections.abc import Mapping

from weights.cargo import Cargo, Segment
from weights.gather import Gathered, SegmentPool, gather
from weights.source import Source
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
    """Keeps its segments from one update to the next."""

    def __init__(self, transport: Transport, bucket_bytes: int) -> None:
        self._bucket_bytes = bucket_bytes
        self._pool = SegmentPool(transport, bucket_bytes)

    def load(self, source: Source, tied: Mapping[str, str]) -> SegmentCargo:
        return SegmentCargo(gather(source, tied, self._pool, self._bucket_bytes), bucket_bytes=self._bucket_bytes)

    def unload(self, *, complete: bool) -> None:
        """It holds copies only."""

    def doubt(self) -> None:
        self._pool.drop()

    def close(self) -> None:
        self._pool.drop()
