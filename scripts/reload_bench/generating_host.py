"""A host in a process of its own that generates all the time, and tells when its steps ran and under which version."""

import hashlib
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch

from rollout.config import RolloutConfig
from rollout.host import Host
from rollout.introduction import Introduction
from rollout.request import Prompt, SamplingParams
from rollout.terms import roster_of
from weights.rendezvous import RosterHost


@dataclass(frozen=True, slots=True)
class Ready:
    """The host is up."""

    introduction: Introduction
    start_s: float
    process: int


@dataclass(frozen=True, slots=True)
class Step:
    """One step of the engine, by the machine's monotonic clock."""

    began_s: float
    ended_s: float
    version: int
    """The learner's step of the weights it ran under; 0 for those of the start."""


class Watched:
    """A host whose engine's steps are timed, with a number of sequences that never run out."""

    def __init__(self, fields: dict[str, Any], host_id: str, sequences: int) -> None:
        self.host = Host(RolloutConfig.from_mapping(fields), host_id)
        self.steps: list[Step] = []
        self._context = self.host.config.engine.max_context
        engine = self.host._loop.engine
        step = engine.step

        def timed():  # type: ignore[no-untyped-def]
            began, version = time.monotonic(), engine.version.step if engine.version.run != "checkpoint" else 0
            finished = step()
            self.steps.append(Step(began, time.monotonic(), version))
            return finished

        engine.step = timed  # type: ignore[method-assign]
        for number in range(sequences):
            self.ask(number)

    def ask(self, number: int) -> None:
        """One more sequence."""
        prompt = Prompt(id=f"{number}-{time.monotonic_ns()}", token_ids=tuple(range(5, 21)))
        params = SamplingParams(max_tokens=self._context - 16, temperature=1.0, ignore_eos=True)
        self.host.submit("bench", [(prompt, params)])

    def refill(self) -> None:
        """Starts a sequence for each that ended."""
        for number, _ in enumerate(self.host.collect("bench", 0.0)):
            self.ask(number)

    def fingerprint(self, names: list[str]) -> dict[str, str]:
        """blake2b of the bytes of hosted tensors, by wire name: no code of the update's."""
        engine = self.host._loop.engine
        views = dict(engine.model.layout.state_dict(engine.model.parameters))
        return {name: fingerprint(views[name]) for name in names}


def fingerprint(tensor: torch.Tensor) -> str:
    """Of a tensor in bfloat16, whatever it is held as."""
    data = tensor.detach().to(torch.bfloat16).cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def run(fields: dict[str, Any], host_id: str, sequences: int, device: int, line: Connection) -> None:
    """The process: answers the bench until it says stop."""
    began = time.monotonic()
    torch.cuda.set_device(device)
    watched = Watched(fields, host_id, sequences)
    host = watched.host
    line.send(Ready(host.introduction, time.monotonic() - began, host.introduction.process))
    while True:
        while not line.poll(0.05):
            watched.refill()
        match line.recv():
            case "steps":
                line.send(list(watched.steps))
            case "verify":
                line.send(host.verify())
            case ["fingerprint", names]:
                line.send(watched.fingerprint(names))
            case "memory":
                line.send((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
            case "stop":
                host.stop()
                line.send("stopped")
                return


def list_hosts(fields: dict[str, Any], ready: list[Ready]) -> None:
    """Writes the roster, as the launcher of a fleet does."""
    introduced = [each.introduction for each in ready]
    hosts = tuple(RosterHost(id=each.host_id, address=str(each.address)) for each in introduced)
    roster_of(RolloutConfig.from_mapping(fields), hosts, introduced).write()
