"""Wire: one rank broadcasts flat bytes to all others, and a dead peer costs a deadline, never a hang.

A learner is one rank (or several, each the root of its own buckets), its hosts are the others. Every rank calls for the
same broadcasts, of the same sizes and from the same roots, in the same order; nothing on the wire says what they are.
A wire that failed once is dead on this rank, and its peers find out at their own deadlines: all of them open a new one.

On the root a broadcast has ended when the bytes have left. That they have arrived is known only from the others, so a
wire is closed when all of them have said so.
"""

import threading
import time
from typing import Literal, Protocol

import torch
from torch import Tensor

from weights.errors import DeadlineExceeded, TransportError
from weights.wires.channel import Channel, Transfer
from weights.wires.gloo import open_gloo
from weights.wires.limit import Errand
from weights.wires.meeting import Meeting, StoreServer
from weights.wires.nccl import open_nccl

STOP_S = 5.0
"""How long a wire that failed waits, after the deadline, for its device to let go of the caller's bytes. It takes
milliseconds, unless something else is wrong with the machine."""

_POLL_S = 5e-5
_PARTING_S = 1.0  # a rank that opens a wire gives up by itself at the deadline, and says more than its caller could
_GREETING = bytes(range(64))


class Posted(Protocol):
    """A broadcast under way."""

    def wait(self) -> None:
        """Returns when it has ended (`Wire.broadcast` says what that means), or raises, by the deadline of `post`."""
        ...


class Wire(Protocol):
    """This rank's end. Safe to call from several threads, as long as one of them alone broadcasts."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int:
        """How many ranks there are."""
        ...

    @property
    def alive(self) -> bool:
        """False after anything failed on it, and when it is closed."""
        ...

    def post(self, data: Tensor, root: int, deadline_s: float) -> Posted:
        """Begins a broadcast and returns when another may begin, so that two are in flight; after the work that is
        queued on the caller's current stream. `data` stays as it is until the wait has returned or raised."""
        ...

    def broadcast(self, data: Tensor, root: int, deadline_s: float) -> None:
        """Fills `data` (flat uint8, contiguous, on the wire's device) with the root's bytes, or sends them on the root;
        they are there for every stream and the CPU when it returns.

        DeadlineExceeded after `deadline_s`, TransportError as soon as a peer is known to be gone: the wire is dead
        then, and nothing writes to `data` any more (the text says if that cannot be promised). ValueError for other
        data, another root, or no time.
        """
        ...

    def abort(self) -> None:
        """Ends whatever is under way here, from any thread; who waits for it gets a TransportError."""
        ...

    def close(self) -> None:
        """Ends the wire on this rank; a second call does nothing."""
        ...


def serve_store(port: int = 0) -> StoreServer:
    """Where the ranks of any number of wires meet; the learner serves it. `.port` says where it listens."""
    return StoreServer(port)


def open_wire(
    *,
    backend: Literal["nccl", "gloo"],
    store_host: str,
    store_port: int,
    rank: int,
    size: int,
    device: torch.device,
    deadline_s: float,
    prefix: str,
) -> Wire:
    """Waits until all `size` ranks are connected; a first broadcast has gone through.

    prefix: the wire's name in the store, the same on all ranks and never used before. device: a GPU with its index for
    nccl, no two ranks on the same one; the CPU for gloo. DeadlineExceeded naming who did not come, TransportError,
    ValueError for numbers that do not fit.
    """
    _check(backend, rank, size, device, deadline_s)
    name = f"wire {prefix!r}"
    meeting = Meeting(store_host, store_port, rank=rank, size=size, prefix=prefix, deadline_s=deadline_s)

    def connect() -> Channel:
        if backend == "nccl":
            return open_nccl(meeting, rank=rank, size=size, device=device)
        return open_gloo(meeting, rank=rank, size=size)

    errand = Errand(connect, f"opens {name}", unclaimed=lambda channel: channel.stop())
    try:
        channel = errand.result(deadline_s + _PARTING_S)
    except TimeoutError as error:
        raise meeting.late() from error
    wire = ChannelWire(channel, name=name, rank=rank, size=size)
    _greet(wire, meeting.left_s, device)
    return wire


class ChannelWire:
    """A wire over any channel."""

    def __init__(self, channel: Channel, *, name: str, rank: int, size: int, stop_s: float = STOP_S) -> None:
        self.rank = rank
        self.size = size
        self._channel = channel
        self._name = name
        self._stop_s = stop_s
        self._lock = threading.Lock()  # held only over calls that never wait
        self._ended: str | None = None
        self._stopped = threading.Event()

    @property
    def alive(self) -> bool:
        return self._ended is None

    def post(self, data: Tensor, root: int, deadline_s: float) -> "Sending":
        self._check(data, root, deadline_s)
        what = f"rank {self.rank} of {self._name}: a broadcast of {data.numel()} bytes from rank {root}"
        sending = Sending(self, what, deadline_s)
        fault = None
        with self._lock:
            if self._ended is None:
                if not data.numel():
                    return sending
                try:
                    sending.transfer = self._channel.start(data, root, deadline_s)
                except TransportError as error:
                    fault = f"{what} cannot begin: {error}"
        if sending.transfer is None:
            raise self._gone(fault)
        sending.begin()
        return sending

    def broadcast(self, data: Tensor, root: int, deadline_s: float) -> None:
        self.post(data, root, deadline_s).wait()

    def abort(self) -> None:
        self._end("it was aborted")

    def close(self) -> None:
        self._end("it was closed")

    def ask(self, what: str, transfer: Transfer, question: Literal["begun", "done"]) -> bool:
        """What `transfer` answers. TransportError if it failed, or the wire has ended; it has then."""
        fault = None
        with self._lock:
            if self._ended is None:
                try:
                    return transfer.begun() if question == "begun" else transfer.done()
                except TransportError as error:
                    fault = f"{what} failed: {error}"
        raise self._gone(fault)

    def late(self, what: str, deadline_s: float) -> DeadlineExceeded:
        """Ends the wire; the error to raise."""
        reason = f"{what} did not end within {deadline_s} s: a peer is gone, is stopped, or takes no part"
        return DeadlineExceeded(self._end(reason))

    def _gone(self, fault: str | None) -> TransportError:
        """What to raise on a wire that fails with `fault`, or has ended before."""
        if fault is not None:
            return TransportError(self._end(fault))
        self._stopped.wait(self._stop_s)
        return TransportError(f"{self._name} has ended ({self._ended}): open another one")

    def _end(self, reason: str) -> str:
        """Stops the channel, once, and waits for that; the reason, with what went wrong while stopping."""
        with self._lock:
            first = self._ended is None
            self._ended = self._ended or reason
        if not first:
            self._stopped.wait(self._stop_s)
            return reason
        try:
            Errand(self._channel.stop, f"stops {self._name}").result(self._stop_s)
        except TimeoutError:
            reason += f"; it could not be stopped within {self._stop_s} s, and may still write to its tensors"
        except (TransportError, RuntimeError) as error:
            reason += f"; stopping it failed, and it may still write to its tensors: {error}"
        self._stopped.set()
        return reason

    def _check(self, data: Tensor, root: int, deadline_s: float) -> None:
        if data.dtype != torch.uint8 or data.dim() != 1 or not data.is_contiguous():
            raise ValueError(f"a wire carries flat, contiguous uint8, got {data.dtype} of shape {tuple(data.shape)}")
        if data.device != self._channel.device:
            raise ValueError(f"{self._name} carries bytes on {self._channel.device}, got a tensor on {data.device}")
        if not 0 <= root < self.size:
            raise ValueError(f"{self._name} has ranks 0 to {self.size - 1}, got root {root}")
        if not deadline_s > 0:
            raise ValueError(f"a broadcast has some time, got a deadline of {deadline_s} s")


class Sending:
    """A broadcast on a ChannelWire; without a transfer, of no bytes."""

    def __init__(self, wire: ChannelWire, what: str, deadline_s: float) -> None:
        self.transfer: Transfer | None = None
        self._wire = wire
        self._what = what
        self._deadline_s = deadline_s
        self._ends_at = time.monotonic() + deadline_s

    def begin(self) -> None:
        """Returns when the wire takes another one."""
        self._poll("begun")

    def wait(self) -> None:
        self._poll("done")

    def _poll(self, question: Literal["begun", "done"]) -> None:
        while self.transfer is not None and not self._wire.ask(self._what, self.transfer, question):
            if time.monotonic() >= self._ends_at:
                raise self._wire.late(self._what, self._deadline_s)
            time.sleep(_POLL_S)
        if question == "done":
            self.transfer = None  # with it goes the last hold on the data


def _check(backend: str, rank: int, size: int, device: torch.device, deadline_s: float) -> None:
    kinds = {"nccl": "cuda", "gloo": "cpu"}
    if backend not in kinds:
        raise ValueError(f"a wire is nccl or gloo, got {backend!r}")
    if size < 2 or not 0 <= rank < size:
        raise ValueError(f"a wire has two ranks or more, counted from 0, got rank {rank} of {size}")
    if device.type != kinds[backend] or (device.type == "cuda" and device.index is None):
        wanted = "a GPU with its index" if backend == "nccl" else "the CPU"
        raise ValueError(f"a wire of {backend} works on {wanted}, got {device}")
    if not deadline_s > 0:
        raise ValueError(f"opening a wire takes some time, got a deadline of {deadline_s} s")


def _greet(wire: ChannelWire, left_s: float, device: torch.device) -> None:
    """The first broadcast makes the connections, which takes longer than any later one."""
    greeting = torch.tensor(list(_GREETING), dtype=torch.uint8)
    data = (greeting if wire.rank == 0 else torch.zeros_like(greeting)).to(device)
    wire.broadcast(data, 0, left_s)
    if not torch.equal(data.cpu(), greeting):
        wire.close()
        raise TransportError(f"the first bytes on a wire came wrong at rank {wire.rank}: {bytes(data.tolist()).hex()}")
