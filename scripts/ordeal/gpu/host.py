"""A host that stops where it is told: a receiver behind its server, with parameters that are read all the time."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from ordeal.gpu.memory import reach_of
from ordeal.gpu.model import Model, checksum, same_bits
from ordeal.gpu.shortage import Shortage
from ordeal.gpu.stop import Stop, nth
from ordeal.gpu.terms import SIBLING_S, Terms
from weights.aside import settled
from weights.errors import DeadlineExceeded
from weights.lease_payload import LeasePayload
from weights.messages import Deliver, Join, Offer, Reply, Request, Stage
from weights.payload import Payload
from weights.reach import Reach
from weights.receiver import Receiver
from weights.rendezvous import socket_path
from weights.staging import StagedUpdate
from weights.stream_payload import StreamPayload
from weights.transports.nccl import WireReach
from weights.transports.server import HostServer
from weights.transports.shared_memory import siblings
from weights.version import WeightVersion

STEP_S = 0.004
PAUSE_S = 1.0
TAKEOVER_S = 0.4
"""A second learner asks one host after the other, and the first must not fall silent meanwhile."""


class Steps:
    """Serving: instead of generating, every step reads all parameters and notes under which version."""

    def __init__(self, parameters: dict[str, Tensor], stop: Stop) -> None:
        self._parameters = parameters
        self._stop = stop
        self._running = threading.Lock()
        self.serves: WeightVersion | None = None
        self.torn_because = ""
        self.seen: dict[tuple[str, int], set[int]] = {}
        """For each version that served, by run and step: checksums of what its steps read."""
        threading.Thread(target=self._step, daemon=True).start()

    @contextmanager
    def paused(self) -> Iterator[None]:
        if not self._running.acquire(timeout=PAUSE_S):
            raise DeadlineExceeded(f"the running step did not end within {PAUSE_S} s")
        try:
            self._stop.at("paused")
            yield
        finally:
            self._running.release()

    def committed(self, version: WeightVersion) -> None:
        self._stop.at("verified")
        self.serves, self.torn_because = version, ""

    def torn(self, reason: str) -> None:
        self.serves, self.torn_because = None, reason

    def _step(self) -> None:
        while True:
            with self._running:
                serves = self.serves
                if serves is not None:
                    with suppress(torch.OutOfMemoryError):  # a step on a full device does not take place
                        found = checksum(self._parameters)
                        self.seen.setdefault((serves.run, serves.step), set()).add(found)
            time.sleep(STEP_S)


class StoppingReceiver(Receiver):
    """Comes to its stop between and within requests."""

    def __init__(self, stop: Stop, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._stop = stop
        self._device: torch.device = next(iter(arguments["parameters"].values())).device
        join = self._known.join

        def stopping(request: Join) -> str:
            stop.at("joining")
            return join(request)

        self._known.join = stopping  # type: ignore[method-assign]

    def handle(self, request: Request, segment: Tensor | None = None) -> Reply:
        name = self._name(request)
        self._stop.at(f"{name} arrives")
        reply = super().handle(request, segment)
        self._stop.at(f"{name} answered")
        return reply

    def _name(self, request: Request) -> str:
        kind, update = type(request).__name__, self._course.update
        if update is None or not isinstance(request, Stage | Deliver):
            return kind
        payload = update.payload
        count = payload.buckets if isinstance(payload, StreamPayload) else payload.stages
        return f"{kind} {nth(request.bucket, count)}".strip()

    def _planned(self, offer: Offer) -> StagedUpdate:
        self._stop.at("planning")
        update = super()._planned(offer)
        payload: Payload = update.payload
        if isinstance(payload, LeasePayload):
            payload.read = self._before("staging", payload.read)  # type: ignore[method-assign]
        else:
            payload.stage = self._before("staging", payload.stage)  # type: ignore[method-assign]
        payload.write = self._after("written", self._before("writing", payload.write))  # type: ignore[method-assign]
        return update

    def _before(self, phase: str, call: Callable[..., None]) -> Callable[..., None]:
        def stopping(*arguments: Any) -> None:
            self._stop.at(phase)
            call(*arguments)

        return stopping

    def _after(self, phase: str, call: Callable[..., None]) -> Callable[..., None]:
        def stopping(*arguments: Any) -> None:
            call(*arguments)
            if self._stop.phase == phase:
                settled(self._device)  # the bytes are there
                self._stop.at(phase)

        return stopping


class Host:
    """One, until its process ends."""

    def __init__(self, name: str, terms: Terms, model: Model) -> None:
        """It has no version: it serves nothing until a complete commit."""
        terms.enter()
        self._model = model
        self._shortage = Shortage(model.device)
        self._stop = Stop({"device full": self._shortage.begin})
        self._parameters = model.storage()
        self._steps = Steps(self._parameters, self._stop)
        reach: Reach = WireReach(model.device, terms.message_s) if terms.transport == "nccl" else reach_of(model.device)
        self._receiver = StoppingReceiver(
            self._stop,
            host=name,
            layout=model.layout(self._parameters),
            parameters=self._parameters,
            serving=self._steps,
            version=None,
            reach=reach,
            silence_s=terms.silence_s,
        )
        self._server = HostServer(
            self._receiver,
            socket_path(terms.fleet, name),
            lambda: siblings(terms.fleet, name, deadline_s=SIBLING_S),
            deadline_s=2 * terms.message_s,
            takeover_s=TAKEOVER_S,
        )
        self._sums: dict[int, int] = {}

    def arm(self, phase: str | None, blow: str) -> None:
        self._stop.arm(phase, blow)

    def recover(self) -> None:
        """What the blow took from the device is there again."""
        self._stop.arm(None, "")
        self._shortage.end()

    def state(self) -> str:
        return self._receiver.state.value

    def told(self) -> bool:
        """Whether the blow has fallen."""
        return self._stop.phase is None

    def described(self) -> dict[str, Any]:
        """What it serves, and what is wrong with that, if anything: a version's step is the seed of its content."""
        wrong = []
        with self._steps._running:  # no commit goes on, and none begins
            serves, version = self._steps.serves, self._receiver.version
            if serves != version:
                wrong.append(f"serves {serves} and says that it holds {version}")
            if serves is not None:
                if not same_bits(self._parameters, self._model.hosted(serves.step)):
                    wrong.append(f"serves {serves} and holds other bits")
                elif self._receiver.live_digest() != serves.digest:
                    wrong.append(f"serves {serves}, whose digest is not that of its bits")
            seen, self._steps.seen = self._steps.seen, {}
        for (run, step), sums in seen.items():
            if sums != {self._expected(step)}:
                wrong.append(f"steps under {run}@{step} read something else")
        return {
            "state": self.state(),
            "serves": None if serves is None else [serves.run, serves.step],
            "torn_because": self._steps.torn_because,
            "steps": sum(len(sums) for sums in seen.values()),
            "wrong": wrong,
        }

    def close(self) -> None:
        self._server.close()

    def _expected(self, step: int) -> int:
        if step not in self._sums:
            self._sums = {step: checksum(self._model.hosted(step))}
        return self._sums[step]
