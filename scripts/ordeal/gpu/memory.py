"""A learner's memory that another process can read: a GPU's, or between CPUs a file that both map.

A file behaves as device memory does under a lease: it is read where it is, it can be written meanwhile, and its handle
is good for nothing once it is freed.
"""

import os
from collections.abc import Iterable
from itertools import accumulate
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from weights.errors import TransportError
from weights.export import Buffer, CudaExporter, Exporter
from weights.lease import Memory, WireTerms
from weights.reach import HostWire, Reach
from weights.transports.cuda_ipc import CudaReach

_ALIGNMENT = 256


class FileMemory:
    """Gives out memory with handles, on a CPU."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[Path, Tensor] = {}
        self._made = 0

    def tensors(self, shapes: Iterable[tuple[str, tuple[int, ...]]]) -> dict[str, Tensor]:
        """bf16, all in one stretch of memory."""
        named = list(shapes)
        sizes = [-(-2 * prod(shape) // _ALIGNMENT) * _ALIGNMENT for _, shape in named]
        starts = [0, *accumulate(sizes)]
        whole = self._map(starts[-1])
        return {
            name: whole[start : start + 2 * prod(shape)].view(torch.bfloat16).view(shape)
            for (name, shape), start in zip(named, starts, strict=False)
        }

    def free(self) -> None:
        """All of it: handles lead nowhere from now on."""
        for path, data in self._known.items():
            data.zero_()
            path.unlink()
        self._known = {}

    def around(self, address: int, device: torch.device) -> tuple[Memory, int]:
        for path, data in self._known.items():
            if 0 <= address - data.data_ptr() < data.numel():
                return _memory(path, data), address - data.data_ptr()
        raise TransportError("this memory has no handle")

    def serves(self, device: torch.device) -> bool:
        return device.type == "cpu"

    def buffer(self, size: int, device: torch.device) -> "FileBuffer":
        return FileBuffer(self, self._map(size))

    def close(self, data: Tensor) -> None:
        """Frees one stretch."""
        for path in [path for path, known in self._known.items() if known.data_ptr() == data.data_ptr()]:
            del self._known[path]
            path.unlink()

    def _map(self, size: int) -> Tensor:
        self._made += 1
        path = self._folder / f"memory-{os.getpid()}-{self._made}"
        self._known[path] = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
        return self._known[path]


class FileBuffer:
    """A bucket."""

    def __init__(self, owner: FileMemory, data: Tensor) -> None:
        self._owner = owner
        self.data = data
        self.memory, _ = owner.around(data.data_ptr(), data.device)

    def close(self) -> None:
        self._owner.close(self.data)


class OpenFile:
    """A learner's, mapped by a host."""

    def __init__(self, memory: Memory) -> None:
        if not Path(memory.handle).exists():  # torch would make one
            raise TransportError(f"the learner's memory is gone: no {memory.handle}")
        self.data: Tensor = torch.from_file(memory.handle, shared=True, size=memory.bytes, dtype=torch.uint8)

    def close(self) -> None:
        self.data = torch.empty(0, dtype=torch.uint8)


class FileReach:
    """A host's, between CPUs."""

    def open(self, memory: Memory) -> OpenFile:
        return OpenFile(memory)

    def join(self, terms: WireTerms, host: str) -> HostWire:
        raise TransportError(f"{host} joins no wire")


class Handleless:
    """Memory of the allocator's that has no handle, as of expandable segments; buckets have one."""

    def __init__(self, exporter: Exporter) -> None:
        self._exporter = exporter

    def around(self, address: int, device: torch.device) -> tuple[Memory, int]:
        raise TransportError("this memory has no handle")

    def serves(self, device: torch.device) -> bool:
        return self._exporter.serves(device)

    def buffer(self, size: int, device: torch.device) -> Buffer:
        return self._exporter.buffer(size, device)


def exporter_of(device: torch.device, files: FileMemory) -> Exporter:
    """A learner's."""
    return files if device.type == "cpu" else CudaExporter()


def reach_of(device: torch.device) -> Reach:
    """A host's."""
    return FileReach() if device.type == "cpu" else CudaReach(device)


def _memory(path: Path, data: Tensor) -> Memory:
    return Memory(str(path), str(path), data.numel())
