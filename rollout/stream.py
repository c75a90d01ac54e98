"""The completions of one call of `generate`, collected from every host that works on it."""

import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, Self

from rollout.actor import ask, first_answered
from rollout.config import DeadlineConfig
from rollout.errors import DeadlineExceeded, HostDied, HostFailed, HostGone
from rollout.request import Completion, Prompt, SamplingParams

COLLECT_WAIT_S = 2.0  # an unfilled collect is answered after this long: a closed stream leaves no thread behind


class CompletionStream:
    """Completions of one `generate`, as they finish. Closing it ends what still runs.

    Raises, once everything that other hosts had is out: HostDied for a lost process, HostFailed for a host that
    stopped.
    """

    def __init__(
        self,
        actors: Mapping[str, Any],
        batches: Mapping[str, Sequence[tuple[Prompt, SamplingParams]]],
        loads: dict[str, int],
        deadlines: DeadlineConfig,
    ) -> None:
        self._actors = actors
        self._batches = batches
        self._loads = loads
        self._deadlines = deadlines
        self._client = uuid.uuid4().hex
        self._expected = {
            host: {(prompt.id, sample) for prompt, params in batch for sample in range(params.n)}
            for host, batch in batches.items()
        }
        self._collecting: dict[Any, str] = {}
        self._ready: list[Completion] = []
        self._lost: dict[str, set[tuple[str, int]]] = {}
        self._failures: list[str] = []
        for host, expected in self._expected.items():
            self._loads[host] += len(expected)

    def submit(self) -> None:
        """Hands every host its prompts; all accept or none runs."""
        refs = [self._actors[host].submit.remote(self._client, batch) for host, batch in self._batches.items()]
        try:
            ask(refs, "hosts to take prompts", self._deadlines.message_s)
        except BaseException:
            self.close()
            raise
        for host in self._batches:
            self._collect(host)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Completion:
        while not self._ready:
            if not self._collecting:
                self._end()
            self._gather()
        return self._ready.pop(0)

    def close(self) -> None:
        """Cancels what still runs and forgets what was not read."""
        for host, expected in self._expected.items():
            self._loads[host] -= len(expected)
            if expected and host not in self._lost and host in self._actors:
                self._actors[host].close.remote(self._client)
            expected.clear()
        self._collecting.clear()
        self._ready.clear()

    def _collect(self, host: str) -> None:
        if self._expected[host]:
            self._collecting[self._actors[host].collect.remote(self._client, COLLECT_WAIT_S)] = host
        else:
            self._actors[host].close.remote(self._client)

    def _gather(self) -> None:
        """Waits for a host's next answer and takes it in."""
        until = time.monotonic() + self._deadlines.progress_s
        while not self._ready and self._collecting:
            for ref in first_answered(list(self._collecting), COLLECT_WAIT_S):
                host = self._collecting.pop(ref)
                try:
                    self._take(host, ask(ref, f"{host}'s completions", self._deadlines.message_s))
                except HostGone:
                    self._lose(host)
                except HostFailed as error:
                    self._failures.append(f"{host}: {error}")
                    self._lose(host)
            if not self._ready and time.monotonic() > until:
                left = {host: len(expected) for host, expected in self._expected.items() if expected}
                raise DeadlineExceeded(f"the next completion; still running {left}", self._deadlines.progress_s)

    def _take(self, host: str, completions: list[Completion]) -> None:
        for completion in completions:
            self._expected[host].remove((completion.prompt_id, completion.sample))
        self._loads[host] -= len(completions)
        self._ready += completions
        self._collect(host)

    def _lose(self, host: str) -> None:
        self._lost[host] = set(self._expected[host])
        self._loads[host] -= len(self._expected[host])
        self._expected[host].clear()

    def _end(self) -> None:
        """Everything is out: stops the iteration, or says what was lost."""
        if self._failures:
            raise HostFailed("; ".join(self._failures))
        if self._lost:
            hosts, lost = tuple(sorted(self._lost)), set().union(*self._lost.values())
            self._lost = {}
            raise HostDied(hosts, tuple(sorted(lost)))
        raise StopIteration
