"""LeaseLoader: lets hosts read a learner's tensors where they are, or bucket by bucket where that cannot be.

- A module or a state dict whose tensors are contiguous, on one device, in memory that has a handle: leased. No byte is
  copied at the learner's end.
- Otherwise, and as long as the tensors stay: two buckets in device memory, filled in turn while the hosts commit.
- Tensors that come one by one and go again: segments in host memory.
"""

from collections.abc import Mapping, Sequence

from weights.cargo import Cargo, Loader
from weights.delivery import Delivery
from weights.errors import TransportError
from weights.export import Buffer, Exporter
from weights.held import Held
from weights.lease import Lease, Memory, SlotTerms
from weights.manifest import Manifest
from weights.source import Named, Source, in_place

SLOTS = 2


class LeaseCargo(Cargo):
    """The learner's own memory."""

    delivery = Delivery.LEASE
    stages = 1

    def __init__(self, manifest: Manifest, lease: Lease, *, bucket_bytes: int) -> None:
        super().__init__(manifest, bucket_bytes=bucket_bytes)
        self._lease = lease

    @property
    def lease(self) -> Lease:
        return self._lease


class SlotCargo(Cargo):
    """Tensors that pass through the learner's buckets while the hosts commit."""

    delivery = Delivery.STREAM

    def __init__(self, manifest: Manifest, held: Held, slots: Sequence[Buffer], *, bucket_bytes: int) -> None:
        super().__init__(manifest, bucket_bytes=bucket_bytes)
        self._held = held
        self._slots = slots
        memories = tuple(slot.memory for slot in slots)
        self._terms = SlotTerms("slots " + " ".join(memory.identity for memory in memories), memories)

    @property
    def buckets(self) -> int:
        return len(self._held.buckets(self.bucket_bytes))

    def way(self, joined: Mapping[str, str]) -> SlotTerms:
        return self._terms

    def prepare(self, bucket: int) -> None:
        self._held.fill(bucket, self.bucket_bytes, self._slots[bucket % len(self._slots)].data)


class LeaseLoader:
    """Of one publisher.

    Args:
        exporter: gives handles of this process's memory.
        segments: takes over what is neither leased nor streamed.
        bucket_bytes: size of a bucket in device memory.
    """

    def __init__(self, exporter: Exporter, segments: Loader, bucket_bytes: int) -> None:
        self._exporter = exporter
        self._segments = segments
        self._bucket_bytes = bucket_bytes
        self._held: Held | None = None
        self._tied: Mapping[str, str] = {}
        self._lease: Lease | None = None
        self._anchors: dict[int, tuple[Memory, int] | None] = {}
        """For the address of each storage that holds some of the tensors, the memory around it."""
        self._slots: list[Buffer] = []

    def load(self, source: Source, tied: Mapping[str, str]) -> Cargo:
        named = in_place(source)
        if named is None or not all(self._exporter.serves(tensor.device) for tensor in named.values()):
            return self._segments.load(source, tied)
        if not self._hold(named, tied):
            return self._segments.load(source, tied)
        held = self._held
        assert held is not None
        manifest = Manifest(held.catalogue, held.digests())
        if self._is_leased(held):
            assert self._lease is not None
            return LeaseCargo(manifest, self._lease, bucket_bytes=self._bucket_bytes)
        while len(self._slots) < SLOTS:
            self._slots.append(self._exporter.buffer(self._bucket_bytes, held.device))
        return SlotCargo(manifest, held, self._slots, bucket_bytes=self._bucket_bytes)

    def unload(self, *, complete: bool) -> None:
        self._segments.unload(complete=complete)
        if self._held is not None:
            self._held.let_go()
            if self._held.device.type == "cpu":
                self._held = self._lease = None

    def doubt(self) -> None:
        self._segments.doubt()
        self._drop_slots()

    def close(self) -> None:
        self._segments.close()
        self._drop_slots()
        self._held = self._lease = None

    def _hold(self, named: Named, tied: Mapping[str, str]) -> bool:
        """False where the tensors cannot be sent from where they are."""
        if self._held is None or self._tied != tied or not self._held.take(named):
            self._held = self._lease = None  # first: the old ones may be as large as the new ones
            try:
                self._held = Held(named, tied)
            except ValueError:
                return False
            self._tied = dict(tied)
            self._anchors = {}
            for data in self._held.data:
                if data.numel():
                    self._anchors.setdefault(data.untyped_storage().data_ptr(), None)
        return True

    def _is_leased(self, held: Held) -> bool:
        """Whether all of the tensors' memory has handles; those of before are good as long as it is the same memory."""
        try:
            found = {anchor: self._exporter.around(anchor, held.device) for anchor in self._anchors}
        except TransportError:
            self._lease = None
            return False
        if self._lease is None or found != self._anchors:
            self._lease = lease_of(held, found)
            self._anchors = dict(found)
        return True

    def _drop_slots(self) -> None:
        if self._held is not None:
            self._held.forget_fills()
        while self._slots:
            self._slots.pop().close()


def lease_of(held: Held, around: Mapping[int, tuple[Memory, int]]) -> Lease:
    """around: for the address of each storage, the memory that it is in, and its first byte there."""
    memories: dict[Memory, int] = {}
    places = []
    for data in held.data:
        if not data.numel():
            places.append((0, 0))
            continue
        start = data.untyped_storage().data_ptr()
        memory, offset = around[start]
        places.append((memories.setdefault(memory, len(memories)), offset + data.data_ptr() - start))
    return Lease(held.catalogue.id, tuple(memories), tuple(places))
