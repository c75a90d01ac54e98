"""A host's completions, replayed in the learner's own transformers model: the same experts, the same tokens' odds."""

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import glm4_config, qwen3_config, save, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from rollout.config import EngineConfig
from rollout.engine import Engine
from rollout.engine.sequence import Sequence
from rollout.model.decoder import Decoder
from rollout.model.hosted import HostedModel
from rollout.request import Completion, Prompt, SamplingParams
from routing import RoutingRecord, observe, padded_record, replay
from routing.model_routers import model_routers
from weights.digest import Digest
from weights.version import WeightVersion

PROMPTS = [(5, 9, 2), (7,), (1, 2, 3, 4, 5, 6, 7), (5, 9, 2)]
TOLERANCE = 1e-5
VERSION = WeightVersion(run="test", step=0, digest=Digest(0, 0))


@pytest.fixture(params=["qwen3_moe", "glm4_moe"])
def learner(request: pytest.FixtureRequest) -> PreTrainedModel:
    config = qwen3_config() if request.param == "qwen3_moe" else glm4_config(num_hidden_layers=3)
    return tiny_model(config, 4)


@pytest.fixture
def completions(learner: PreTrainedModel, tmp_path: Path) -> list[Completion]:
    """Of prompts of several lengths, two of them alike, in chunks and with what is cached of their prefixes."""
    model = HostedModel.load(save(learner, tmp_path), device="cpu")
    config = EngineConfig(max_running=3, max_context=64, block_size=2, prefill_chunk=3)
    engine = Engine(model, Decoder(model.spec, model.parameters), config, eos_token_ids=frozenset(), version=VERSION)
    params = SamplingParams(max_tokens=9, seed=3, record_routing=True)
    sequences = [
        Sequence(("client", str(index), 0), Prompt(id=str(index), token_ids=prompt), params)
        for index, prompt in enumerate(PROMPTS)
    ]
    engine.add(*sequences)
    while engine.has_work:
        engine.step()
    return [sequence.completion("host") for sequence in sequences]


def batch_of(completions: list[Completion], side: str) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Token ids and mask, padded on one side, and what the model is called with: all tokens but the last column."""
    rows = [[*c.prompt_token_ids, *c.token_ids] for c in completions]
    width = max(map(len, rows))
    before = [width - len(row) if side == "left" else 0 for row in rows]
    ids = torch.tensor([[0] * b + row + [0] * (width - b - len(row)) for b, row in zip(before, rows, strict=True)])
    mask = torch.tensor(
        [[0] * b + [1] * len(r) + [0] * (width - b - len(r)) for b, r in zip(before, rows, strict=True)]
    )
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    return ids, mask, {"input_ids": ids, "attention_mask": mask, "position_ids": positions}


def sampled_logprobs(logits: Tensor, completions: list[Completion], mask: Tensor) -> list[Tensor]:
    """Per completion, of its sampled tokens."""
    logprobs = []
    for row, c in enumerate(completions):
        rows_TV = logits[row][mask[row].bool()].log_softmax(-1)[len(c.prompt_token_ids) - 1 : -1]
        logprobs.append(rows_TV.gather(1, torch.tensor(c.token_ids)[:, None])[:, 0])
    return logprobs


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("block", [observe, replay])
def test_the_learner_decides_as_the_host_did(
    learner: PreTrainedModel, completions: list[Completion], side: str, block: Any
) -> None:
    ids, mask, inputs = batch_of(completions, side)
    record = padded_record(completions, ids, mask)
    with block(learner, record) as seen:
        logits = learner(**inputs).logits
    report = seen.report()
    assert report.positions == sum(len(c.prompt_token_ids) + len(c.token_ids) - 1 for c in completions)
    assert report.decisions == 2 * report.positions
    assert report.differing == 0
    assert report.weight_abs_diff_max is not None
    assert report.weight_abs_diff_max < TOLERANCE
    for found, c in zip(sampled_logprobs(logits, completions, mask), completions, strict=True):
        torch.testing.assert_close(found, torch.tensor(c.model_logprobs), atol=TOLERANCE, rtol=0)


def test_a_learner_that_would_decide_otherwise_follows_the_host(
    learner: PreTrainedModel, completions: list[Completion]
) -> None:
    ids, mask, inputs = batch_of(completions, "left")
    record = padded_record(completions, ids, mask)
    routers = model_routers(learner)
    for router in routers:
        noise = torch.randn(router.module.weight.shape, generator=torch.Generator().manual_seed(8))
        router.module.weight.data += 0.05 * noise
    with observe(learner, record) as observed:
        learner(**inputs)
    seen: list[Tensor] = []
    hooks = [r.module.register_forward_hook(lambda _module, _inputs, out: seen.append(out[2])) for r in routers]
    with replay(learner, record) as replayed:
        learner(**inputs)
    for hook in hooks:
        hook.remove()
    assert observed.report().differing > 0
    assert replayed.report().differing > 0
    used_BSLK = torch.stack(seen, dim=1).view(record.expert_ids_BSLK.shape)
    assert torch.equal(used_BSLK[record.recorded_BS], record.expert_ids_BSLK.long()[record.recorded_BS])


def test_a_completion_in_the_wrong_row_is_refused(learner: PreTrainedModel, completions: list[Completion]) -> None:
    ids, mask, _ = batch_of(completions, "left")
    with pytest.raises(ValueError, match=r"1#0: 12 tokens in row 0, the completion has 10, 0#0: 10 tokens in row 1"):
        padded_record([completions[1], completions[0], *completions[2:]], ids, mask)


def test_a_record_of_other_completions_is_refused_in_the_forward(
    learner: PreTrainedModel, completions: list[Completion]
) -> None:
    ids, mask, inputs = batch_of(completions, "left")
    record: RoutingRecord = padded_record(completions, ids, mask)
    other = inputs["input_ids"].clone()
    other[2, 4] += 1
    with pytest.raises(ValueError, match=r"other tokens than the record in row 2 \(2#0\)$"), replay(learner, record):
        learner(**{**inputs, "input_ids": other})
