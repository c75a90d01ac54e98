"""The same host on a GPU: transformers' tokens before and after a hot reload, and completions that replay."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import glm4_config, perturb_, qwen3_config, save, tiny_model
from transformers import PreTrainedConfig, PreTrainedModel

from rollout.config import RolloutConfig
from rollout.host import Host
from rollout.request import Prompt, SamplingParams
from weights.publisher import Publisher
from weights.rendezvous import Roster, RosterHost

pytestmark = pytest.mark.gpu
TOLERANCE = 1e-4
CONFIGS = {"qwen3_moe": qwen3_config(), "glm4_moe": glm4_config()}


@pytest.fixture(params=CONFIGS)
def config(request: pytest.FixtureRequest) -> PreTrainedConfig:
    return CONFIGS[request.param]


@pytest.fixture
def learner(config: PreTrainedConfig) -> PreTrainedModel:
    return tiny_model(config, 1).cuda()


@pytest.fixture
def host(learner: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    folder = save(learner, tmp_path / "checkpoint")
    fields = {"name": "gpu", "model": str(folder), "rl_mode": True, "engine": {"max_context": 64, "max_running": 8}}
    host = Host(RolloutConfig.from_mapping(fields), "host-0")
    assert host.introduction.address is not None
    roster_host = RosterHost(id="host-0", address=host.introduction.address)
    Roster(name="gpu", transport="shared_memory", hosts=(roster_host,)).write()
    yield host
    host.stop()


def check_generation(host: Host, learner: PreTrainedModel) -> None:
    params = SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True, record_routing=True)
    host.submit("me", [(Prompt(id=str(i), token_ids=tuple(range(1, 4 + i))), params) for i in range(12)])
    completions = []
    while len(completions) < 12:
        completions += host.collect("me", 60)
    for completion in completions:
        tokens = [*completion.prompt_token_ids, *completion.token_ids]
        with torch.no_grad():
            logits_TV = learner(torch.tensor([tokens[:-1]], device="cuda")).logits[0]
        logits_TV = logits_TV[len(completion.prompt_token_ids) - 1 :].cpu()
        chosen = torch.tensor(completion.token_ids)[:, None]
        lead = logits_TV.amax(1) - logits_TV.gather(1, chosen)[:, 0]
        assert lead.max() < TOLERANCE, "a token that is not the learner's first choice"
        logprobs = torch.log_softmax(logits_TV, 1).gather(1, chosen)[:, 0]
        torch.testing.assert_close(torch.tensor(completion.model_logprobs), logprobs, atol=TOLERANCE, rtol=0)


def test_a_host_on_the_gpu_generates_like_transformers_and_takes_weights(host: Host, learner: PreTrainedModel) -> None:
    assert all(tensor.is_cuda for tensor in host._loop.engine.model.parameters.values())
    check_generation(host, learner)
    with Publisher.connect("gpu") as publisher:
        for step in (1, 2):
            perturb_(learner.cpu(), 10 + step)
            learner.cuda()
            version = publisher.publish(learner, step=step).version
            assert host.verify() == (version, version.digest)
            check_generation(host, learner)
