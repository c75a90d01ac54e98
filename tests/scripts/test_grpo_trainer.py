"""The loop, with a fleet and a learner that play their parts in this process."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from grpo.agreement import Agreement
from grpo.batch import Batch
from grpo.collate import collate
from grpo.errors import LearnerDied
from grpo.messages import FromLearner, Published, Trained
from grpo.record import Record
from grpo.task import ANSWER_TOKENS, PROMPT_TOKENS, answer
from grpo.trainer import Plan, Trainer

from rollout import Completion, FinishReason, Prompt, SamplingParams, VersionSpan
from weights import WeightVersion
from weights.digest import Digest

PLAN = Plan(updates=3, shares=(2, 1, 3), samples=2)
POSITIONS = PROMPT_TOKENS + ANSWER_TOKENS - 1


def version(step: int, run: str = "run") -> WeightVersion:
    return WeightVersion(run=run, step=step, digest=Digest.from_hex(f"{step:032x}"))


FIRST = version(0, run="checkpoint")


def completion(prompt: Prompt, sample: int, spans: tuple[VersionSpan, ...]) -> Completion:
    """The right answer, made under `spans`."""
    return Completion(
        prompt_id=prompt.id,
        sample=sample,
        host_id=f"host-{sample % 2}",
        prompt_token_ids=prompt.token_ids,
        token_ids=answer(prompt.token_ids),
        logprobs=(-1.0,) * ANSWER_TOKENS,
        model_logprobs=(-1.0,) * ANSWER_TOKENS,
        finish_reason=FinishReason.LENGTH,
        seed=0,
        version_spans=spans,
        kv_version_spans=(VersionSpan(version=spans[0].version, start=0, stop=POSITIONS),),
        expert_ids=np.zeros((POSITIONS, 1, 2), dtype=np.uint8),
    )


class FakeFleet:
    """Serves a version; a completion is half made when it is handed out and ends under the version that then serves."""

    def __init__(self) -> None:
        self.serving = FIRST
        self.calls: list[tuple[WeightVersion, tuple[str, ...]]] = []

    def generate(self, prompts: Iterable[Prompt], sampling: SamplingParams) -> Iterator[Completion]:
        prompts = tuple(prompts)
        begun = self.serving
        self.calls.append((begun, tuple(prompt.id for prompt in prompts)))
        return self._completions(prompts, begun, sampling.n)

    def _completions(self, prompts: tuple[Prompt, ...], begun: WeightVersion, samples: int) -> Iterator[Completion]:
        half = ANSWER_TOKENS // 2
        for prompt in prompts:
            for sample in reversed(range(samples)):
                first = VersionSpan(version=begun, start=0, stop=half)
                yield completion(
                    prompt, sample, (first, VersionSpan(version=self.serving, start=half, stop=ANSWER_TOKENS))
                )


class FakeLearner:
    """Answers each batch with Trained and Published, every other look finding nothing; commits as it publishes."""

    def __init__(self, fleet: FakeFleet) -> None:
        self._fleet = fleet
        self._answers: list[FromLearner | None] = []
        self.batches: list[Batch] = []

    def send(self, message: Batch) -> None:
        assert not self._answers, "the last update is not over"
        self.batches.append(message)
        update = len(self.batches)
        trained = Trained(update=update, agreement=Agreement(), staleness=0.5, masked_tokens=0, seconds=0.1)
        published = Published(update=update, version=version(update), seconds=0.01, pause_s=(0.001, 0.002))
        self._answers = [None, trained, None, published]

    def receive(self, awaited: str, deadline_s: float) -> FromLearner | None:
        message = self._answers.pop(0)
        if message is None and deadline_s > 0:
            message = self._answers.pop(0)
        if isinstance(message, Published):
            self._fleet.serving = message.version
        return message


def run() -> tuple[FakeFleet, FakeLearner, list[Record]]:
    fleet = FakeFleet()
    learner = FakeLearner(fleet)
    seen: list[Record] = []
    records = Trainer(fleet, learner, PLAN, FIRST).run(seen.append)
    assert seen == records
    return fleet, learner, records


def test_every_prompt_of_every_update_goes_out_once() -> None:
    fleet, learner, _ = run()
    ids = [prompt_id for _, call in fleet.calls for prompt_id in call]
    assert len(ids) == len(set(ids)) == 3 * 6
    assert [batch.token_ids_SM.shape for batch in learner.batches] == [(12, PROMPT_TOKENS + ANSWER_TOKENS)] * 3


def test_the_late_share_begins_under_the_weights_just_published() -> None:
    fleet, _, _ = run()
    assert [(begun, len(call)) for begun, call in fleet.calls] == [
        (FIRST, 6),
        *((FIRST, 2), (FIRST, 1), (version(1), 3)),
        *((version(1), 2), (version(1), 1), (version(2), 3)),
    ]


def test_batches_carry_versions_as_counts_of_updates() -> None:
    _, learner, _ = run()
    assert [sorted(set(batch.updates_SC.flat)) for batch in learner.batches] == [[0], [0, 1], [1, 2]]
    assert (learner.batches[2].updates_SC[-1] == 2).all()
    assert (learner.batches[2].kv_updates_SN[-1] == 2).all()


def test_records_tell_what_happened() -> None:
    _, _, records = run()
    assert [record.update for record in records] == [1, 2, 3]
    assert all(record.reward == 1 and record.tokens == 12 * ANSWER_TOKENS for record in records)
    assert [record.generated for record in records] == [12 * ANSWER_TOKENS, 12 * ANSWER_TOKENS, 0]
    assert records[0].hosts == {"host-0", "host-1"}
    assert [record.crossed > 0 for record in records] == [False, True, True]
    assert records[2].published == str(version(3))
    assert records[2].versions == {str(version(1)), str(version(2))}


def test_a_learners_death_ends_the_run() -> None:
    class DyingLearner(FakeLearner):
        def receive(self, awaited: str, deadline_s: float) -> FromLearner | None:
            raise LearnerDied(-9, "learner.log")

    fleet = FakeFleet()
    with pytest.raises(LearnerDied, match="-9"):
        Trainer(fleet, DyingLearner(fleet), PLAN, FIRST).run(lambda record: None)


def whole(step: int) -> tuple[VersionSpan, ...]:
    return (VersionSpan(version=version(step), start=0, stop=ANSWER_TOKENS),)


def test_collate_orders_samples_by_prompt_and_keeps_rewards_with_them() -> None:
    early, late = Prompt(id="a", token_ids=(0, 1)), Prompt(id="b", token_ids=(2, 3))
    pairs = [(late, 1), (early, 1), (late, 0), (early, 0)]
    batch = collate(
        [completion(p, sample, whole(0)) for p, sample in pairs], [0.1, 0.2, 0.3, 0.4], {version(0): 0}, samples=2
    )
    assert batch.token_ids_SM[:, 0].tolist() == [0, 0, 2, 2]
    assert batch.rewards_S.tolist() == pytest.approx([0.4, 0.2, 0.3, 0.1])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": (1,)}, "completions of one length"),
        ({"expert_ids": None}, "record_routing=True"),
        ({"sample": 0}, r"a has \[0, 0\]"),
        ({"version_spans": whole(7)}, r"run@7.*published run@0"),
    ],
)
def test_collate_refuses_what_it_cannot_account_for(fields: dict[str, Any], message: str) -> None:
    prompt = Prompt(id="a", token_ids=(0, 1))
    good = completion(prompt, 1, whole(0))
    completions = [completion(prompt, 0, whole(0)), replace(good, **fields)]
    with pytest.raises(ValueError, match=message):
        collate(completions, [0.0, 0.0], {version(0): 0}, samples=2)
