"""NCCL's own calls, typed: a communicator that never waits inside a call.

`torch.distributed.ProcessGroupNCCL` would do the same work and cannot be used here. Its watchdog takes the whole
process down when a peer dies, unless the trainer's environment says otherwise; its heartbeat does so when an abort
takes long; it waits for peers inside the first broadcast, without a deadline of ours; and its watchdog queries events
while the host may be capturing a CUDA graph. None of that may happen to a trainer because a host died.
"""

import ctypes
import os
from functools import lru_cache
from typing import Any

from weights.errors import TransportError

ID_BYTES = 128

_LIBRARY = "libnccl.so.2"
_OLDEST = 21800  # 2.18, whose configuration is declared below; later ones read it as that
_MAGIC = 0xCAFEBEEF
_UNDEFINED = -(1 << 31)
_UINT8 = 1
_INVALID_USAGE = 5
_IN_PROGRESS = 7


class _Id(ctypes.Structure):
    """ncclUniqueId, which is passed by value."""

    _fields_ = (("data", ctypes.c_byte * ID_BYTES),)


class Configuration(ctypes.Structure):
    """ncclConfig_t of NCCL 2.18. A library reads as many bytes as `size` says and knows the rest from `version`."""

    _fields_ = (
        ("size", ctypes.c_size_t),
        ("magic", ctypes.c_uint),
        ("version", ctypes.c_uint),
        ("blocking", ctypes.c_int),
        ("cluster_size", ctypes.c_int),
        ("fewest_blocks", ctypes.c_int),
        ("most_blocks", ctypes.c_int),
        ("network", ctypes.c_char_p),
        ("split_share", ctypes.c_int),
    )


class Communicator:
    """What `start` returns: NCCL keeps the address of the handle until the communicator is ready."""

    def __init__(self) -> None:
        self.handle = ctypes.c_void_p()


class NcclLibrary:
    """No method waits, `abort` apart. TransportError, with NCCL's words, where a call fails."""

    def __init__(self, library: Any) -> None:
        """library: what has NCCL's functions as attributes. TransportError if it is too old, or told to block."""
        if os.environ.get("NCCL_COMM_BLOCKING", "0") == "1":
            raise TransportError(
                "NCCL_COMM_BLOCKING=1 makes NCCL wait for dead peers for ever: a wire needs it unset in the environment"
            )
        self._library = library
        version = ctypes.c_int()
        self._check("ncclGetVersion", library.ncclGetVersion(ctypes.byref(version)))
        self.version = version.value
        if self.version < _OLDEST:
            raise TransportError(f"a wire needs NCCL {_OLDEST} or later, {_LIBRARY} is {self.version}")

    def unique_id(self) -> bytes:
        """A new communicator's, ID_BYTES long: made by one rank, where a thread of NCCL's serves it, and told to the
        others."""
        made = _Id()
        self._check("ncclGetUniqueId", self._library.ncclGetUniqueId(ctypes.byref(made)))
        return bytes(made)

    def start(self, unique_id: bytes, *, rank: int, size: int) -> Communicator:
        """Begins to connect this rank, on the thread's current device; `idle` says when it is connected."""
        configuration = Configuration(
            size=ctypes.sizeof(Configuration),
            magic=_MAGIC,
            version=_OLDEST,
            blocking=0,
            cluster_size=_UNDEFINED,
            fewest_blocks=_UNDEFINED,
            most_blocks=_UNDEFINED,
            network=None,
            split_share=_UNDEFINED,
        )
        communicator = Communicator()
        code = self._library.ncclCommInitRankConfig(
            ctypes.byref(communicator.handle),
            ctypes.c_int(size),
            _Id.from_buffer_copy(unique_id),
            ctypes.c_int(rank),
            ctypes.byref(configuration),
        )
        try:
            self._check("ncclCommInitRankConfig", code)
        except TransportError:
            if communicator.handle.value:
                self._library.ncclCommAbort(communicator.handle)
            raise
        return communicator

    def idle(self, communicator: Communicator) -> bool:
        """Whether the last call on it has come to its end: connected, or queued on its stream.

        TransportError if that call, or anything since, failed.
        """
        state = ctypes.c_int()
        code = self._library.ncclCommGetAsyncError(communicator.handle, ctypes.byref(state))
        self._check("ncclCommGetAsyncError", code, communicator)
        self._check("a peer or the network", state.value, communicator)
        return state.value != _IN_PROGRESS

    def broadcast(self, communicator: Communicator, address: int, size: int, *, root: int, stream: int) -> None:
        """Begins to queue a broadcast of `size` bytes, in place at `address` on every rank; `idle` says when it is."""
        code = self._library.ncclBroadcast(
            ctypes.c_void_p(address),
            ctypes.c_void_p(address),
            ctypes.c_size_t(size),
            ctypes.c_int(_UINT8),
            ctypes.c_int(root),
            communicator.handle,
            ctypes.c_void_p(stream),
        )
        self._check("ncclBroadcast", code, communicator)

    def abort(self, communicator: Communicator) -> None:
        """Ends all of its work, on the device too, and frees it. It waits, and asks nothing of the peers."""
        self._check("ncclCommAbort", self._library.ncclCommAbort(communicator.handle))

    def _check(self, what: str, code: int, communicator: Communicator | None = None) -> None:
        if code in (0, _IN_PROGRESS):
            return
        handle = None if communicator is None else communicator.handle
        words = [_text(self._library.ncclGetErrorString(ctypes.c_int(code)))]
        words += [text] if (text := _text(self._library.ncclGetLastError(handle))) else []
        if code == _INVALID_USAGE:
            words.append("NCCL takes one rank per GPU: on a shared GPU use the transport cuda_ipc")
        raise TransportError(f"NCCL {self.version_text}: {what} failed with code {code}: {'; '.join(words)}")

    @property
    def version_text(self) -> str:
        """As NCCL writes it, 2.18.0; 'of unknown version' before it has said."""
        version = getattr(self, "version", None)
        return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else "of unknown version"


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode(errors="replace").strip()


@lru_cache(maxsize=1)
def nccl_library() -> NcclLibrary:
    """The one that PyTorch has loaded. TransportError where there is none."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError as error:
        raise TransportError(
            f"NCCL cannot be loaded ({error}): it comes with PyTorch's CUDA builds; without one use gloo"
        ) from error
    library.ncclGetErrorString.restype = ctypes.c_char_p
    library.ncclGetLastError.restype = ctypes.c_char_p
    return NcclLibrary(library)
