"""PinnedRing: a few page-locked buffers through which bytes stream to a device.

A device reads page-locked memory at the speed of its bus, any other at a tenth of that. Locking costs as much as
reading, hence few buffers, used again and again. On a CPU they are plain memory, so that the same code runs there.
"""

import queue
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weights.errors import DeadlineExceeded, WeightsError

LEND_DEADLINE_S = 60.0


class PinnedRing:
    """Buffers in host memory, each lent to one user at a time, and only once its last copy has ended.

    Safe to use from several threads. Buffers are made when they are first needed.
    """

    def __init__(self, device: torch.device | str, *, buffers: int, buffer_bytes: int) -> None:
        """device: to which the bytes go. ValueError for a ring of nothing."""
        if buffers < 1 or buffer_bytes < 1:
            raise ValueError(f"a ring has buffers of some bytes, got {buffers} of {buffer_bytes} bytes")
        self.device = torch.device(device)
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.buffer_bytes = buffer_bytes
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None  # type: ignore[no-untyped-call]
        """Copies out of a lent buffer go here, and nowhere else; None on a CPU, where they have ended at once."""
        self._buffers = buffers
        self._made = 0
        self._making = threading.Lock()
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()

    @contextmanager
    def lent(self, deadline_s: float = LEND_DEADLINE_S) -> Iterator[Tensor]:
        """A buffer, flat uint8: fill it, and launch copies out of it on `stream`.

        Raises:
            DeadlineExceeded: all buffers are lent, and none came back in time.
            WeightsError: the machine does not give the memory.
        """
        buffer = self._take(deadline_s)
        try:
            if buffer.copied is not None:
                buffer.copied.synchronize()
            yield buffer.data
        finally:
            if buffer.copied is not None:
                buffer.copied.record(self.stream)
            self._free.put(buffer)

    def _take(self, deadline_s: float) -> "_Buffer":
        try:
            return self._free.get_nowait()
        except queue.Empty:
            buffer = self._make()
        if buffer is not None:
            return buffer
        try:
            return self._free.get(timeout=deadline_s)
        except queue.Empty:
            raise DeadlineExceeded(
                f"all {self._buffers} buffers on the way to {self.device} were lent, and none came back within "
                f"{deadline_s} s"
            ) from None

    def _make(self) -> "_Buffer | None":
        """A new buffer; None if all are made."""
        with self._making:
            if self._made == self._buffers:
                return None
            self._made += 1
        try:
            return _Buffer(self.buffer_bytes, locked=self.stream is not None)
        except RuntimeError as error:
            with self._making:
                self._made -= 1
            raise WeightsError(
                f"{self.buffer_bytes} bytes of host memory on the way to {self.device} cannot be page-locked, after "
                f"{self._made} such buffers: {error}; free host memory, or allow fewer buffers"
            ) from error


@dataclass(slots=True)
class _Buffer:
    data: Tensor = field(init=False)
    copied: torch.cuda.Event | None = field(init=False)
    """Recorded behind the last copy. Waiting for it leaves the core to others: to those that fill buffers."""

    def __init__(self, size: int, *, locked: bool) -> None:
        with torch.inference_mode(False):  # else only those who are in that mode could fill it
            self.data = torch.empty(size, dtype=torch.uint8, pin_memory=locked)
        self.copied = torch.cuda.Event(blocking=True) if locked else None  # type: ignore[no-untyped-call]
