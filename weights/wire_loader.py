"""WireLoader: broadcasts a learner's tensors to all hosts, bucket by bucket, two of them in memory at a time."""

import uuid
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from weights.bucket import Bucket
from weights.cargo import Cargo
from weights.delivery import Delivery
from weights.errors import TransportError
from weights.held import Held
from weights.lease import WireTerms
from weights.manifest import Manifest
from weights.naming import to_wire
from weights.source import Named, Source, in_place, named_pairs
from weights.wire import Wire, open_wire, serve_store
from weights.wires.meeting import StoreServer

SLOTS = 2
Backend = Literal["nccl", "gloo"]


class Sender:
    """A learner's end of a wire, which is opened for a set of hosts and again when they change or it broke."""

    def __init__(self, backend: Backend, bucket_bytes: int, deadline_s: float, store_host: str) -> None:
        self._backend = backend
        self._bucket_bytes = bucket_bytes
        self._deadline_s = deadline_s
        self._store_host = store_host
        self._store: StoreServer | None = None
        self._wire: Wire | None = None
        self._terms: WireTerms | None = None
        device = torch.device("cpu") if backend == "gloo" else torch.device("cuda", torch.cuda.current_device())
        self.slots = tuple(torch.empty(bucket_bytes, dtype=torch.uint8, device=device) for _ in range(SLOTS))
        self.has_sent = False
        """Something of the update that was loaded last."""

    def terms(self, joined: Mapping[str, str]) -> WireTerms:
        """Of a wire to these hosts: the one that works and that all of them are on, or one that is still to be opened.

        A host that has left cannot come back to the same one: its rank is taken, and what was sent since is gone.
        """
        works = self._wire is not None and self._wire.alive
        hosts = tuple(joined)
        if (
            self._terms is None
            or not works
            or self._terms.hosts != hosts
            or any(name != self._terms.name for name in joined.values())
        ):
            self.close_wire()
            if self._store is None:
                self._store = serve_store()
            name = f"wire-{uuid.uuid4().hex}"
            self._terms = WireTerms(name, self._store_host, self._store.port, self._backend, hosts, self._bucket_bytes)
        return self._terms

    def open(self) -> None:
        """Meets the hosts. TransportError if they do not come."""
        assert self._terms is not None
        self.close_wire(keep_terms=True)
        self._wire = open_wire(
            backend=self._backend,
            store_host=self._terms.store_host,
            store_port=self._terms.store_port,
            rank=0,
            size=1 + len(self._terms.hosts),
            device=self.slots[0].device,
            deadline_s=self._deadline_s,
            prefix=self._terms.name,
        )

    def send(self, slot: int, size: int) -> None:
        """To all hosts. TransportError if it does not arrive."""
        if self._wire is None or not self._wire.alive:
            raise TransportError("the wire to the hosts is broken")
        self.has_sent = True
        self._wire.broadcast(self.slots[slot][:size], 0, self._deadline_s)

    def close_wire(self, *, keep_terms: bool = False) -> None:
        if self._wire is not None:
            self._wire.close()
            self._wire = None
        if not keep_terms:
            self._terms = None

    def close(self) -> None:
        self.close_wire()
        if self._store is not None:
            self._store.close()
            self._store = None


class WireCargo(Cargo):
    """Buckets over a wire: kept in host memory before the vote (SHADOW), or written in the commit (STREAM)."""

    def __init__(
        self, manifest: Manifest, held: Held, sender: Sender, *, delivery: Delivery, bucket_bytes: int
    ) -> None:
        super().__init__(manifest, bucket_bytes=bucket_bytes)
        self.delivery = delivery
        self._held = held
        self._sender = sender

    @property
    def stages(self) -> int:
        return len(self._packed) if self.delivery is Delivery.SHADOW else 0

    @property
    def buckets(self) -> int:
        return len(self._packed) if self.delivery is Delivery.STREAM else 0

    @property
    def _packed(self) -> tuple[Bucket, ...]:
        return self._held.buckets(self.bucket_bytes)

    def way(self, joined: Mapping[str, str]) -> WireTerms:
        return self._sender.terms(joined)

    def meet(self) -> None:
        self._sender.open()

    def prepare(self, bucket: int) -> None:
        self._held.fill(bucket, self.bucket_bytes, self._sender.slots[bucket % SLOTS])

    def transmit(self, bucket: int) -> None:
        self._sender.send(bucket % SLOTS, self._packed[bucket].bytes)


class WireLoader:
    """Of one publisher.

    Args:
        backend: nccl between GPUs, gloo between CPUs.
        shadow: whether the hosts keep a full second copy before they vote.
        bucket_bytes: size of a bucket; two at each end.
        deadline_s: for the hosts to come, and for one bucket.
        store_host: this machine's address, as the hosts reach it.
    """

    def __init__(
        self, backend: Backend, *, shadow: bool, bucket_bytes: int, deadline_s: float, store_host: str = "127.0.0.1"
    ) -> None:
        self._delivery = Delivery.SHADOW if shadow else Delivery.STREAM
        self._bucket_bytes = bucket_bytes
        self._make_sender: Callable[[], Sender] = lambda: Sender(backend, bucket_bytes, deadline_s, store_host)
        self._sender: Sender | None = None
        self._held: Held | None = None
        self._tied: Mapping[str, str] = {}

    def load(self, source: Source, tied: Mapping[str, str]) -> WireCargo:
        if self._sender is None:
            self._sender = self._make_sender()
        self._sender.has_sent = False
        held = self._hold(source, tied)
        return WireCargo(
            Manifest(held.catalogue, held.digests()),
            held,
            self._sender,
            delivery=self._delivery,
            bucket_bytes=self._bucket_bytes,
        )

    def unload(self, *, complete: bool) -> None:
        if self._sender is not None and self._sender.has_sent and not complete:
            # Some host may have taken fewer buckets than were sent, and nothing on the wire says which one comes: it
            # would be behind for ever.
            self._sender.close_wire()
        if self._held is not None:
            self._held.let_go()
            if self._held.device.type == "cpu":
                self._held = None

    def doubt(self) -> None:
        """Nobody reads the slots but this process."""

    def close(self) -> None:
        if self._sender is not None:
            self._sender.close()
            self._sender = None
        self._held = None

    def _hold(self, source: Source, tied: Mapping[str, str]) -> Held:
        named = in_place(source)
        if named is not None and self._held is not None and self._tied == tied and self._held.take(named):
            return self._held
        self._held = None  # first: the old ones may be as large as the new ones
        try:
            self._held = Held(copied(source) if named is None else named, tied)
        except ValueError:
            if named is None:
                raise
            self._held = Held(copied(named), tied)  # not contiguous, or not all on one device
        self._tied = dict(tied)
        return self._held


def copied(source: Source) -> Named:
    """All tensors, copied into this process's host memory, under their wire names."""
    found: dict[str, Tensor] = {}
    with named_pairs(source) as pairs:
        for name, tensor in to_wire(pairs, keep_tied=True):
            if name in found:
                raise ValueError(f"{name} comes twice; an update holds every tensor once")
            found[name] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return found
