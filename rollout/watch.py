"""FolderWatch: takes up the steps that a learner writes into a folder, and publishes each to all hosts or none.

It lives in the process that launched the fleet and is, to the hosts, a learner like any other. It knows no Ray.
"""

import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from torch import Tensor

from rollout.errors import DeadlineExceeded, StepNotTaken
from weights.disk import VERSION_FILE, StepFolder, read_step, step_paths
from weights.errors import CommitIncomplete, FolderError, WeightsError
from weights.publisher import Publisher
from weights.report import PublishReport
from weights.version import WeightVersion

MAX_RETRY_S = 600.0
"""Seconds between two attempts at one step, at most; they double, from the poll's on."""

_Signature = tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fault:
    """A step that could not be taken up."""

    signature: _Signature
    text: str
    attempts: int
    retry_at: float
    """By the clock; never, for a step that is bad in itself, until it changes."""


class _Closed(Exception):
    """The watch ends while it reads a step."""


class FolderWatch:
    """Looks into a folder every `poll_s` seconds and takes up its newest step, unless the fleet has it.

    A step that is not sound is reported once and passed over for the next newest, until its folder changes. One that
    the hosts did not take is tried again, less and less often. The old version serves on meanwhile. Steps that were
    overtaken are never read.

    Example:
        with FolderWatch("grpo-run-7", "steps", poll_s=1.0, on_update=print, on_error=print):
            ...
    """

    def __init__(
        self,
        fleet_name: str,
        folder: Path | str,
        *,
        poll_s: float = 1.0,
        on_update: Callable[[PublishReport], None],
        on_error: Callable[[StepNotTaken], None],
        deadline_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Watches from `start` on.

        Args:
            fleet_name: of the roster to publish to.
            folder: where the steps lie; it may come later.
            poll_s: seconds between two looks.
            on_update: told of every update, in the watch's thread.
            on_error: told once of each thing that keeps a step from being taken up, in the watch's thread.
            deadline_s: how long a host may take to answer one message; the roster's unless said.
            clock: seconds, for tests.
        """
        if not poll_s > 0:
            raise ValueError(f"poll_s: got {poll_s}, must be above 0")
        self.folder = Path(os.path.abspath(folder))
        self._fleet_name = fleet_name
        self._poll_s = poll_s
        self._on_update = on_update
        self._on_error = on_error
        self._deadline_s = deadline_s
        self._clock = clock
        self._served: WeightVersion | None = None
        self._served_signature: _Signature | None = None
        self._faults: dict[str, _Fault] = {}
        self._troubles: dict[str, str] = {}
        self._again = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name=f"watch of {self.folder}", daemon=True)

    @property
    def alive(self) -> bool:
        """Whether it is watching."""
        return self._thread.is_alive()

    def start(self) -> Self:
        """Begins to watch."""
        self._thread.start()
        return self

    def close(self, deadline_s: float = 60.0) -> None:
        """Ends the watch. A step that is still being read is dropped; an update that was offered is ended first.

        Raises:
            DeadlineExceeded: the hosts did not end it in time.
        """
        self._closing.set()
        if self._thread.ident is not None:
            self._thread.join(deadline_s)
        if self.alive:
            raise DeadlineExceeded(f"the update from {self.folder} to end", deadline_s)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def take_up_again(self) -> None:
        """The next look publishes the newest step though the fleet has it: for a host that has lost its weights.

        The others take the version that they serve once more, without harm.
        """
        self._again.set()

    def look(self) -> bool:
        """One look, as the thread takes it; returns whether there was an update. Not beside a started watch."""
        try:
            paths = step_paths(self.folder)
        except OSError as error:
            self._trouble("folder", f"{self.folder}: cannot be listed: {error.strerror}; the watch waits for it", error)
            return False
        self._troubles.pop("folder", None)
        names = {path.name for path in paths}
        self._faults = {name: fault for name, fault in self._faults.items() if name in names}
        for path in paths:
            signature = _signature(path)
            if signature == self._served_signature and not self._again.is_set():
                return False
            if self._rests(path, signature):
                continue
            try:
                step = read_step(path, content=False)
                if not self._wants(step.version):
                    return False
                publisher = self._connect(step.version.run)
                if publisher is None:
                    return False
                with publisher:
                    # The tensors end in an error if they are not those of version.yaml, and the publisher takes all of
                    # them before it offers any.
                    report = publisher.publish(self._tensors(step), step.version.step)
            except _Closed:
                return False
            except FolderError as error:
                self._fault(path, signature, error, retry=False)
            except CommitIncomplete as error:
                self._fault(path, signature, error, retry=True)
                return False  # some hosts have it: an older one is no way back
            except (WeightsError, ValueError, OSError) as error:
                self._fault(path, signature, error, retry=True)
            else:
                self._served, self._served_signature = step.version, signature
                self._again.clear()
                self._on_update(report)
                return True
        return False

    def _watch(self) -> None:
        while not self._closing.is_set():
            self.look()
            self._closing.wait(self._poll_s)

    def _wants(self, version: WeightVersion) -> bool:
        """Whether this step, the newest that is not out of the running, is to be taken up."""
        served = self._served
        if served is None or served.run != version.run:
            return True
        return version.step >= served.step and (version != served or self._again.is_set())

    def _connect(self, run: str) -> Publisher | None:
        """None, told as trouble, if the fleet cannot be reached: no step is to blame, and the next look tries again."""
        try:
            # For this update only: between two of them another publisher may come, and no memory is held.
            publisher = Publisher.connect(self._fleet_name, run=run, deadline_s=self._deadline_s)
        except (WeightsError, OSError) as error:
            self._trouble("fleet", f"{self.folder}: its steps cannot be published: {error}", error)
            return None
        self._troubles.pop("fleet", None)
        return publisher

    def _tensors(self, step: StepFolder) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in step.tensors():
            if self._closing.is_set():
                raise _Closed
            yield name, tensor

    def _rests(self, path: Path, signature: _Signature) -> bool:
        fault = self._faults.get(path.name)
        return fault is not None and fault.signature == signature and self._clock() < fault.retry_at

    def _fault(self, path: Path, signature: _Signature, error: Exception, *, retry: bool) -> None:
        before = self._faults.get(path.name)
        attempts = 1 if before is None or before.signature != signature else before.attempts + 1
        pause_s = min(self._poll_s * 2.0 ** min(attempts, 60), MAX_RETRY_S) if retry else float("inf")
        self._faults[path.name] = _Fault(
            signature=signature, text=str(error), attempts=attempts, retry_at=self._clock() + pause_s
        )
        if before is None or before.text != str(error):
            what = "was not taken by the fleet, and is tried again" if retry else "is not sound, and is passed over"
            self._tell(f"{path.name} {what}; what was served serves on: {error}", error)

    def _trouble(self, kind: str, text: str, error: Exception) -> None:
        if self._troubles.get(kind) != text:
            self._troubles[kind] = text
            self._tell(text, error)

    def _tell(self, text: str, cause: Exception) -> None:
        told = StepNotTaken(text)
        told.__cause__ = cause
        self._on_error(told)


def _signature(path: Path) -> _Signature:
    """Changes when a step is replaced, a file of it comes or goes, or its version.yaml is edited."""
    found = []
    for place in (path, path / VERSION_FILE):
        try:
            status = os.lstat(place)
        except OSError:
            continue  # reading it says what is wrong
        size = status.st_size if place != path else 0
        found.append((status.st_dev, status.st_ino, status.st_mtime_ns, size))
    return tuple(found)
