"""The transport between GPUs: messages as in shared_memory, buckets broadcast over NCCL, or gloo between CPUs."""

import torch

from weights.cargo import Loader
from weights.errors import TransportError
from weights.lease import Memory, WireTerms
from weights.reach import OpenMemory
from weights.transports.shared_memory import SharedMemoryTransport
from weights.wire import Wire, open_wire
from weights.wire_loader import Backend, WireLoader


class NcclTransport(SharedMemoryTransport):
    """The learner's end."""

    def __init__(self, name: str, *, backend: Backend, shadow: bool, deadline_s: float) -> None:
        super().__init__(name)
        self._backend: Backend = backend
        self._shadow = shadow
        self._deadline_s = deadline_s

    def loader(self, bucket_bytes: int) -> Loader:
        return WireLoader(self._backend, shadow=self._shadow, bucket_bytes=bucket_bytes, deadline_s=self._deadline_s)


class WireReach:
    """A host's end."""

    def __init__(self, device: torch.device, deadline_s: float) -> None:
        self._device = device
        self._deadline_s = deadline_s

    def open(self, memory: Memory) -> OpenMemory:
        raise TransportError("this host opens no learner's memory: its transport is nccl")

    def join(self, terms: WireTerms, host: str) -> "Joined":
        wire = open_wire(
            backend="gloo" if self._device.type == "cpu" else "nccl",
            store_host=terms.store_host,
            store_port=terms.store_port,
            rank=1 + terms.hosts.index(host),
            size=1 + len(terms.hosts),
            device=self._device,
            deadline_s=self._deadline_s,
            prefix=terms.name,
        )
        return Joined(wire, self._deadline_s)


class Joined:
    """A wire on which the learner, rank 0, sends and this host receives."""

    def __init__(self, wire: Wire, deadline_s: float) -> None:
        self._wire = wire
        self._deadline_s = deadline_s

    @property
    def alive(self) -> bool:
        return self._wire.alive

    def receive(self, data: torch.Tensor) -> None:
        self._wire.broadcast(data, 0, self._deadline_s)

    def close(self) -> None:
        self._wire.close()
