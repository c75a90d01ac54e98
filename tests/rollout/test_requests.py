"""Requests under updates: whatever falls between two steps, every completion can be accounted for and nothing is
lost."""

import random
from collections import Counter
from collections.abc import Mapping
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from checkpoints import glm4_config, perturb_, qwen3_config, routers_watched, save, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import agreement, load, replayed_logprobs
from torch import Tensor

from rollout.config import EngineConfig
from rollout.engine import Engine
from rollout.engine.group import Group
from rollout.engine.sequence import Sequence
from rollout.model.decoder import Decoder
from rollout.model.hosted import HostedModel
from rollout.request import Completion, FinishReason, Prompt, SamplingParams
from weights.digest import Digest
from weights.naming import to_wire
from weights.version import WeightVersion

LEARNER = tiny_model(qwen3_config(), 1)


def version(step: int) -> WeightVersion:
    return WeightVersion(run="test", step=step, digest=Digest(step, 0))


def wire(seed: int) -> dict[str, Tensor]:
    perturb_(LEARNER, seed)
    return {name: tensor.clone() for name, tensor in to_wire(LEARNER.state_dict().items())}


WIRES = [wire(seed) for seed in range(4)]


def hosted() -> HostedModel:
    with TemporaryDirectory() as folder:
        return HostedModel.load(save(LEARNER, folder), device="cpu")


SCRATCH = hosted()


class Run:
    """An engine with few blocks, and every version that it has served."""

    def __init__(self, **limits: int | bool) -> None:
        fields = {"max_running": 4, "max_context": 40, "block_size": 4, "prefill_chunk": 6, "kv_blocks": 14} | limits
        model = hosted()
        load(model, WIRES[0])
        config = EngineConfig(**fields)  # type: ignore[arg-type]
        self.engine = Engine(
            model, Decoder(model.spec, model.parameters), config, eos_token_ids=frozenset(), version=version(0)
        )
        self.weights: dict[WeightVersion, Mapping[str, Tensor]] = {version(0): WIRES[0]}
        self.submitted: set[tuple[str, str, int]] = set()
        self.completions: list[Completion] = []

    def submit(self, name: str, token_ids: tuple[int, ...], **fields: object) -> None:
        params = SamplingParams(**({"max_tokens": 8, "seed": 5} | fields))  # type: ignore[arg-type]
        group = Group(params.n) if params.n > 1 else None
        prompt = Prompt(id=name, token_ids=token_ids)
        sequences = [Sequence(("c", name, n), prompt, params, group=group) for n in range(params.n)]
        for sequence in sequences:
            self.engine.validate(sequence)
        self.submitted |= {sequence.key for sequence in sequences}
        self.engine.add(*sequences)

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            self._take(self.engine.step())
            self.check_blocks()

    def commit(self) -> None:
        step = len(self.weights)
        self.weights[version(step)] = WIRES[step % len(WIRES)]
        load(self.engine.model, WIRES[step % len(WIRES)])
        self._take(self.engine.commit(version(step)))
        self.check_blocks()

    def cancel(self, name: str) -> None:
        self._take(self.engine.cancel(lambda sequence: sequence.prompt.id == name))
        self.check_blocks()

    def drain(self) -> list[Completion]:
        steps = 0
        while self.engine.has_work:
            self.step()
            steps += 1
            assert steps < 3000, "work is left and nothing gets on"
        return self.completions

    def _take(self, finished: list[Sequence]) -> None:
        self.completions += [sequence.completion("host") for sequence in finished]

    def check_blocks(self) -> None:
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.pool
        holders = Counter(block for sequence in scheduler.running for block in sequence.blocks)
        for group in scheduler._read_groups:
            assert group.read is not None
            holders.update(group.read.blocks)
        assert holders == pool._holders
        assert pool.held + pool.free == pool.count
        assert not any(sequence.blocks for sequence in scheduler.waiting)


prefixes = st.sampled_from([(1, 2, 3, 4, 5, 6, 7, 8), (1, 2, 3, 4), (9,)])
actions = st.one_of(
    st.tuples(
        st.just("submit"),
        prefixes,
        st.lists(st.integers(0, 60), max_size=6).map(tuple),
        st.fixed_dictionaries(
            {
                "n": st.sampled_from([1, 1, 2, 5]),
                "max_tokens": st.integers(1, 12),
                "at_commit": st.sampled_from(["keep", "keep", "recompute", "abort"]),
                "max_staleness": st.sampled_from([None, None, 1, 0]),
                "record_routing": st.booleans(),
                "temperature": st.sampled_from([1.0, 0.0]),
            }
        ),
    ),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("step"), st.integers(1, 6)),
    st.tuples(st.just("commit")),
    st.tuples(st.just("cancel"), st.integers(0, 8)),
)


@settings(max_examples=200)
@given(st.lists(actions, min_size=4, max_size=25))
def test_every_request_is_answered_once_and_replays_whatever_happens_between_steps(plan: list[tuple]) -> None:  # type: ignore[type-arg]
    run = Run()
    for number, action in enumerate(plan):
        match action:
            case ("submit", prefix, rest, fields):
                run.submit(f"p{number}", prefix + rest, **fields)
            case ("step", count):
                run.step(count)
            case ("commit",):
                run.commit()
            case ("cancel", which):
                run.cancel(f"p{which}")
    completions = run.drain()
    assert Counter(("c", c.prompt_id, c.sample) for c in completions) == dict.fromkeys(run.submitted, 1)
    assert run.engine.scheduler.pool.free == run.engine.scheduler.pool.count
    for completion in completions:
        steps = [span.version.step for span in completion.version_spans]
        assert steps == sorted(set(steps)), "versions never go backwards along a completion"
        replayed = replayed_logprobs(completion, SCRATCH, run.weights)
        assert completion.model_logprobs == pytest.approx(replayed, abs=2e-5)
        if completion.expert_ids is not None and completion.kv_version_spans:
            assert len(completion.expert_ids) == completion.kv_version_spans[-1].stop


def test_what_a_plan_does_is_what_the_test_above_means_to_cover() -> None:
    """The same machinery on one busy plan: preemption, prefixes, groups, recomputation and staleness all happen."""
    run = Run(kv_blocks=10)
    for index in range(10):
        fields = {"max_tokens": 12, "at_commit": ("keep", "recompute", "abort")[index % 3]}
        run.submit(f"p{index}", (1, 2, 3, 4, 5, 6, 7, 8, 10 + index), n=1 + index % 3, **fields)
    run.submit("stale", (1, 2), max_tokens=30, max_staleness=1)
    while run.engine.has_work:
        run.step(9)
        run.commit()
    reasons = Counter(c.finish_reason for c in run.completions)
    assert reasons[FinishReason.ABORT] >= 1
    assert reasons[FinishReason.STALE] == 1
    assert run.engine.scheduler.preemptions >= 1
    assert run.engine.scheduler.prefix_tokens >= 8
    assert any(c.discarded_kv for c in run.completions)
    assert run.engine.counts.finished == reasons
    assert run.engine.counts.tokens == sum(len(c.token_ids) for c in run.completions)


def test_the_samples_of_a_prompt_read_it_once() -> None:
    run = Run(max_running=8, kv_blocks=60, prefix_cache=False, prefill_chunk=64)
    rows: list[int] = []
    forward = run.engine.decoder.forward

    def counted(batch, kv, *, record_routing):  # type: ignore[no-untyped-def]
        rows.append(len(batch.token_ids_T))
        return forward(batch, kv, record_routing=record_routing)

    run.engine.decoder.forward = counted  # type: ignore[method-assign]
    prompt = tuple(range(1, 23))
    run.submit("group", prompt, n=8, max_tokens=5, record_routing=True)
    completions = run.drain()
    assert sum(rows) == len(prompt) + 8 * 4, "the prompt once, and all but the last of five tokens for each"
    for sample in range(8):
        alone = Run(prefix_cache=False)
        params = SamplingParams(max_tokens=5, seed=5, n=8, record_routing=True)
        alone.engine.add(Sequence(("c", "group", sample), Prompt(id="group", token_ids=prompt), params))
        (expected,) = alone.drain()
        (together,) = (c for c in completions if c.sample == sample)
        assert together.token_ids == expected.token_ids
        assert together.logprobs == pytest.approx(expected.logprobs, abs=1e-5)
        assert together.expert_ids is not None
        assert np.array_equal(together.expert_ids, expected.expert_ids)


def test_a_prompt_held_for_its_samples_never_keeps_them_out() -> None:
    run = Run(kv_blocks=4)
    run.submit("wide", tuple(range(1, 15)), n=5, max_tokens=1)
    assert len(run.drain()) == 5


def test_a_prefix_is_found_again_under_its_version_and_never_under_another() -> None:
    run = Run(kv_blocks=40)
    prompt = tuple(range(1, 14))
    run.submit("first", prompt)
    run.drain()
    run.submit("again", (*prompt, 40))
    run.drain()
    assert run.engine.scheduler.prefix_tokens == 12
    run.commit()
    run.submit("later", prompt)
    later = run.drain()[-1]
    assert run.engine.scheduler.prefix_tokens == 12
    assert {span.version for span in later.kv_version_spans} == {version(1)}


def test_keys_written_after_a_commit_by_a_request_that_kept_its_own_are_nobody_elses_prefix() -> None:
    run = Run(kv_blocks=40, prefill_chunk=6)
    prompt = tuple(range(1, 18))
    run.submit("crossing", prompt)
    run.step()
    run.commit()
    run.drain()
    run.submit("fresh", prompt)
    fresh = run.drain()[-1]
    assert run.engine.scheduler.prefix_tokens == 0
    assert fresh.model_logprobs == pytest.approx(replayed_logprobs(fresh, SCRATCH, run.weights), abs=1e-5)


@pytest.mark.parametrize(("at_commit", "kv_versions"), [("keep", [0, 1]), ("recompute", [1])])
def test_at_a_commit_keys_are_kept_or_rebuilt_as_the_request_says(at_commit: str, kv_versions: list[int]) -> None:
    run = Run(kv_blocks=40)
    run.submit("one", (1, 2, 3), at_commit=at_commit, record_routing=True)
    run.step(4)
    run.commit()
    (completion,) = run.drain()
    assert [span.version.step for span in completion.version_spans] == [0, 1]
    assert [span.version.step for span in completion.kv_version_spans] == kv_versions
    assert [(kv.start, kv.stop) for kv in completion.discarded_kv] == ([] if at_commit == "keep" else [(0, 4)])
    assert completion.model_logprobs == pytest.approx(replayed_logprobs(completion, SCRATCH, run.weights), abs=1e-5)


def test_the_configuration_says_what_happens_at_a_commit_where_a_request_does_not() -> None:
    run = Run()
    run.engine.at_commit = "abort"
    run.submit("ends", (1, 2, 3), n=2)
    run.submit("keeps", (1, 2, 3), at_commit="keep")
    run.step(3)
    run.commit()
    reasons = {(c.prompt_id, c.sample): (c.finish_reason, len(c.token_ids)) for c in run.drain()}
    assert reasons == {
        ("ends", 0): (FinishReason.ABORT, 3),
        ("ends", 1): (FinishReason.ABORT, 2),
        ("keeps", 0): (FinishReason.LENGTH, 8),
    }


def test_a_request_waits_for_its_version_and_lets_others_pass() -> None:
    run = Run()
    run.submit("later", (1, 2), min_version=version(2))
    run.submit("now", (1, 2))
    run.step(10)
    assert [c.prompt_id for c in run.completions] == ["now"]
    assert not run.engine.has_work, "the engine's thread sleeps while nothing may begin"
    run.commit()
    run.step(10)
    assert len(run.completions) == 1
    run.commit()
    later = run.drain()[-1]
    assert {span.version for span in later.version_spans} == {version(2)}


def test_a_request_that_waits_for_a_run_that_is_over_ends() -> None:
    run = Run()
    run.submit("never", (1, 2), min_version=version(9))
    run.commit()
    assert run.completions == []
    other = WeightVersion(run="another", step=0, digest=Digest(0, 0))
    run._take(run.engine.commit(other))
    assert [(c.prompt_id, c.finish_reason) for c in run.completions] == [("never", FinishReason.STALE)]


def test_experts_of_keys_that_were_rebuilt_are_told_apart_from_those_that_made_the_tokens() -> None:
    run = Run(kv_blocks=40)
    run.submit("one", (1, 2, 3), at_commit="recompute", record_routing=True)
    run.step(4)
    run.commit()
    (completion,) = run.drain()
    (lost,) = completion.discarded_kv
    assert lost.expert_ids is not None
    assert completion.expert_ids is not None
    for seed, ids_TLK in ((0, lost.expert_ids), (1, completion.expert_ids)):
        perturb_(LEARNER, seed)
        tokens = [*completion.prompt_token_ids, *completion.token_ids][: len(ids_TLK)]
        with routers_watched(LEARNER) as routed, torch.no_grad():
            LEARNER(torch.tensor([tokens]))
        theirs = torch.stack([layer.expert_ids_TK for layer in routed], dim=1)
        assert torch.equal(torch.from_numpy(ids_TLK).long(), theirs)


def test_a_preempted_request_resumes_with_the_same_tokens() -> None:
    prompts = {f"p{i}": (i + 1, 2, 3) for i in range(4)}
    crowded, roomy = Run(kv_blocks=6), Run(kv_blocks=60)
    for run in (crowded, roomy):
        for name, prompt in prompts.items():
            run.submit(name, prompt, max_tokens=14)
    tokens = {c.prompt_id: c.token_ids for c in crowded.drain()}
    assert crowded.engine.scheduler.preemptions > 0
    assert tokens == {c.prompt_id: c.token_ids for c in roomy.drain()}


@settings(max_examples=15)
@given(st.integers(0, 2**16), st.integers(1, 7))
def test_greedy_output_does_not_depend_on_batch_mates(seed: int, mates: int) -> None:
    dice = random.Random(seed)
    prompt = tuple(dice.randrange(61) for _ in range(dice.randint(1, 10)))
    alone, crowded = Run(kv_blocks=40), Run(kv_blocks=dice.choice([8, 40]))
    alone.submit("me", prompt, temperature=0.0)
    for mate in range(mates):
        crowded.submit(
            f"mate{mate}", tuple(dice.randrange(61) for _ in range(dice.randint(1, 10))), n=dice.randint(1, 3)
        )
    crowded.submit("me", prompt, temperature=0.0)
    (expected,) = alone.drain()
    (found,) = (c for c in crowded.drain() if c.prompt_id == "me")
    assert found.token_ids == expected.token_ids


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(0, 12), st.booleans())
def test_a_cancelled_group_frees_everything(n: int, steps: int, commit: bool) -> None:
    run = Run()
    run.submit("gone", tuple(range(1, 12)), n=n)
    run.step(steps)
    if commit:
        run.commit()
    finished = len(run.completions)
    run.cancel("gone")
    assert run.engine.scheduler.pool.free == run.engine.scheduler.pool.count
    assert not run.engine.has_work
    assert len(run.completions) == n
    assert all(c.finish_reason is FinishReason.ABORT for c in run.completions[finished:])


def test_the_kept_token_set_lets_a_trainer_renormalise() -> None:
    run = Run()
    run.submit("kept", (1, 2, 3), top_k=7, top_p=0.8, temperature=0.7, return_kept=True)
    run.submit("all", (1, 2, 3), return_kept=True)
    completions = {c.prompt_id: c for c in run.drain()}
    kept = completions["kept"]
    assert kept.kept_token_ids is not None
    perturb_(LEARNER, 0)
    with torch.no_grad():
        logits = LEARNER(torch.tensor([[1, 2, 3, *kept.token_ids[:-1]]])).logits[0, 2:]
    for row, token, ids, logprob in zip(logits, kept.token_ids, kept.kept_token_ids, kept.logprobs, strict=True):
        assert token in ids.tolist()
        assert 1 <= len(ids) <= 7
        renormalised = torch.log_softmax(row[torch.from_numpy(ids).long()] / 0.7, 0)[ids.tolist().index(token)]
        assert renormalised.item() == pytest.approx(logprob, abs=1e-4)
    assert completions["all"].kept_token_ids is not None
    assert all(len(ids) == 61 for ids in completions["all"].kept_token_ids)


def test_routing_of_shared_prompts_is_the_learners() -> None:
    config = glm4_config()
    learner = tiny_model(config, 3)
    with TemporaryDirectory() as folder:
        model = HostedModel.load(save(learner, folder), device="cpu")
    limits = EngineConfig(max_running=4, max_context=40, block_size=4, prefill_chunk=6)
    engine = Engine(model, Decoder(model.spec, model.parameters), limits, eos_token_ids=frozenset(), version=version(0))
    params = SamplingParams(max_tokens=4, n=3, seed=1, record_routing=True)
    group, prompt = Group(3), Prompt(id="p", token_ids=tuple(range(1, 11)))
    sequences = [Sequence(("c", "p", n), prompt, params, group=group) for n in range(3)]
    engine.add(*sequences)
    while engine.has_work:
        engine.step()
    for sequence in sequences:
        completion = sequence.completion("host")
        with routers_watched(learner) as routed, torch.no_grad():
            learner(torch.tensor([[*prompt.token_ids, *completion.token_ids[:-1]]]))
        assert completion.expert_ids is not None
        theirs = torch.stack([layer.expert_ids_TK for layer in routed], dim=1)
        assert torch.equal(torch.from_numpy(completion.expert_ids).long(), theirs)


def test_a_replay_under_another_version_than_the_one_named_is_never_taken_for_a_near_tie() -> None:
    run = Run(kv_blocks=40)
    run.submit("one", (1, 2, 3), record_routing=True)
    (completion,) = run.drain()
    apart, skipped = agreement(completion, SCRATCH, run.weights)
    assert (len(apart), skipped) == (8, 0)
    assert max(apart) < 1e-5
    mislabelled = {version(0): WIRES[1]}
    apart, skipped = agreement(completion, SCRATCH, mislabelled)
    assert (len(apart), skipped) == (8, 0)
    assert max(apart) > 0.01
