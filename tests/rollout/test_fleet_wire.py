"""A fleet whose updates come over a wire (gloo between CPUs, as NCCL between GPUs), with and without a second copy."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import perturb_, qwen3_config, save, tiny_model
from transformers import PreTrainedModel

from rollout import Fleet, Prompt, RolloutConfig, SamplingParams
from weights.publisher import Publisher
from weights.rendezvous import Roster

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def learner() -> PreTrainedModel:
    return tiny_model(qwen3_config(), 1)


@pytest.fixture(params=[True, False], ids=["shadow", "in place"])
def fleet(
    request: pytest.FixtureRequest, learner: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Fleet]:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    plain = {
        "name": f"wire-{os.getpid()}",
        "model": str(save(learner, tmp_path / "checkpoint")),
        "hosts": 2,
        "engine": {"max_context": 128, "max_running": 8},
        "weights": {"transport": "nccl", "shadow": request.param, "bucket_mib": 1},
    }
    with Fleet.launch(RolloutConfig.from_mapping(plain)) as fleet:
        assert Roster.read(fleet.name).shadow is request.param
        yield fleet


def test_updates_over_a_wire_reach_every_host_while_they_generate(fleet: Fleet, learner: PreTrainedModel) -> None:
    prompts = [Prompt(id=f"p{i}", token_ids=(1, 2, 3 + i)) for i in range(8)]
    with Publisher.connect(fleet.name) as publisher:
        stream = fleet.generate(prompts, SamplingParams(n=2, max_tokens=100, ignore_eos=True))
        completions = [next(stream)]
        for step in (1, 2, 3):
            perturb_(learner, 40 + step)
            report = publisher.publish(learner, step=step)
            assert set(report.hosts) == {"host-0", "host-1"}
        completions += stream
    assert len(completions) == 16
    assert {host.version for host in fleet.status().hosts} == {report.version}
    assert {digest for _, digest in fleet.verify().values()} == {report.version.digest}
