"""Broadcasts between GPUs by NCCL, on a stream of their own.

What the environment sets for NCCL holds here too: NCCL_NVLS_ENABLE=0 keeps it from NVLink multicast, NCCL_MAX_CTAS
bounds the SMs that a broadcast takes from a host that generates meanwhile, NCCL_SOCKET_IFNAME picks the network on
which ranks meet.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

import torch
from torch import Tensor

from weights.cuda_library import CudaLibrary, cuda_library
from weights.errors import TransportError
from weights.wires.meeting import Meeting
from weights.wires.nccl_library import ID_BYTES, NcclLibrary, nccl_library

_POLL_S = 0.001
_ID_KEY = "nccl id"


class Lane(Protocol):
    """A device's stream that belongs to one wire."""

    @property
    def device(self) -> torch.device: ...

    @property
    def stream(self) -> int:
        """As NCCL takes it."""
        ...

    def chosen(self) -> AbstractContextManager[object]:
        """The device is the thread's current one."""
        ...

    def follow(self) -> None:
        """What is queued on the caller's stream comes before what is queued here from now on."""
        ...

    def mark(self) -> Callable[[], bool]:
        """Whether all that is queued here by now has run, asked whenever it is called."""
        ...

    def close(self) -> None: ...


class CudaLane:
    """The real one."""

    def __init__(self, device: torch.device, driver: CudaLibrary) -> None:
        assert device.index is not None
        self.device = device
        self._driver = driver
        with driver.current(device.index):
            self.stream = driver.create_stream()
        self._stream: torch.cuda.Stream = torch.cuda.ExternalStream(self.stream, device=device)  # type: ignore[no-untyped-call]

    def chosen(self) -> AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def mark(self) -> Callable[[], bool]:
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return event.query

    def close(self) -> None:
        assert self.device.index is not None
        with self._driver.current(self.device.index):
            self._driver.destroy_stream(self.stream)


def open_nccl(meeting: Meeting, *, rank: int, size: int, device: torch.device) -> "NcclChannel":
    """Meets the others and connects to them, until the meeting's deadline. What `Meeting.arrive` raises, or
    TransportError."""
    library = nccl_library()
    store = meeting.arrive()
    if rank == 0:
        # Only now, with everybody there: the thread by which NCCL serves an id waits for all ranks, for ever.
        store.set(_ID_KEY, library.unique_id().hex())
    unique_id = bytes.fromhex(meeting.read(store, _ID_KEY).decode())
    channel = NcclChannel(library, CudaLane(device, cuda_library()), unique_id, rank=rank, size=size)
    try:
        while not channel.idle():
            meeting.pause()
    except BaseException:
        channel.stop()
        raise
    return channel


class NcclChannel:
    """A communicator and its stream."""

    def __init__(self, library: NcclLibrary, lane: Lane, unique_id: bytes, *, rank: int, size: int) -> None:
        """Begins to connect; `idle` says when it has. TransportError if NCCL refuses."""
        assert len(unique_id) == ID_BYTES
        self.device = lane.device
        self._library = library
        self._lane = lane
        try:
            with lane.chosen():
                self._communicator = library.start(unique_id, rank=rank, size=size)
        except TransportError:
            lane.close()
            raise

    def idle(self) -> bool:
        """Whether it takes a broadcast. TransportError if it has failed."""
        return self._library.idle(self._communicator)

    def start(self, data: Tensor, root: int, deadline_s: float) -> "NcclTransfer":
        with _device_faults(), self._lane.chosen():
            self._lane.follow()
            self._library.broadcast(
                self._communicator, data.data_ptr(), data.numel(), root=root, stream=self._lane.stream
            )
        return NcclTransfer(self.idle, self._lane, data)

    def stop(self) -> None:
        self._library.abort(self._communicator)
        with self._lane.chosen():
            empty = self._lane.mark()
        while not empty():
            time.sleep(_POLL_S)
        self._lane.close()


class NcclTransfer:
    """A broadcast that NCCL first queues in a thread of its own, then runs on the device."""

    def __init__(self, idle: Callable[[], bool], lane: Lane, data: Tensor) -> None:
        self._idle = idle
        self._lane = lane
        self._data = data  # kept for as long as NCCL may write to it
        self._ended: Callable[[], bool] | None = None

    def begun(self) -> bool:
        if self._ended is None and self._idle():
            with _device_faults(), self._lane.chosen():
                self._ended = self._lane.mark()
        return self._ended is not None

    def done(self) -> bool:
        if not self.begun():
            return False
        assert self._ended is not None
        with _device_faults():
            if self._ended():
                return True
        self._idle()  # raises what NCCL has noticed about a peer
        return False


@contextmanager
def _device_faults() -> Iterator[None]:
    """What PyTorch raises for a device in trouble, which is not the wire's doing, ends the wire all the same."""
    try:
        yield
    except RuntimeError as error:
        raise TransportError(f"the device failed: {error}") from error
