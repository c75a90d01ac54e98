"""The Ray shell of a host: one line per method, so that everything under it can be tested without Ray."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded, HostGone
from rollout.host import Host, Introduction
from rollout.request import Completion, Prompt, SamplingParams, Score
from rollout.status import HostStatus


class HostActor:
    """A host in a process of its own. `collect` has threads of its own, so that waiting clients never hold up the
    rest."""

    def __init__(self, config: RolloutConfig, host_id: str) -> None:
        self._start = partial(Host, config, host_id)

    def start(self) -> Introduction:
        """Loads the checkpoint. Not done by __init__, whose errors Ray reports as a dead actor."""
        self.host = self._start()
        return self.host.introduction

    def introduce(self) -> Introduction:
        """What it said when it started."""
        return self.host.introduction

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
        """What the host is doing."""
        return self.host.status()

    def stop(self) -> None:
        """Ends the engine and closes the door for learners."""
        if hasattr(self, "host"):
            self.host.stop()


RemoteHost: Any = ray.remote(concurrency_groups={"collect": 64})(HostActor)
"""HostActor as Ray places it: `RemoteHost.options(...).remote(config, host_id)`."""


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
