"""The completions of one call of `generate`, collected from every host that works on it."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Self

from rollout.actor import ask, first_answered
from rollout.balance import Rotation
from rollout.config import DeadlineConfig
from rollout.errors import DeadlineExceeded, HostDied, HostFailed, HostGone
from rollout.request import Completion, Prompt, SamplingParams

COLLECT_WAIT_S = 2.0  # an unfilled collect is answered after this long: a closed stream leaves no thread behind


@dataclass(slots=True, eq=False)
class Leg:
    """What one host does for a stream."""

    host_id: str
    actor: Any
    batch: list[tuple[Prompt, SamplingParams]] = field(default_factory=list)
    expected: set[tuple[str, int]] = field(default_factory=set)
    """(prompt id, sample) without an answer yet."""


class CompletionStream:
    """Completions of one `generate`, as they finish. Closing it, or leaving its `with` block, ends what still runs.

    Raises, once everything that other hosts had is out: HostDied for a lost process, HostFailed for a host that
    stopped.

    Args:
        rotation: where the load of the work is counted.
        place: gives a host and its actor for each of these weights, in order.
    """

    def __init__(
        self,
        rotation: Rotation,
        deadlines: DeadlineConfig,
        place: Callable[[Sequence[int]], list[tuple[str, Any]]],
    ) -> None:
        self._rotation = rotation
        self._deadlines = deadlines
        self._place = place
        self._client = uuid.uuid4().hex
        self._legs: list[Leg] = []
        self._collecting: dict[Any, Leg] = {}
        self._ready: list[Completion] = []
        self._lost: dict[str, set[tuple[str, int]]] = {}
        self._failures: list[str] = []

    def submit(self, work: Sequence[tuple[Prompt, SamplingParams]]) -> None:
        """Hands every host its prompts; all are accepted or none runs. A host that is found dead is passed over."""
        try:
            while work:
                work = self._hand_out(work)
        except BaseException:
            self.close()
            raise
        for leg in self._legs:
            self._collect(leg)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Completion:
        while not self._ready:
            if not self._collecting:
                self._end()
            self._gather()
        return self._ready.pop(0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def cancel(self, prompt_ids: Sequence[str]) -> None:
        """Ends every sample of these prompts where it stands; they come back as aborted."""
        wanted = set(prompt_ids)
        for leg in self._legs:
            ids = sorted({prompt_id for prompt_id, _ in leg.expected} & wanted)
            if ids:
                leg.actor.cancel.remote(self._client, ids)

    def close(self) -> None:
        """Cancels what still runs and forgets what was not read."""
        for leg in self._legs:
            if leg.expected and leg.host_id not in self._lost:
                leg.actor.close.remote(self._client)
            self._forget(leg)
        self._collecting.clear()
        self._ready.clear()

    def _hand_out(self, work: Sequence[tuple[Prompt, SamplingParams]]) -> list[tuple[Prompt, SamplingParams]]:
        """Places work on hosts; returns what was placed on those that are gone."""
        new: dict[int, list[tuple[Prompt, SamplingParams]]] = {}
        for item, (host_id, actor) in zip(work, self._place([params.n for _, params in work]), strict=True):
            leg = next((leg for leg in self._legs if leg.actor is actor), None)
            if leg is None:
                leg = Leg(host_id, actor)
                self._legs.append(leg)
            prompt, params = item
            leg.batch.append(item)
            leg.expected |= {(prompt.id, sample) for sample in range(params.n)}
            new.setdefault(self._legs.index(leg), []).append(item)
        refs = {index: self._legs[index].actor.submit.remote(self._client, batch) for index, batch in new.items()}
        gone = []
        for index, ref in refs.items():
            leg = self._legs[index]
            try:
                ask(ref, f"{leg.host_id} to take prompts", self._deadlines.message_s)
            except (HostGone, HostFailed):
                self._rotation.take_out(leg.host_id, leg.actor)
                gone.append(leg)
        for leg in gone:
            self._forget(leg)
            self._legs.remove(leg)
        return [item for leg in gone for item in leg.batch]

    def _collect(self, leg: Leg) -> None:
        if leg.expected:
            self._collecting[leg.actor.collect.remote(self._client, COLLECT_WAIT_S)] = leg
        else:
            leg.actor.close.remote(self._client)

    def _gather(self) -> None:
        """Waits for a host's next answer and takes it in."""
        until = time.monotonic() + self._deadlines.progress_s
        while not self._ready and self._collecting:
            for ref in first_answered(list(self._collecting), COLLECT_WAIT_S):
                leg = self._collecting.pop(ref)
                try:
                    self._take(leg, ask(ref, f"{leg.host_id}'s completions", self._deadlines.message_s))
                except HostGone:
                    self._lose(leg)
                except HostFailed as error:
                    self._failures.append(f"{leg.host_id}: {error}")
                    self._lose(leg)
            if not self._ready and time.monotonic() > until:
                left = {leg.host_id: len(leg.expected) for leg in self._legs if leg.expected}
                raise DeadlineExceeded(f"the next completion; still running {left}", self._deadlines.progress_s)

    def _take(self, leg: Leg, completions: list[Completion]) -> None:
        for completion in completions:
            leg.expected.remove((completion.prompt_id, completion.sample))
        self._rotation.done(leg.host_id, len(completions))
        self._ready += completions
        self._collect(leg)

    def _lose(self, leg: Leg) -> None:
        self._rotation.take_out(leg.host_id, leg.actor)
        self._lost.setdefault(leg.host_id, set()).update(leg.expected)
        self._forget(leg)

    def _forget(self, leg: Leg) -> None:
        self._rotation.done(leg.host_id, len(leg.expected))
        leg.expected.clear()

    def _end(self) -> None:
        """Everything is out: stops the iteration, or says what was lost."""
        if not self._lost:
            raise StopIteration
        hosts, lost = tuple(sorted(self._lost)), tuple(sorted(set().union(*self._lost.values())))
        self._lost = {}
        if self._failures:
            raise HostFailed("; ".join([*self._failures, str(HostDied(hosts, lost))]))
        raise HostDied(hosts, lost)
