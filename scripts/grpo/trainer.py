"""The loop: while the learner trains on one batch and publishes, the hosts are already at the next.

A batch's prompts go out in three shares:
1. when the learner starts to train, so that the hosts have work meanwhile: made with the weights before;
2. when it starts to publish, so that there is always something running when the commit comes: partly with either;
3. after the commit: made with the very weights that the learner will hold when it trains on this batch, and compared.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from grpo.batch import Batch
from grpo.collate import collate
from grpo.messages import FromLearner, Published, Trained
from grpo.record import Record
from grpo.task import ANSWER_TOKENS, draw_prompts, reward
from rollout import Completion, Prompt, SamplingParams
from weights import WeightVersion

LEARNER_DEADLINE_S = 120.0


class Generator(Protocol):
    """What the loop needs of a fleet."""

    def generate(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> Iterable[Completion]: ...


class LearnerLink(Protocol):
    """What the loop needs of the learner's process."""

    def send(self, message: Batch) -> None: ...

    def receive(self, awaited: str, deadline_s: float) -> FromLearner | None: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How much of everything."""

    updates: int = 60
    shares: tuple[int, int, int] = (24, 8, 32)
    """Prompts of the three shares."""
    samples: int = 8
    """Completions per prompt."""
    seed: int = 0
    """Of the prompts; what is sampled depends on when each commit falls, and no two runs are alike."""

    @property
    def sampling(self) -> SamplingParams:
        """Plain sampling at temperature 1: the behaviour policy is the model itself."""
        return SamplingParams(n=self.samples, max_tokens=ANSWER_TOKENS, ignore_eos=True, record_routing=True)


class Trainer:
    """Hands out prompts, scores what comes back, feeds the learner.

    Args:
        first_version: what the hosts serve before the first update.
    """

    def __init__(self, fleet: Generator, learner: LearnerLink, plan: Plan, first_version: WeightVersion) -> None:
        self.fleet = fleet
        self.learner = learner
        self.plan = plan
        self._update_of = {first_version: 0}

    def run(self, observe: Callable[[Record], None]) -> list[Record]:
        """All updates; `observe` sees each as it is done.

        Raises what a host's or the learner's death raises, and DeadlineExceeded where one of them stands still.
        """
        records: list[Record] = []
        completions = list(self.fleet.generate(self._prompts(0), self.plan.sampling))
        for update in range(1, self.plan.updates + 1):
            started = time.perf_counter()
            rewards = [reward(c.prompt_token_ids, c.token_ids) for c in completions]
            self.learner.send(collate(completions, rewards, self._update_of, samples=self.plan.samples))
            ahead = self._prompts(update) if update < self.plan.updates else ()
            trained, published, following = self._overlap(update, ahead)
            record = Record.of(
                completions,
                rewards,
                trained,
                published,
                generated=sum(len(c.token_ids) for c in following),
                seconds=time.perf_counter() - started,
            )
            records.append(record)
            observe(record)
            completions = following
        return records

    def _overlap(self, update: int, prompts: Sequence[Prompt]) -> tuple[Trained, Published, list[Completion]]:
        """The learner's update and the next batch, side by side."""
        early, at_publish, _ = self.plan.shares
        streams = self._open(prompts[:early])
        completions: list[Completion] = []
        trained: Trained | None = None
        published: Published | None = None
        while streams or published is None:
            if published is None:
                awaited = f"the learner to {'train' if trained is None else 'publish'} update {update}"
                message = self.learner.receive(awaited, 0.0 if streams else LEARNER_DEADLINE_S)
                if isinstance(message, Trained):
                    trained = message
                    streams += self._open(prompts[early : early + at_publish])
                elif isinstance(message, Published):
                    published = message
                    self._update_of[message.version] = message.update
                    streams += self._open(prompts[early + at_publish :])
            if streams:
                completion = next(streams[0], None)
                if completion is None:
                    streams.pop(0)
                else:
                    completions.append(completion)
        assert trained is not None, "the learner publishes only what it has trained"
        return trained, published, completions

    def _open(self, prompts: Sequence[Prompt]) -> list[Iterator[Completion]]:
        return [iter(self.fleet.generate(prompts, self.plan.sampling))] if prompts else []

    def _prompts(self, update: int) -> tuple[Prompt, ...]:
        drawn = draw_prompts(sum(self.plan.shares), update=update, seed=self.plan.seed)
        return tuple(
            Prompt(id=f"{update:05d}-{index:05d}", token_ids=token_ids) for index, token_ids in enumerate(drawn)
        )
