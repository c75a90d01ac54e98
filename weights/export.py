"""What a learner can let its hosts read: its device memory, by handles. Fakes stand here in tests."""

from typing import Protocol

import torch
from torch import Tensor

from weights.cuda_driver import Allocation, DeviceBuffer, allocation_of, export
from weights.errors import TransportError
from weights.lease import Memory


class Buffer(Protocol):
    """Memory of the learner's for buckets, which hosts can read."""

    @property
    def memory(self) -> Memory: ...

    @property
    def data(self) -> Tensor:
        """Flat uint8."""
        ...

    def close(self) -> None: ...


class Exporter(Protocol):
    """Gives out handles. TransportError where it cannot."""

    def around(self, address: int, device: torch.device) -> tuple[Memory, int]:
        """The memory that an address is in, and which byte of it that is. The same memory has the same identity as long
        as it lives."""
        ...

    def serves(self, device: torch.device) -> bool:
        """Whether memory of this device can be read by hosts at all."""
        ...

    def buffer(self, size: int, device: torch.device) -> Buffer: ...


class CudaExporter:
    """Of a process with a GPU. A handle is made once for each allocation."""

    def __init__(self) -> None:
        self._handles: dict[Allocation, Memory] = {}

    def around(self, address: int, device: torch.device) -> tuple[Memory, int]:
        if device.type != "cuda":
            raise TransportError(f"memory of the device {device} has no CUDA handle")
        allocation = allocation_of(address, torch.cuda.current_device() if device.index is None else device.index)
        return self._memory(allocation), address - allocation.address

    def serves(self, device: torch.device) -> bool:
        return device.type == "cuda"

    def buffer(self, size: int, device: torch.device) -> "CudaBuffer":
        return CudaBuffer(DeviceBuffer(size, device))

    def _memory(self, allocation: Allocation) -> Memory:
        if allocation not in self._handles:
            self._handles[allocation] = memory_of(allocation)
        return self._handles[allocation]


class CudaBuffer:
    """A bucket in device memory."""

    def __init__(self, held: DeviceBuffer) -> None:
        self._held = held
        self.memory = memory_of(held.allocation())

    @property
    def data(self) -> Tensor:
        return self._held.data

    def close(self) -> None:
        self._held.close()


def memory_of(allocation: Allocation) -> Memory:
    """With a handle. TransportError if it has none."""
    return Memory(export(allocation), f"{allocation.device}:{allocation.identity}", allocation.bytes)
