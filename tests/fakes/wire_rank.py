"""A rank of a wire in a process of its own, which is told what to do and answers with what came of it."""

import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import pytest
import torch

from weights.errors import TransportError
from weights.wire import Wire, open_wire, serve_store
from weights.wires.meeting import Meeting

PATIENCE_S = 90.0


def contents(size: int, seed: int) -> torch.Tensor:
    """Bytes that tell one broadcast from another, and one place from the next."""
    return ((torch.arange(size, dtype=torch.int64) * 2654435761 + seed * 97) >> 7).to(torch.uint8)


class Rank:
    """What runs in the process: one method per command."""

    def __init__(self, backend: Any, rank: int) -> None:
        self._backend = backend
        self._rank = rank
        self._device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        self._wire: Wire | None = None
        self._store: Any = None

    def serve(self) -> int:
        self._store = serve_store()
        return int(self._store.port)

    def open(self, port: int, size: int, prefix: str, deadline_s: float) -> None:
        self._wire = open_wire(
            backend=self._backend,
            store_host="127.0.0.1",
            store_port=port,
            rank=self._rank,
            size=size,
            device=self._device,
            deadline_s=deadline_s,
            prefix=prefix,
        )

    def arrive(self, port: int, size: int, prefix: str) -> None:
        """Comes to the meeting and goes no further."""
        Meeting("127.0.0.1", port, rank=self._rank, size=size, prefix=prefix, deadline_s=PATIENCE_S).arrive()

    def broadcast(self, size: int, root: int, seed: int, deadline_s: float) -> bool:
        """Whether the right bytes are here."""
        assert self._wire is not None
        expected = contents(size, seed).to(self._device)
        data = expected.clone() if self._rank == root else torch.full_like(expected, 255)
        self._wire.broadcast(data, root, deadline_s)
        return torch.equal(data, expected)

    def pair(self, size: int, deadline_s: float) -> bool:
        """Two in flight, from two roots, waited for in the other order."""
        assert self._wire is not None
        expected = [contents(size, root).to(self._device) for root in (0, 1)]
        data = [fill if self._rank == root else torch.full_like(fill, 255) for root, fill in enumerate(expected)]
        posted = [self._wire.post(part, root, deadline_s) for root, part in enumerate(data)]
        for sending in reversed(posted):
            sending.wait()
        return all(torch.equal(part, fill) for part, fill in zip(data, expected, strict=True))

    def stream(self, size: int, deadline_s: float) -> None:
        """Broadcasts from rank 0 until something goes wrong."""
        assert self._wire is not None
        data = torch.zeros(size, dtype=torch.uint8, device=self._device)
        while True:
            self._wire.broadcast(data, 0, deadline_s)

    def rate(self, size: int, times: int) -> float:
        """GB/s of `times` broadcasts of `size` bytes from rank 0, two in flight."""
        assert self._wire is not None
        data = [torch.zeros(size, dtype=torch.uint8, device=self._device) for _ in range(2)]
        self._wire.broadcast(data[0], 0, 30.0)
        began = time.monotonic()
        posted = [self._wire.post(data[0], 0, 30.0)]
        for turn in range(1, times):
            posted.append(self._wire.post(data[turn % 2], 0, 30.0))
            posted.pop(0).wait()
        posted.pop().wait()
        return size * times / (time.monotonic() - began) / 1e9

    def multiply(self) -> bool:
        """Whether the device still computes."""
        ones = torch.ones(256, 256, device=self._device)
        return bool((ones @ ones == 256).all())

    def used_bytes(self) -> int:
        """Of the device's memory, by all processes."""
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def close(self) -> bool:
        assert self._wire is not None
        self._wire.close()
        return self._wire.alive


def run(connection: Connection, backend: str, rank: int) -> None:
    """The process: answers ("ok", result, seconds) or (error's class, text, seconds)."""
    torch.set_num_threads(1)
    served = Rank(backend, rank)
    while True:
        command, arguments = connection.recv()
        began = time.monotonic()
        try:
            result: Any = ("ok", getattr(served, command)(*arguments))
        except (TransportError, ValueError) as error:
            result = (type(error).__name__, str(error))
        connection.send((*result, time.monotonic() - began))


class RankProcess:
    """The test's end of it."""

    def __init__(self, backend: str, rank: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fakes.wire_rank"])  # torch is imported once, not once per process
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=run, args=(theirs, backend, rank), daemon=True)
        with pytest.MonkeyPatch.context() as patched:
            patched.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # the server of forks preloads by it alone
            self._process.start()
        theirs.close()

    def tell(self, command: Callable[..., Any], *arguments: Any) -> "RankProcess":
        """Gives a command, one of Rank's methods, and does not wait."""
        self._connection.send((command.__name__, arguments))
        return self

    def answer(self) -> tuple[str, Any, float]:
        """'ok' or the error's class; the result or its text; seconds."""
        assert self._connection.poll(PATIENCE_S), "a rank did not answer"
        answer: tuple[str, Any, float] = self._connection.recv()
        return answer

    def ask(self, command: Callable[..., Any], *arguments: Any) -> Any:
        kind, result, _ = self.tell(command, *arguments).answer()
        assert kind == "ok", result
        return result

    def signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self) -> None:
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()
