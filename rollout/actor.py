"""The Ray shell of a host: one line per method, so that everything under it can be tested without Ray."""

import os
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded, HostGone
from rollout.host import Host
from rollout.introduction import Introduction
from rollout.metrics import HostMetrics, Observation
from rollout.request import Completion, Prompt, SamplingParams, Score
from rollout.status import HostStatus
from weights.digest import Digest
from weights.version import WeightVersion

NAMESPACE = "moe-rollout"


class HostActor:
    """A host in a process of its own. `collect` has threads of its own, so that waiting clients never hold up the
    rest."""

    def __init__(self, config: RolloutConfig, host_id: str, hold: bool) -> None:
        self._start = partial(Host, config, host_id, hold=hold)
        self._host_id = host_id
        self._admitted = False

    def start(self) -> Introduction:
        """Loads the checkpoint. Not done by __init__, whose errors Ray reports as a dead actor."""
        self.host = self._start()
        metrics = HostMetrics(self.host.config.name, self.host.host_id)
        self.observation = Observation(lambda: metrics.observe(self.host.status(), self.host.totals()))
        return self.host.introduction

    def introduce(self) -> Introduction:
        """What it said when it started."""
        return self.host.introduction

    def admit(self) -> None:
        """It is at the fleet's version and may take prompts from everybody."""
        self._admitted = True

    def admitted(self) -> bool:
        """Whether it may take prompts."""
        return self._admitted

    def submit(self, client: str, prompts: Sequence[tuple[Prompt, SamplingParams]]) -> None:
        """Queues prompts."""
        self.host.submit(client, prompts)

    @ray.method(concurrency_group="collect")
    def collect(self, client: str, wait_s: float) -> list[Completion]:
        """What has finished for a client."""
        return self.host.collect(client, wait_s)

    def cancel(self, client: str, prompt_ids: Sequence[str]) -> None:
        """Ends prompts of a client; they come back as aborted."""
        self.host.cancel(client, prompt_ids)

    def close(self, client: str) -> None:
        """Ends everything of a client."""
        self.host.close(client)

    @ray.method(concurrency_group="collect")
    def score(self, sequences: Sequence[tuple[int, ...]], deadline_s: float) -> list[Score]:
        """Log-probabilities of given tokens."""
        return self.host.score(sequences, deadline_s)

    def status(self) -> HostStatus:
        """What the host is doing; "starting" until its checkpoint is loaded."""
        return self.host.status() if hasattr(self, "host") else HostStatus.absent(self._host_id, "starting", "")

    @ray.method(concurrency_group="collect")
    def verify(self) -> tuple[WeightVersion | None, Digest]:
        """The version it serves, and the digest of what it holds, recomputed."""
        return self.host.verify()

    @ray.method(concurrency_group="collect")
    def share(self, host_id: str, address: str) -> WeightVersion:
        """Brings a sibling to this host's version."""
        return self.host.share(host_id, address)

    def stop(self) -> None:
        """Ends the engine and closes the door for learners."""
        if hasattr(self, "host"):
            self.observation.stop()
            self.host.stop()


RemoteHost: Any = ray.remote(concurrency_groups={"collect": 64})(HostActor)
"""HostActor as Ray places it: `RemoteHost.options(...).remote(config, host_id, hold)`."""


def ask(refs: Any, awaited: str, deadline_s: float) -> Any:
    """The answer to one call, or to a list of them, with our errors.

    Raises:
        HostGone: the actor's process is gone.
        DeadlineExceeded: no answer in time; says what was waited for.
        Exception: what the host raised, as it raised it.
    """
    try:
        return ray.get(refs, timeout=deadline_s)
    except RayTaskError as error:
        raise error.cause from None
    except RayActorError as error:
        raise HostGone(f"waited for {awaited}: {error}") from None
    except GetTimeoutError:
        raise DeadlineExceeded(awaited, deadline_s) from None


def first_answered(refs: list[Any], wait_s: float) -> list[Any]:
    """The first call that has an answer (or an error); empty when none has one in time."""
    answered, _ = ray.wait(refs, num_returns=1, timeout=wait_s)
    return list(answered)


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """How a call of a host ended."""

    value: Any = None
    error: str = ""
    """What it raised; empty where it answered."""
    raised: BaseException | None = None
    gone: bool = False
    """Its process is no more."""


class Call:
    """A call of a host, to be looked at without waiting."""

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def outcome(self, wait_s: float = 0) -> Outcome | None:
        """None while there is none yet."""
        if not first_answered([self._ref], wait_s):
            return None
        try:
            return Outcome(value=ray.get(self._ref))
        except RayTaskError as error:
            return Outcome(error=f"{type(error.cause).__name__}: {error.cause}", raised=error.cause)
        except RayActorError as error:
            return Outcome(error="its process ended", raised=HostGone(str(error)), gone=True)
        except RayError as error:
            return Outcome(error=f"Ray lost it: {error}", raised=HostGone(str(error)), gone=True)


class Placement:
    """Where Ray puts the hosts of a fleet, and how it is rid of them."""

    def __init__(self, config: RolloutConfig, options: dict[str, Any]) -> None:
        self._config = config
        self._options = options

    def place(self, host_id: str, incarnation: int, hold: bool) -> Any:
        """A new actor; it has loaded nothing yet."""
        name = actor_name(self._config.name, host_id, incarnation)
        options = RemoteHost.options(name=name, namespace=NAMESPACE, **self._options)
        return options.remote(self._config, host_id, hold)

    def call(self, actor: Any, method: str, *args: Any) -> Call:
        """Begins a call."""
        return Call(getattr(actor, method).remote(*args))

    def end(self, actor: Any, introduction: Introduction | None) -> None:
        """Ends the process at once. A frozen one does not hear Ray, so on this machine it is killed directly."""
        if introduction is not None and introduction.machine == socket.gethostname():
            with suppress(ProcessLookupError):
                os.kill(introduction.process, signal.SIGKILL)
        with suppress(RayError):
            ray.kill(actor)

    def stop(self, actors: Sequence[Any], deadline_s: float) -> None:
        """Asks hosts to end what they are doing, and waits for all of them together."""
        refs = [actor.stop.remote() for actor in actors]
        if refs:
            ray.wait(refs, num_returns=len(refs), timeout=deadline_s)


def actor_name(fleet: str, host_id: str, incarnation: int) -> str:
    """What Ray calls the actor of a host: FLEET/HOST, and FLEET/HOST.N when it was started again for the N-th time."""
    return f"{fleet}/{host_id}" + (f".{incarnation}" if incarnation else "")


def named_hosts(fleet: str) -> dict[str, tuple[int, str]]:
    """Host id -> (incarnation, Ray's name) of a fleet's living hosts; the newest where one was started again."""
    found: dict[str, tuple[int, str]] = {}
    for name in named_actors():
        owner, _, rest = name.rpartition("/")
        host_id, _, incarnation = rest.partition(".")
        if owner == fleet:
            found[host_id] = max(found.get(host_id, (-1, "")), (int(incarnation or 0), name))
    return dict(sorted(found.items()))


def named_actors() -> list[str]:
    """Ray's names of all living hosts of all fleets."""
    named = ray.util.list_named_actors(all_namespaces=True)
    return sorted(entry["name"] for entry in named if entry["namespace"] == NAMESPACE)


def find_actor(name: str) -> Any:
    """The actor of this name; None if it ended meanwhile."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None
