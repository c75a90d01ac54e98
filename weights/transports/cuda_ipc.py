"""The transport between processes that share a GPU, or GPUs that reach each other: messages and, where tensors come one
by one, segments as in shared_memory; else the hosts read the learner's device memory.
"""

import torch

from weights.cargo import Loader
from weights.cuda_driver import Opened
from weights.errors import TransportError
from weights.export import CudaExporter
from weights.lease import Memory, WireTerms
from weights.lease_loader import LeaseLoader
from weights.reach import HostWire
from weights.transports.shared_memory import SharedMemoryTransport


class CudaIpcTransport(SharedMemoryTransport):
    """The learner's end."""

    def loader(self, bucket_bytes: int) -> Loader:
        return LeaseLoader(CudaExporter(), super().loader(bucket_bytes), bucket_bytes)


class CudaReach:
    """A host's end, on its GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def open(self, memory: Memory) -> Opened:
        return Opened(memory.handle, memory.bytes, self._device)

    def join(self, terms: WireTerms, host: str) -> HostWire:
        raise TransportError(f"{host} joins no wire: its transport is cuda_ipc")
