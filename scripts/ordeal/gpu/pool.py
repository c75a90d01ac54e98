"""Processes under test: forks of one that has loaded PyTorch, spoken to over pipes, each wait with a deadline.

Spare ones are kept warm, since a process on a GPU takes seconds to start.
"""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ordeal.gpu import worker
from ordeal.gpu.terms import Terms

PATIENCE_S = 60.0
LOOK_S = 0.002


class Actor:
    """The judge's end of a host or a learner."""

    def __init__(self, device: str, wire: bool) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["ordeal.gpu.worker"])
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=worker.run, args=(theirs, device, wire), daemon=True)
        self._process.start()
        theirs.close()
        assert self._process.pid is not None
        self.process: int = self._process.pid
        self._is_warm = False

    def become(self, role: str, terms: Terms, name: str = "") -> "Actor":
        """Takes its role; returns when it has."""
        self.await_warm()
        self._connection.send({"as": role, "terms": terms, "name": name})
        self.event("ready")
        return self

    def await_warm(self) -> None:
        """It has done what takes long."""
        if not self._is_warm:
            self.event("warm")
            self._is_warm = True

    def tell(self, do: str, **arguments: Any) -> None:
        self._connection.send({"do": do, **arguments})

    def event(self, *kinds: str, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """What it says next, which is one of these kinds."""
        if not self._connection.poll(within_s):
            raise TimeoutError(f"process {self.process} did not say {' or '.join(kinds)} within {within_s} s")
        try:
            said: dict[str, Any] = self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            raise TimeoutError(f"process {self.process} has ended, expected {' or '.join(kinds)}") from error
        assert said["event"] in kinds, f"process {self.process} said {said}, expected {' or '.join(kinds)}"
        return said

    def ask(self, do: str, within_s: float = PATIENCE_S, **arguments: Any) -> Any:
        self.tell(do, **arguments)
        return self.event(do, within_s=within_s)["result"]

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.process, number)

    def await_struck(self, blow: str, within_s: float = PATIENCE_S) -> None:
        """Until it is dead, or stopped."""
        wanted = "ZX" if blow == "SIGKILL" else "T"
        ends_at = time.monotonic() + within_s
        while (found := self._status()) not in wanted:
            if time.monotonic() > ends_at:
                raise TimeoutError(f"process {self.process} was to meet its {blow} within {within_s} s, is {found}")
            time.sleep(LOOK_S)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self.process, signal.SIGKILL)
        self._process.join(PATIENCE_S)
        self._process.close()
        self._connection.close()

    def _status(self) -> str:
        try:
            text = Path(f"/proc/{self.process}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return "X"
        return text.rpartition(")")[2].split()[0]


class Pool:
    """Warm processes for each device; for one thread."""

    def __init__(self, devices: dict[str, int], *, wire: bool) -> None:
        """devices: how many spare ones each is to have. wire: whether they will be on one."""
        self._wire = wire
        with _server_environment():
            self._spare = {device: [Actor(device, wire) for _ in range(count)] for device, count in devices.items()}

    def take(self, device: str) -> Actor:
        """The spare process that is ready first; another one begins to start."""
        self._spare[device].append(Actor(device, self._wire))
        return self._spare[device].pop(0)

    def await_warm(self) -> None:
        """All spare ones."""
        for spare in self._spare.values():
            for actor in spare:
                actor.await_warm()

    def drain(self) -> None:
        """Ends all spare ones: what is left on the devices is the fleet's."""
        for spare in self._spare.values():
            while spare:
                spare.pop().end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.drain()


@contextmanager
def _server_environment() -> Iterator[None]:
    """What the server of forks has to find as it starts, which it does with the first process."""
    wanted = {"PYTHONPATH": os.pathsep.join(sys.path), "TORCH_CPP_LOG_LEVEL": "FATAL"}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)  # it preloads by the path alone; and PyTorch reports each lost peer at length
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
