"""The learner: a step on completions that the model itself made, and what becomes of its process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from grpo.agreement import Replayed
from grpo.batch import Batch
from grpo.checkpoint import build_model, write_checkpoint
from grpo.errors import LearnerDied, LearnerFailed
from grpo.families import FAMILIES
from grpo.learner import Hyperparameters, Learner
from grpo.learner_process import SCRIPTS, LearnerProcess
from grpo.messages import Ready
from grpo.routers import recorded_routing
from grpo.task import VOCAB_SIZE
from safetensors.torch import load_file
from transformers import PreTrainedModel

PROMPT, ANSWER, SAMPLES = 2, 4, 4


def own_batch(model: PreTrainedModel) -> Batch:
    """Eight completions of random tokens, with the account that a host of this model gives of them at update 0."""
    numbers = torch.Generator().manual_seed(0)
    token_ids = torch.randint(VOCAB_SIZE, (8, PROMPT + ANSWER), generator=numbers)
    with torch.no_grad(), recorded_routing(model) as routing:
        logits = model(input_ids=token_ids[:, :-1]).logits
    logprobs = logits[:, PROMPT - 1 :].log_softmax(-1).gather(2, token_ids[:, PROMPT:, None])[..., 0].numpy()
    positions = PROMPT + ANSWER - 1
    expert_ids = torch.stack(routing.expert_ids, dim=1).view(8, positions, -1, 2)
    return Batch(
        prompt_tokens=PROMPT,
        samples=SAMPLES,
        token_ids_SM=token_ids.numpy(),
        rewards_S=np.linspace(0, 1, 8, dtype=np.float32),
        logprobs_SC=logprobs,
        model_logprobs_SC=logprobs,
        updates_SC=np.zeros((8, ANSWER), dtype=np.int64),
        kv_updates_SN=np.zeros((8, positions), dtype=np.int64),
        expert_ids_SNLK=expert_ids.to(torch.uint8).numpy(),
    )


def learner_of(family: str, *, replays: bool = False) -> Learner:
    torch.manual_seed(0)
    return Learner(build_model(family), Hyperparameters(), replays=replays)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_learner_agrees_with_itself_and_learns(family: str) -> None:
    learner = learner_of(family)
    before = {name: tensor.clone() for name, tensor in learner.model.state_dict().items()}
    trained = learner.step(own_batch(learner.model))
    assert trained.update == 1
    assert trained.staleness == 0
    assert trained.agreement.tokens == 8 * ANSWER
    assert trained.agreement.logprob_abs_diff_max < 1e-5
    assert trained.agreement.decisions + trained.agreement.near_ties >= 8 * (PROMPT + ANSWER - 1)
    assert trained.agreement.mismatches == 0
    changed = {name for name, tensor in learner.model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert {"model.embed_tokens.weight", "lm_head.weight"} <= changed


@pytest.mark.parametrize("family", FAMILIES)
def test_its_own_experts_replayed_make_the_same_step(family: str) -> None:
    plain, replaying = learner_of(family), learner_of(family, replays=True)
    batch = own_batch(plain.model)
    without, trained = plain.step(batch), replaying.step(batch)
    assert without.replayed is None
    assert replace(trained, seconds=0.0, replayed=None) == replace(without, seconds=0.0)
    assert trained.replayed == Replayed(
        decisions=batch.expert_ids_SNLK[..., 0].size,
        tokens=8 * ANSWER,
        logprob_abs_diff_max=trained.agreement.logprob_abs_diff_max,
    )
    after = replaying.model.state_dict()
    assert all(torch.equal(tensor, after[name]) for name, tensor in plain.model.state_dict().items())


def test_what_the_learner_decides_by_itself_is_told_though_it_replays() -> None:
    plain, replaying = learner_of("qwen3_moe"), learner_of("qwen3_moe", replays=True)
    batch = own_batch(plain.model)
    others = replace(batch, expert_ids_SNLK=(batch.expert_ids_SNLK + 1) % 8)
    without, trained = plain.step(others), replaying.step(others)
    assert trained.agreement == without.agreement
    assert trained.agreement.mismatches > 0
    assert trained.replayed is not None
    assert trained.replayed.differing > 0
    assert trained.replayed.logprob_abs_diff_max > 1e-4, "made with other experts"
    after = replaying.model.state_dict()
    assert any(not torch.equal(tensor, after[name]) for name, tensor in plain.model.state_dict().items())


def test_tokens_of_older_weights_are_replayed_and_not_compared() -> None:
    learner = learner_of("qwen3_moe", replays=True)
    batch = own_batch(learner.model)
    learner.step(batch)
    again = learner.step(batch).replayed
    assert again is not None
    assert again.decisions == batch.expert_ids_SNLK[..., 0].size
    assert again.tokens == 0


def test_tokens_of_older_weights_are_trained_on_and_not_compared() -> None:
    learner = learner_of("qwen3_moe")
    batch = own_batch(learner.model)
    learner.step(batch)
    again = learner.step(batch)
    assert again.staleness == 1
    assert again.masked_tokens == 0
    assert again.agreement.tokens == 0


def test_a_prompt_with_older_keys_is_not_compared() -> None:
    learner = learner_of("qwen3_moe")
    learner.updates = 1
    batch = own_batch(learner.model)
    kv_updates_SN = np.ones_like(batch.kv_updates_SN)
    kv_updates_SN[3, 0] = 0
    trained = learner.step(replace(batch, updates_SC=np.ones_like(batch.updates_SC), kv_updates_SN=kv_updates_SN))
    assert trained.agreement.tokens == 7 * ANSWER


def test_tokens_that_are_too_old_are_masked() -> None:
    learner = learner_of("qwen3_moe")
    learner.updates = Hyperparameters().max_staleness + 1
    assert learner.step(own_batch(learner.model)).masked_tokens == 8 * ANSWER


@pytest.mark.parametrize("family", FAMILIES)
def test_the_seed_decides_the_checkpoint(family: str, tmp_path: Path) -> None:
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        write_checkpoint(family, tmp_path / name, seed=seed)
    one, two, three = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two", "three"))
    assert all(tensor.dtype == torch.float32 for tensor in one.values())
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)


def test_glm4_has_a_correction_bias_that_is_not_zero(tmp_path: Path) -> None:
    write_checkpoint("glm4_moe", tmp_path, seed=0)
    biases = [t for n, t in load_file(tmp_path / "model.safetensors").items() if n.endswith("e_score_correction_bias")]
    assert biases
    assert all(bias.abs().max() > 0.01 for bias in biases)


def test_the_learner_imports_neither_ray_nor_the_rollout() -> None:
    code = "import sys, grpo.learner; print(sorted({'ray', 'rollout'} & set(sys.modules)))"
    paths = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_an_unknown_family_is_refused() -> None:
    with pytest.raises(ValueError, match=r"llama.*qwen3_moe, glm4_moe"):
        build_model("llama")


def test_the_process_says_when_it_is_ready_and_goes_when_told(tmp_path: Path) -> None:
    with LearnerProcess(
        family="qwen3_moe", checkpoint=tmp_path / "model", seed=0, log=tmp_path / "learner.log"
    ) as learner:
        ready = learner.receive("the learner to be ready", 60)
        assert isinstance(ready, Ready)
        assert not ready.replays
        assert (tmp_path / "model" / "config.json").exists()
        assert learner.receive("nothing", 0.0) is None


def test_the_process_is_told_to_replay(tmp_path: Path) -> None:
    folder, log = tmp_path / "model", tmp_path / "learner.log"
    with LearnerProcess(family="qwen3_moe", checkpoint=folder, seed=0, log=log, replays=True) as learner:
        ready = learner.receive("the learner to be ready", 60)
    assert isinstance(ready, Ready)
    assert ready.replays


def test_a_learner_that_fails_says_why(tmp_path: Path) -> None:
    with LearnerProcess(
        family="qwen3_moe", checkpoint=tmp_path / "model", seed=0, log=tmp_path / "learner.log"
    ) as learner:
        learner.receive("the learner to be ready", 60)
        learner.send("no-such-fleet")
        with pytest.raises(LearnerFailed, match="no-such-fleet"):
            learner.receive("the learner to fail", 60)
        with pytest.raises(LearnerDied, match="exit status 1"):
            learner.receive("anything more", 60)


def test_a_learner_that_dies_is_told_by_its_exit_status(tmp_path: Path) -> None:
    with LearnerProcess(family="llama", checkpoint=tmp_path / "model", seed=0, log=tmp_path / "learner.log") as learner:
        with pytest.raises(LearnerDied, match=r"exit status 2.*learner\.log"):
            learner.receive("the learner to be ready", 60)
        with pytest.raises(LearnerDied, match="exit status 2"):
            learner.send("no-such-fleet")
    assert "invalid choice: 'llama'" in (tmp_path / "learner.log").read_text()
