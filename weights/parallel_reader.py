"""ParallelReader: several threads read slices of files or of memory, and stream them to their places on a device.

The life of a slice: a thread takes the next one, lends a page-locked buffer, reads into it (without the interpreter's
lock), launches a copy of each part to its place, and gives the buffer back, which nobody gets before these copies have
ended. On a CPU bytes are read straight into their places.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from weights.dtypes import dtype_name, fits
from weights.pinned import PinnedRing
from weights.slicing import Slice, cut

DEFAULT_THREADS = 16
DEFAULT_SLICE_BYTES = 8 << 20
LEAVE_S = 10.0
"""How long a read that fails or is interrupted waits for its threads, one of which a file system may be holding."""


class Source(Protocol):
    """Where bytes come from."""

    def fill(self, places: Sequence[Tensor], start: int) -> None:
        """Reads consecutive bytes, from byte `start` on, into `places`: flat uint8 on the CPU.

        Several threads call it at once. An error names the source.
        """
        ...

    def locked(self, start: int, size: int) -> Tensor | None:
        """These bytes where they are, if that is page-locked memory."""
        ...


class HostMemory:
    """Memory of this process as a source, such as a mapped segment."""

    def __init__(self, data: Tensor) -> None:
        """data: flat uint8 on the CPU."""
        self._data = data
        self._locked = data.is_pinned()

    def fill(self, places: Sequence[Tensor], start: int) -> None:
        for place in places:
            # NumPy's copy lets other threads run, and starts none of its own.
            np.copyto(place.numpy(), self._data[start : start + place.numel()].numpy())
            start += place.numel()

    def locked(self, start: int, size: int) -> Tensor | None:
        return self._data[start : start + size] if self._locked else None


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to be read."""

    source: Source
    start: int
    """Its first byte in the source."""
    dtype: torch.dtype
    """In the source; the target's own, or one that it widens exactly."""
    target: Tensor
    """Contiguous, written in place."""

    @property
    def bytes(self) -> int:
        """In the source."""
        return self.target.numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read, and how long it took."""

    bytes: int
    seconds: float
    """Until the last byte was in its place."""

    @property
    def bytes_per_s(self) -> float:
        return self.bytes / self.seconds if self.seconds else 0.0


class ParallelReader:
    """Reads onto one device; its buffers are kept from one read to the next. One read at a time."""

    def __init__(
        self,
        device: torch.device | str,
        *,
        threads: int | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        straight: bool = True,
    ) -> None:
        """threads: as many as there are cores for this process, at most 16, unless said. slice_bytes: read at once.

        It takes one and a half times threads * slice_bytes of page-locked memory, when it is first used.

        straight: on a CPU, whether bytes skip the buffers where they can. ValueError for no threads, or tiny slices.
        """
        if threads is None:
            threads = min(DEFAULT_THREADS, len(os.sched_getaffinity(0)))
        if threads < 1:
            raise ValueError(f"a reader has at least one thread, got {threads}")
        # More buffers than threads: some are copied while as many as there are threads are filled.
        self._ring = PinnedRing(device, buffers=threads + -(-threads // 2), buffer_bytes=slice_bytes)
        self._threads = threads
        self._slice_bytes = slice_bytes
        self._straight = straight and self.device.type == "cpu"

    @property
    def device(self) -> torch.device:
        return self._ring.device

    def read(self, wanted: Iterable[Wanted]) -> Reading:
        """Fills all targets and waits until they are.

        Work on the device that is launched already on the current stream goes first. After an error, or an
        interruption, some targets are written and some are not, and nothing writes to them any more.

        Raises:
            ValueError: targets on another device, not contiguous, or of a dtype that does not hold the wanted one;
                nothing has been written then.
            WeightsError: what the source raises.
        """
        began = time.perf_counter()
        wanted = list(wanted)
        _check(wanted, self.device)
        jobs: deque[_Job] = deque()
        for source, of_source in _by_source(wanted).items():
            extents = [(each.start, each.bytes) for each in of_source]
            jobs.extend(_Job(source, of_source, piece) for piece in cut(extents, self._slice_bytes))
        stream = self._ring.stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream(self.device))
        try:
            self._run(jobs)
        finally:
            if stream is not None:
                stream.synchronize()
        return Reading(sum(each.bytes for each in wanted), time.perf_counter() - began)

    def _run(self, jobs: "deque[_Job]") -> None:
        errors: list[BaseException] = []
        stop = threading.Event()

        def work() -> None:
            try:
                # Parameters may be inference tensors; both of these hold for one thread.
                with torch.inference_mode(), torch.cuda.stream(self._ring.stream):
                    while not stop.is_set():
                        try:
                            job = jobs.popleft()
                        except IndexError:
                            return
                        self._carry_out(job, stop)
            except BaseException as error:  # a thread's edge: whoever called read() gets it
                errors.append(error)
                stop.set()

        # Daemons: one that a file system holds for good does not keep the process from ending.
        threads = [
            threading.Thread(target=work, name=f"reader {index}", daemon=True)
            for index in range(min(self._threads, len(jobs)))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            stop.set()
            ends_at = time.monotonic() + LEAVE_S
            for thread in threads:
                if thread.ident is not None:
                    thread.join(max(ends_at - time.monotonic(), 0.0))
        if errors:
            raise errors[0]

    def _carry_out(self, job: "_Job", stop: threading.Event) -> None:
        locked = job.source.locked(job.slice.start, job.slice.bytes)
        if locked is not None:
            _copy(locked, job)
        elif self._straight and not job.widens:
            job.source.fill(job.places(), job.slice.start)
        else:
            with self._ring.lent() as buffer:
                data = buffer[: job.slice.bytes]
                job.source.fill([data], job.slice.start)
                if not stop.is_set():  # else the caller may be gone already, and the targets another's
                    _copy(data, job)


@dataclass(frozen=True, slots=True)
class _Job:
    source: Source
    wanted: Sequence[Wanted]
    slice: Slice

    @property
    def widens(self) -> bool:
        return any(self.wanted[part.tensor].dtype != self.wanted[part.tensor].target.dtype for part in self.slice.parts)

    def places(self) -> list[Tensor]:
        """The place of each part: flat, uint8 where the target's dtype is the source's, else in the target's dtype."""
        found = []
        for part in self.slice.parts:
            each = self.wanted[part.tensor]
            flat, start, stop = each.target.detach().view(-1), part.offset, part.offset + part.bytes
            if each.dtype == flat.dtype:
                found.append(flat.view(torch.uint8)[start:stop])
            else:
                size = each.dtype.itemsize
                found.append(flat[start // size : stop // size])
        return found


def _copy(data: Tensor, job: _Job) -> None:
    """Launches the copies of a slice's bytes, flat uint8 in host memory, to their places."""
    # One call for all parts of a slice: it is the interpreter's lock that threads would wait for.
    parts = torch.split(data, [part.bytes for part in job.slice.parts])
    targets: list[Tensor] = []
    pieces: list[Tensor] = []
    for part, place, piece in zip(job.slice.parts, job.places(), parts, strict=True):
        wire = job.wanted[part.tensor].dtype
        if wire == job.wanted[part.tensor].target.dtype:
            targets.append(place)
            pieces.append(piece)
        else:
            # Widened where it goes: half the bytes travel, and memory of its own is aligned for any dtype.
            there = torch.empty(part.bytes, dtype=torch.uint8, device=place.device)
            there.copy_(piece, non_blocking=True)
            place.copy_(there.view(wire))
    if targets:
        torch._foreach_copy_(targets, pieces, non_blocking=True)


def _check(wanted: Sequence[Wanted], device: torch.device) -> None:
    faults = []
    for index, each in enumerate(wanted):
        target = each.target
        if target.device != device or not target.is_contiguous():
            faults.append(f"{index}: {target.device}, strides {target.stride()}; expected {device} and contiguous")
        elif not fits(each.dtype, target.dtype):
            faults.append(f"{index}: {dtype_name(each.dtype)} does not fit into {dtype_name(target.dtype)} exactly")
    if faults:
        raise ValueError("these targets cannot be read into:\n  " + "\n  ".join(faults))


def _by_source(wanted: Iterable[Wanted]) -> dict[Source, list[Wanted]]:
    found: dict[Source, list[Wanted]] = {}
    for each in wanted:
        found.setdefault(each.source, []).append(each)
    return found
