"""The engine generates what transformers generates, before and after hot reloads, and accounts for every token."""

import random
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from checkpoints import glm4_config, perturb_, qwen3_config, routers_watched, save, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from replay import load, replayed_logprobs, versions_by_position
from strategies import glm4_configs, qwen3_configs
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from rollout.config import EngineConfig
from rollout.engine import Engine
from rollout.engine.sequence import Purpose, Sequence
from rollout.model.decoder import Decoder
from rollout.model.hosted import HostedModel
from rollout.request import Completion, FinishReason, Prompt, SamplingParams
from weights.digest import Digest
from weights.naming import to_wire
from weights.version import WeightVersion

TOLERANCE = 1e-5
CLEAR = 2e-5  # two errors of TOLERANCE cannot turn a lead of this size around


def version(step: int) -> WeightVersion:
    return WeightVersion(run="test", step=step, digest=Digest(step, 0))


def engine_of(learner: PreTrainedModel, *, eos: frozenset[int] = frozenset(), **limits: int) -> Engine:
    with TemporaryDirectory() as folder:
        model = HostedModel.load(save(learner, folder), device="cpu")
    fields = {"max_running": 3, "max_context": 64, "block_size": 4, "prefill_chunk": 5} | limits
    decoder = Decoder(model.spec, model.parameters)
    return Engine(model, decoder, EngineConfig(**fields), eos_token_ids=eos, version=version(0))


def sequence(index: int, token_ids: list[int], **fields: object) -> Sequence:
    params = SamplingParams(**({"max_tokens": 8, "seed": 7} | fields))  # type: ignore[arg-type]
    return Sequence(("client", str(index), 0), Prompt(id=str(index), token_ids=tuple(token_ids)), params)


def run(engine: Engine, sequences: list[Sequence]) -> list[Completion]:
    """Everything to its end; completions in the order of `sequences`."""
    for entry in sequences:
        engine.validate(entry)
        engine.add(entry)
    while engine.has_work:
        engine.step()
    assert engine.scheduler.pool.free == engine.scheduler.pool.count
    return [entry.completion("host") for entry in sequences]


def reload(engine: Engine, learner: PreTrainedModel, step: int) -> dict[str, Tensor]:
    """What a commit does: new content in place, then the version."""
    wire = {name: tensor.clone() for name, tensor in to_wire(learner.state_dict().items())}
    load(engine.model, wire)
    engine.commit(version(step))
    return wire


def assert_greedy_like_transformers(completion: Completion, learner: PreTrainedModel) -> None:
    """Token for token, each the argmax of the learner's logits after the same tokens (where its lead is clear)."""
    tokens = [*completion.prompt_token_ids, *completion.token_ids]
    with torch.no_grad():
        logits_TV = learner(torch.tensor([tokens[:-1]])).logits[0]
    logits_TV = logits_TV[len(completion.prompt_token_ids) - 1 :]
    best, second = logits_TV.topk(2, dim=1).values.unbind(1)
    clear = best - second > CLEAR
    assert clear.float().mean() > 0.7, "hardly anything would be compared"
    assert torch.equal(logits_TV.argmax(1)[clear], torch.tensor(completion.token_ids)[clear])
    logprobs = torch.log_softmax(logits_TV, 1).gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(completion.model_logprobs), logprobs, atol=TOLERANCE, rtol=0)


def check_generation_and_reloads(config: PreTrainedConfig, seed: int) -> None:
    dice = random.Random(seed)
    learner = tiny_model(config, seed)
    engine = engine_of(learner)
    for step in range(4):
        if step:
            before = [tensor.clone() for tensor in learner.state_dict().values()]
            perturb_(learner, seed + step)
            after = learner.state_dict().values()
            assert not any(torch.equal(old, new) for old, new in zip(before, after, strict=True))
            reload(engine, learner, step)
        prompts = [[dice.randrange(config.vocab_size) for _ in range(dice.randint(1, 9))] for _ in range(4)]
        wanted = [sequence(i, prompt, temperature=0.0, ignore_eos=True) for i, prompt in enumerate(prompts)]
        for completion in run(engine, wanted):
            assert len(completion.token_ids) == 8
            assert_greedy_like_transformers(completion, learner)
            assert {span.version for span in completion.version_spans} == {version(step)}


@settings(max_examples=40)
@given(config=qwen3_configs(), seed=st.integers(0, 2**16))
def test_qwen3_generates_like_transformers_after_each_of_three_hot_reloads(config: PreTrainedConfig, seed: int) -> None:
    check_generation_and_reloads(config, seed)


@settings(max_examples=40)
@given(config=glm4_configs(), seed=st.integers(0, 2**16))
def test_glm4_generates_like_transformers_after_each_of_three_hot_reloads(config: PreTrainedConfig, seed: int) -> None:
    check_generation_and_reloads(config, seed)


@pytest.mark.parametrize("config", [qwen3_config(), glm4_config()], ids=["qwen3_moe", "glm4_moe"])
def test_greedy_generation_is_transformers_own_generate(config: PreTrainedConfig) -> None:
    learner = tiny_model(config, 3)
    prompts = [[5, 9, 2], [7], [1, 2, 3, 4, 5, 6, 7]]
    completions = run(engine_of(learner), [sequence(i, p, temperature=0.0) for i, p in enumerate(prompts)])
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt])
        theirs = learner.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8, pad_token_id=0
        )
        assert theirs[0, len(prompt) :].tolist() == list(completion.token_ids)


@pytest.mark.parametrize("config", [qwen3_config(), glm4_config()], ids=["qwen3_moe", "glm4_moe"])
def test_a_request_is_answered_alike_alone_and_among_others(config: PreTrainedConfig) -> None:
    learner = tiny_model(config, 4)
    dice = random.Random(1)
    prompts = [[dice.randrange(61) for _ in range(dice.randint(1, 20))] for _ in range(7)]
    together = run(engine_of(learner), [sequence(i, p, seed=i) for i, p in enumerate(prompts)])
    for index, prompt in enumerate(prompts):
        (alone,) = run(engine_of(learner, prefill_chunk=64), [sequence(index, prompt, seed=index)])
        assert alone.token_ids == together[index].token_ids
        assert alone.logprobs == pytest.approx(together[index].logprobs, abs=TOLERANCE)


@pytest.mark.parametrize("config", [qwen3_config(), glm4_config()], ids=["qwen3_moe", "glm4_moe"])
def test_completions_that_cross_commits_replay(config: PreTrainedConfig) -> None:
    """Commits fall between steps while prompts are half read and completions half written."""
    learner = tiny_model(config, 5)
    engine = engine_of(learner, max_running=4)
    weights: dict[WeightVersion, Mapping[str, Tensor]] = {
        version(0): dict(to_wire(tiny_model(config, 5).state_dict().items()))
    }
    dice = random.Random(2)
    wanted = [sequence(i, [dice.randrange(61) for _ in range(dice.randint(1, 14))], seed=i) for i in range(12)]
    for entry in wanted:
        engine.add(entry)
    while engine.has_work:
        for _ in range(dice.randint(1, 4)):
            engine.step()
        step = len(weights)
        perturb_(learner, 100 + step)
        weights[version(step)] = reload(engine, learner, step)
    completions = [entry.completion("host") for entry in wanted]
    crossing = [c for c in completions if len({span.version for span in c.version_spans}) > 1]
    split_prompts = [c for c in completions if c.kv_version_spans[0].stop < len(c.prompt_token_ids)]
    assert len(crossing) >= 8
    assert split_prompts
    for completion in completions:
        tokens, keys = versions_by_position(completion)
        assert len(tokens) == len(completion.token_ids)
        assert tokens == keys[len(completion.prompt_token_ids) - 1 :], "a token comes from the row that wrote its key"
        replayed = replayed_logprobs(completion, engine.model, weights)
        assert completion.model_logprobs == pytest.approx(replayed, abs=TOLERANCE)


@pytest.mark.parametrize("config", [qwen3_config(), glm4_config()], ids=["qwen3_moe", "glm4_moe"])
def test_routing_is_recorded_for_every_token_of_prompt_and_completion(config: PreTrainedConfig) -> None:
    learner = tiny_model(config, 6)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7]]
    wanted = [sequence(0, prompts[0], record_routing=True), sequence(1, prompts[1])]
    recorded, silent = run(engine_of(learner), wanted)
    assert silent.expert_ids is None
    assert silent.expert_weights is None
    assert recorded.expert_ids is not None
    assert recorded.expert_weights is not None
    assert recorded.expert_ids.dtype == np.uint8
    with routers_watched(learner) as routed, torch.no_grad():
        learner(torch.tensor([[*prompts[0], *recorded.token_ids[:-1]]]))
    ids_TLK = torch.stack([layer.expert_ids_TK for layer in routed], dim=1)
    assert torch.equal(torch.from_numpy(recorded.expert_ids).long(), ids_TLK)
    weights_TLK = torch.stack([layer.weights_TK for layer in routed], dim=1)
    torch.testing.assert_close(torch.from_numpy(recorded.expert_weights), weights_TLK, atol=TOLERANCE, rtol=0)


def test_sampling_ends_with_stop_tokens_the_end_of_sequence_and_the_length() -> None:
    learner = tiny_model(qwen3_config(), 8)
    (free,) = run(engine_of(learner), [sequence(0, [5, 6], max_tokens=20)])
    third = free.token_ids[2]
    assert third not in free.token_ids[:2]
    (stopped,) = run(engine_of(learner), [sequence(0, [5, 6], max_tokens=20, stop_token_ids=(third,))])
    ended, ignored = run(
        engine_of(learner, eos=frozenset({third})),
        [sequence(0, [5, 6], max_tokens=20), sequence(1, [5, 6], max_tokens=20, ignore_eos=True)],
    )
    assert stopped.token_ids == ended.token_ids == free.token_ids[:3]
    assert stopped.finish_reason == ended.finish_reason == FinishReason.STOP
    assert ignored.token_ids == free.token_ids
    assert free.finish_reason == ignored.finish_reason == FinishReason.LENGTH


def test_scores_are_the_learners_logprobs_and_begin_again_at_a_commit() -> None:
    config = glm4_config()
    learner = tiny_model(config, 9)
    engine = engine_of(learner, prefill_chunk=3)
    tokens = [4, 8, 15, 16, 23, 42, 4, 8]
    params = SamplingParams(max_tokens=1, seed=0)
    scoring = Sequence(("client", "s", 0), Prompt(id="s", token_ids=tuple(tokens)), params, Purpose.SCORE)
    engine.add(scoring)
    engine.step()
    assert 0 < scoring.computed < len(tokens)
    perturb_(learner, 10)
    reload(engine, learner, 1)
    while engine.has_work:
        engine.step()
    score = scoring.score()
    assert score.version == version(1)
    with torch.no_grad():
        logits_TV = learner(torch.tensor([tokens])).logits[0, :-1]
    expected = torch.log_softmax(logits_TV, 1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
    assert score.logprobs == pytest.approx(expected.tolist(), abs=TOLERANCE)


def test_cancelling_frees_everything_and_leaves_the_others_untouched() -> None:
    learner = tiny_model(qwen3_config(), 11)
    (expected,) = run(engine_of(learner), [sequence(1, [9, 9, 9])])
    engine = engine_of(learner)
    wanted = [sequence(i, [9, 9, 9] if i == 1 else [i]) for i in range(6)]
    for entry in wanted:
        engine.add(entry)
    engine.step()
    gone = engine.cancel(lambda entry: entry.prompt.id != "1")
    assert {entry.completion("host").finish_reason for entry in gone} == {FinishReason.ABORT}
    while engine.has_work:
        engine.step()
    assert wanted[1].completion("host").token_ids == expected.token_ids
    assert engine.scheduler.pool.free == engine.scheduler.pool.count


def test_logits_that_are_not_numbers_end_the_request_and_not_the_engine() -> None:
    learner = tiny_model(qwen3_config(), 12)
    engine = engine_of(learner)
    engine.model.parameters["norm.weight"].fill_(float("nan"))
    (poisoned,) = run(engine, [sequence(0, [1, 2, 3])])
    assert (poisoned.finish_reason, poisoned.token_ids) == (FinishReason.NOT_A_NUMBER, ())
    reload(engine, learner, 1)
    (healed,) = run(engine, [sequence(0, [1, 2, 3])])
    assert healed.finish_reason == FinishReason.LENGTH


@pytest.mark.parametrize(
    ("tokens", "fields", "says"),
    [
        ([1] * 60, {"max_tokens": 10}, r"60 prompt tokens and max_tokens=10 exceed engine\.max_context=64"),
        ([1, 61, -1], {}, r"token ids \[-1, 61\] are outside the model's vocabulary of 61"),
    ],
)
def test_a_prompt_that_can_never_run_is_refused(tokens: list[int], fields: dict[str, object], says: str) -> None:
    engine = engine_of(tiny_model(qwen3_config(), 13))
    with pytest.raises(ValueError, match=says):
        engine.validate(sequence(0, tokens, **fields))


def test_a_prompt_longer_than_the_model_was_made_for_is_refused() -> None:
    engine = engine_of(tiny_model(qwen3_config(max_position_embeddings=32), 13))
    with pytest.raises(ValueError, match="30 prompt tokens and max_tokens=8 exceed the 32 positions that the model"):
        engine.validate(sequence(0, [1] * 30, max_tokens=8))


def test_a_prompt_larger_than_the_cache_is_refused() -> None:
    engine = engine_of(tiny_model(qwen3_config(), 13), kv_blocks=3)
    with pytest.raises(ValueError, match=r"keys and values of 17 tokens, the KV cache holds 12"):
        engine.validate(sequence(0, [1] * 10, max_tokens=8))


def test_parameters_never_move(tmp_path: Path) -> None:
    learner = tiny_model(glm4_config(), 14)
    engine = engine_of(learner)
    addresses = {name: tensor.data_ptr() for name, tensor in engine.model.parameters.items()}
    perturb_(learner, 15)
    reload(engine, learner, 1)
    run(engine, [sequence(0, [1, 2])])
    assert addresses == {name: tensor.data_ptr() for name, tensor in engine.model.parameters.items()}
