"""The calls of the CUDA driver that PyTorch does not offer, typed, each with its own error.

The driver works on the calling thread's current context, and PyTorch sets it only when it has to: a thread that has
done nothing on a device yet has none. So every call here is made inside `current`, with the device's primary context,
which is PyTorch's own.
"""

import ctypes
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from functools import lru_cache
from typing import Any

from weights.errors import TransportError

HANDLE_BYTES = 64

_LIBRARY = "libcuda.so.1"
_LAZY_ENABLE_PEER_ACCESS = 1
_NON_BLOCKING = 1


class Code(IntEnum):
    """Results that are told apart."""

    INVALID_VALUE = 1
    OUT_OF_MEMORY = 2
    INVALID_DEVICE = 101
    INVALID_CONTEXT = 201
    PEER_ACCESS_UNSUPPORTED = 217
    TOO_MANY_PEERS = 711


class Attribute(IntEnum):
    """What can be asked of an address."""

    BUFFER_ID = 7
    LEGACY_IPC_CAPABLE = 10


class CudaFault(TransportError):
    """A call of the CUDA driver failed."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message, code)
        self.code = code

    def __str__(self) -> str:
        return str(self.args[0])


class _Handle(ctypes.Structure):
    """CUipcMemHandle, which is passed by value."""

    _fields_ = (("data", ctypes.c_ubyte * HANDLE_BYTES),)


class CudaLibrary:
    """The driver of this process. Every method but `current` is called inside `current`. CudaFault where one fails."""

    def __init__(self, library: Any) -> None:
        """library: what has the driver's functions as attributes."""
        self._library = library
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._lock = threading.Lock()

    @contextmanager
    def current(self, device: int) -> Iterator[None]:
        """The device's primary context is the thread's current one; what was current before is so again after it."""
        context = self._context(device)
        self._call("cuCtxPushCurrent_v2", context)
        try:
            yield
        finally:
            self._call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))

    def address_range(self, address: int) -> tuple[int, int]:
        """First address and bytes of the allocation around `address`."""
        start, size = ctypes.c_uint64(), ctypes.c_size_t()
        self._call("cuMemGetAddressRange_v2", ctypes.byref(start), ctypes.byref(size), ctypes.c_uint64(address))
        return start.value, size.value

    def attribute(self, attribute: Attribute, address: int) -> int:
        found = ctypes.c_uint64()  # zeroed: some attributes are narrower, and the machine is little-endian
        self._call("cuPointerGetAttribute", ctypes.byref(found), ctypes.c_int(attribute), ctypes.c_uint64(address))
        return found.value

    def export(self, address: int) -> bytes:
        """The IPC handle, HANDLE_BYTES long, of the allocation that begins at `address`."""
        handle = _Handle()
        self._call("cuIpcGetMemHandle", ctypes.byref(handle), ctypes.c_uint64(address))
        return bytes(handle.data)

    def open(self, handle: bytes) -> int:
        """The address at which another process's allocation can be read and written here."""
        address, by_value = ctypes.c_uint64(), _Handle.from_buffer_copy(handle)
        self._call("cuIpcOpenMemHandle_v2", ctypes.byref(address), by_value, ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS))
        return address.value

    def close(self, address: int) -> None:
        """Undoes one `open`."""
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def allocate(self, size: int) -> int:
        """The address of `size` new bytes."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(size))
        return address.value

    def free(self, address: int) -> None:
        """Waits for all work on the device."""
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def free_bytes(self) -> int:
        """What can still be allocated on the device."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def create_stream(self) -> int:
        """A stream that nobody else works on, and that does not wait for the default one. PyTorch's own streams come
        from a pool, where a kernel that waits for a peer would hold up whoever was given the same one."""
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(_NON_BLOCKING))
        return stream.value or 0

    def destroy_stream(self, stream: int) -> None:
        self._call("cuStreamDestroy_v2", ctypes.c_void_p(stream))

    def _context(self, device: int) -> ctypes.c_void_p:
        """Retained once and never released: PyTorch keeps the primary context for the life of the process too."""
        with self._lock:
            if device not in self._contexts:
                ordinal, context = ctypes.c_int(), ctypes.c_void_p()
                self._call("cuInit", ctypes.c_uint(0))
                self._call("cuDeviceGet", ctypes.byref(ordinal), ctypes.c_int(device))
                self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
                self._contexts[device] = context
            return self._contexts[device]

    def _call(self, function: str, *arguments: Any) -> None:
        code = getattr(self._library, function)(*arguments)
        if code:
            name, text = (self._text(asked, code) for asked in ("cuGetErrorName", "cuGetErrorString"))
            raise CudaFault(f"{function} answered {name} ({code}): {text}", code)

    def _text(self, function: str, code: int) -> str:
        found = ctypes.c_char_p()
        getattr(self._library, function)(ctypes.c_int(code), ctypes.byref(found))
        return (found.value or b"unknown").decode()


@lru_cache(maxsize=1)
def cuda_library() -> CudaLibrary:
    """The machine's. TransportError without one."""
    try:
        return CudaLibrary(ctypes.CDLL(_LIBRARY))
    except OSError as error:
        raise TransportError(
            f"CUDA's driver library cannot be loaded ({error}): device memory is shared on a machine with an NVIDIA "
            "driver; elsewhere use the transport shared_memory"
        ) from error
