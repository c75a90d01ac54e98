"""Device memory that two processes share: whose it is, its handle, and the other end that opens it.

PyTorch's own sharing sends a handle per tensor, caches what it opened for ever, and cannot tell a new allocation from
an old one at the same address. Here an allocation is the unit (a PyTorch segment holds many tensors), it has an
identity, and what is opened is closed once.
"""

import os
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from weights.cuda_library import HANDLE_BYTES, Attribute, Code, CudaFault, CudaLibrary, cuda_library
from weights.errors import DeviceFull, TransportError
from weights.foreign import borrow

_EXPANDABLE = (
    "memory of PyTorch's expandable segments, of cudaMallocAsync and of memory pools has no such handle: start the "
    "learner without PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True (and without backend:cudaMallocAsync)"
)


@dataclass(frozen=True, slots=True)
class Allocation:
    """What one call of an allocator returned: for PyTorch a segment with many tensors."""

    address: int
    """Of its first byte."""
    bytes: int
    identity: int
    """The driver's number for it, not used twice in a process: memory that is freed and allocated again at the same
    address has another one."""
    device: int
    """Index, as this process counts devices."""


def allocation_of(address: int, device: int, *, library: CudaLibrary | None = None) -> Allocation:
    """The allocation around `address` (a tensor's `data_ptr()`) on `device` (its index).

    TransportError if that is no device memory of this process.
    """
    driver = library or cuda_library()
    with driver.current(device):
        try:
            start, size = driver.address_range(address)
            return Allocation(start, size, driver.attribute(Attribute.BUFFER_ID, start), device)
        except CudaFault as fault:
            raise TransportError(f"{address:#x} is no address in device memory of this process: {fault}") from fault


def export(allocation: Allocation, *, library: CudaLibrary | None = None) -> str:
    """A handle by which other processes of this machine open it: 128 hexadecimal digits.

    TransportError if it was freed since, or is of a kind that has no handle.
    """
    driver = library or cuda_library()
    with driver.current(allocation.device):
        try:
            identity = driver.attribute(Attribute.BUFFER_ID, allocation.address)
            capable = driver.attribute(Attribute.LEGACY_IPC_CAPABLE, allocation.address)
        except CudaFault as fault:
            raise TransportError(f"{allocation} cannot be shared, it was freed: {fault}") from fault
        if identity != allocation.identity:
            raise TransportError(f"{allocation} cannot be shared, it was freed: its address holds another, {identity}")
        if not capable:
            raise TransportError(f"{allocation} cannot be shared: {_EXPANDABLE}")
        try:
            return driver.export(allocation.address).hex()
        except CudaFault as fault:
            raise TransportError(f"{allocation} cannot be shared: {fault}; {_EXPANDABLE}") from fault


class _Held:
    """Memory outside PyTorch's allocator until `close`."""

    def __init__(self, address: int, size: int, device: torch.device, driver: CudaLibrary) -> None:
        self.address = address
        self.bytes = size
        self.device = device
        self.data: Tensor = borrow(address, size, device)
        """Flat uint8 over all of it, no copy; empty once closed. Views of it must not be used after that."""
        self._driver = driver
        self._open = True

    def close(self) -> None:
        """Gives it back; a second call does nothing. No work on the device may still use it."""
        if not self._open:
            return
        self._open = False
        self.data = torch.empty(0, dtype=torch.uint8, device=self.device)
        with self._driver.current(_index(self.device)):
            self._give_back()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _give_back(self) -> None:
        raise AssertionError("each kind of memory is given back its own way")


class Opened(_Held):
    """Another process's allocation, mapped here until it is closed, however its owner ends."""

    def __init__(self, handle: str, size: int, device: torch.device, *, library: CudaLibrary | None = None) -> None:
        """handle: what `export` gave there. size: `Allocation.bytes`. device: with its index; the one whose kernels
        will read it, which may be another one than the memory's, if the two reach each other.

        TransportError naming the likely cause if it cannot be opened. ValueError for a device without an index.
        """
        driver = library or cuda_library()
        index = _index(device)
        with driver.current(index):
            try:
                address = driver.open(_from_hex(handle))
            except CudaFault as fault:
                raise TransportError(
                    f"cannot open a learner's device memory ({size} bytes) on {device}: {fault}; {_cause(fault.code)}"
                ) from fault
            try:
                found = driver.address_range(address)[1]
                if found < size:
                    raise TransportError(
                        f"a learner's device memory has {found} bytes here, its owner says {size}: it was freed and "
                        "allocated again since its handle was made"
                    )
                super().__init__(address, size, device, driver)
            except BaseException:
                driver.close(address)
                raise

    def _give_back(self) -> None:
        self._driver.close(self.address)


class DeviceBuffer(_Held):
    """Memory of its own, by the driver: it can be shared whatever PyTorch's allocator is set to."""

    def __init__(self, size: int, device: torch.device, *, library: CudaLibrary | None = None) -> None:
        """DeviceFull if there is no room for `size` bytes on `device` (with its index), also after PyTorch's unused
        memory was given back."""
        if size <= 0:
            raise ValueError(f"a buffer has at least a byte, got {size}")
        driver = library or cuda_library()
        index = _index(device)
        with driver.current(index):
            try:
                address = _allocate(driver, size)
            except CudaFault as fault:
                if fault.code != Code.OUT_OF_MEMORY:
                    raise
                raise DeviceFull(
                    f"{device} has no room for a buffer of {size} bytes, {driver.free_bytes()} are free: make the "
                    "buckets smaller, or leave more memory free when the learner or the cache of the host is sized"
                ) from fault
            try:
                super().__init__(address, size, device, driver)
            except BaseException:
                driver.free(address)
                raise

    def allocation(self) -> Allocation:
        """To be exported."""
        return allocation_of(self.address, _index(self.device), library=self._driver)

    def _give_back(self) -> None:
        self._driver.free(self.address)


def _allocate(driver: CudaLibrary, size: int) -> int:
    try:
        return driver.allocate(size)
    except CudaFault as fault:
        if fault.code != Code.OUT_OF_MEMORY:
            raise
    torch.cuda.empty_cache()  # what PyTorch keeps for later is of no use to the driver
    return driver.allocate(size)


def _from_hex(handle: str) -> bytes:
    try:
        raw = bytes.fromhex(handle)
    except ValueError:
        raw = b""
    if len(raw) != HANDLE_BYTES:
        raise TransportError(f"a device memory's handle is {2 * HANDLE_BYTES} hexadecimal digits, got {handle!r:.80}")
    return raw


def _index(device: torch.device) -> int:
    if device.index is None:
        raise ValueError(f"a device is named with its index, such as {device}:0, got {device}")
    return device.index


def _cause(code: int) -> str:
    """What a refused handle most likely means."""
    if code == Code.INVALID_CONTEXT:
        return "a process cannot open its own memory: learner and host are one process here, use the transport memory"
    if code in (Code.PEER_ACCESS_UNSUPPORTED, Code.TOO_MANY_PEERS):
        return "the two GPUs cannot reach each other's memory: use the transport nccl"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all devices")
    return (
        f"its owner is gone or has freed it, runs on another machine or in another container, or has it on a device "
        f"that is not visible here (CUDA_VISIBLE_DEVICES: {visible}; let both see the device)"
    )
