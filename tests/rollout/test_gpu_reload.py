"""After a hot reload a host on a GPU is the host that a fresh start on the new checkpoint gives, to the bit."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoints import perturb_, qwen3_config, save, tiny_model

from rollout.config import RolloutConfig
from rollout.host import Host
from rollout.request import Completion, Prompt, SamplingParams
from rollout.terms import roster_of
from weights.rendezvous import RosterHost

pytestmark = pytest.mark.gpu
ROOT = Path(__file__).resolve().parents[2]
PROMPTS = [tuple(range(1, 4 + i)) for i in range(8)]


def config_of(folder: Path, transport: str) -> RolloutConfig:
    return RolloutConfig.from_mapping(
        {
            "name": "reload",
            "model": str(folder),
            "rl_mode": True,
            "engine": {"max_context": 64, "max_running": 8, "prefix_cache": False},
            "weights": {"transport": transport, "bucket_mib": 1},
        }
    )


def completions_of(host: Host) -> list[Completion]:
    params = SamplingParams(max_tokens=24, temperature=1.0, ignore_eos=True, record_routing=True, seed=11)
    host.submit("me", [(Prompt(id=str(i), token_ids=tokens), params) for i, tokens in enumerate(PROMPTS)])
    found: list[Completion] = []
    while len(found) < len(PROMPTS):
        found += host.collect("me", 60)
    return sorted(found, key=lambda completion: completion.prompt_id)


@pytest.mark.parametrize("transport", ["cuda_ipc", "shared_memory"])
def test_a_reloaded_host_is_the_one_that_a_fresh_start_gives(
    transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    learner = tiny_model(qwen3_config(), 1)
    old = save(learner, tmp_path / "old")
    perturb_(learner, 7)
    new = save(learner, tmp_path / "new")
    config = config_of(old, transport)
    host = Host(config, "host-0")
    roster_of(config, (RosterHost(id="host-0", address=str(host.introduction.address)),), [host.introduction]).write()
    parameters = host._loop.engine.model.parameters
    addresses = {name: tensor.data_ptr() for name, tensor in parameters.items()}
    before = completions_of(host)
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    command = [sys.executable, "-m", "fakes.gpu_learner", "reload", str(new), "1"]
    told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert told.returncode == 0, told.stderr
    version, digest = host.verify()
    assert version is not None
    assert version.digest.hex == digest.hex == told.stdout.split()[-1]
    after = completions_of(host)
    assert {name: tensor.data_ptr() for name, tensor in parameters.items()} == addresses
    host.stop()
    fresh = Host(config_of(new, transport), "host-0")
    expected = completions_of(fresh)
    assert fresh.verify()[1] == digest
    fresh.stop()
    for one, other in zip(after, expected, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs
        assert one.expert_ids is not None
        assert other.expert_ids is not None
        assert np.array_equal(one.expert_ids, other.expert_ids)
    assert [one.token_ids for one in before] != [one.token_ids for one in after]
