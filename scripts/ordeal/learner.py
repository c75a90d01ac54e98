"""Learners that stop exactly where they are told: `python -m ordeal.learner FOLDER`, spoken to in lines of JSON.

Each order is carried out by a fork of this process, which has torch loaded already: an order is {"order": its number,
"fleet", "run", "seed", "step", "phase": where to stop or null, "blow": "SIGKILL", "SIGSTOP" or "gate"}. At a gate the
learner waits for the order {"go": its number}. Events go out as they happen: {"order", "event": "gate" | "stopped" |
"killed" | "published" | "failed", ...}. When the orders end, so do all learners.
"""

import json
import os
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ordeal.content import Content
from weights.cargo import Segment
from weights.codec import encode
from weights.errors import WeightsError
from weights.messages import Request
from weights.publisher import Publisher
from weights.rendezvous import Roster
from weights.transports.shared_memory import SharedMemoryTransport, SocketLink

LOOK_S = 0.01


class Stop:
    """What happens to a learner at its phase; once."""

    def __init__(self, order: dict[str, Any], gate: int) -> None:
        self._order = order
        self._gate = gate
        self._done = False

    def at(self, phase: str) -> None:
        if self._done or phase != self._order["phase"]:
            return
        self._done = True
        if self._order["blow"] == "gate":
            say(order=self._order["order"], event="gate", process=os.getpid())
            os.read(self._gate, 1)
        else:
            os.kill(os.getpid(), getattr(signal, self._order["blow"]))


class StoppingTransport(SharedMemoryTransport):
    """Passes everything on, and meets its stop on the way."""

    def __init__(self, fleet: str, stop: Stop) -> None:
        super().__init__(fleet)
        self._stop = stop

    def connect(self, host: str, deadline_s: float) -> SocketLink:
        link = super().connect(host, deadline_s)
        hosts = self.hosts()
        index, send, stop = hosts.index(host), link.send, self._stop

        def stopping(request: Request, segment: Segment | None, within_s: float) -> None:
            kind = type(request).__name__
            stop.at(f"{kind} to host {index}")
            if stop._order["phase"] == f"half of the {kind} to host {index}":
                frame = encode(request)
                link._stream._socket.send(frame[: len(frame) // 2])
                stop.at(f"half of the {kind} to host {index}")
            send(request, segment, within_s)
            if index == len(hosts) - 1:
                stop.at(f"{kind} sent")

        link.send = stopping  # type: ignore[method-assign]
        return link


def learn(order: dict[str, Any], content: Content, gate: int) -> None:
    """One learner's life."""
    stop = Stop(order, gate)
    tensors = content.tensors(order["seed"])

    def source() -> Iterator[tuple[str, Tensor]]:
        for index, pair in enumerate(tensors.items()):
            if index == len(tensors) // 2:
                stop.at("gathering")
            yield pair

    try:
        roster = Roster.read(order["fleet"])
        transport = StoppingTransport(order["fleet"], stop)
        with Publisher(
            transport, run=order["run"], deadline_s=roster.deadline_s, bucket_bytes=roster.bucket_bytes
        ) as publisher:
            publisher._links.greet()
            stop.at("connected")
            report = publisher.publish(source(), order["step"])
            stop.at("published")
    except WeightsError as error:
        say(order=order["order"], event="failed", error=type(error).__name__, text=str(error))
    else:
        say(order=order["order"], event="published", digest=report.version.digest.hex, hosts=sorted(report.hosts))


def say(**event: Any) -> None:
    os.write(1, (json.dumps(event) + "\n").encode())


def main(folder: str) -> None:
    torch.set_num_threads(1)
    content = Content(Path(folder))
    learners: dict[int, tuple[int, int]] = {}  # process -> order, its gate
    say(order=-1, event="ready")
    unread = b""
    while True:
        if select.select([0], [], [], LOOK_S)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                break
            *lines, unread = (unread + read).split(b"\n")
            for line in lines:
                order = json.loads(line)
                if "go" in order:
                    (gate,) = [gate for number, gate in learners.values() if number == order["go"]]
                    os.write(gate, b"g")
                    continue
                theirs, ours = os.pipe()
                process = os.fork()
                if process == 0:
                    learn(order, content, theirs)
                    os._exit(0)
                os.close(theirs)
                learners[process] = (order["order"], ours)
        with suppress(ChildProcessError):
            process, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            if process:
                number, gate = learners[process]
                if os.WIFSTOPPED(status):
                    say(order=number, event="stopped", process=process)
                else:
                    os.close(gate)
                    del learners[process]
                    say(order=number, event="killed" if os.WIFSIGNALED(status) else "exited")
    for process in learners:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


if __name__ == "__main__":
    main(*sys.argv[1:])
