"""One model with random weights, as transformers has it and as our engine hosts it; what the engine generates."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3MoeConfig

from rollout.config import EngineConfig
from rollout.engine import Engine
from rollout.engine.sequence import Sequence
from rollout.model.certification import certified
from rollout.model.decoder import Decoder
from rollout.model.families import decoder_spec, hosted_layout
from rollout.model.hosted import HostedModel
from rollout.model.router import Hosting
from rollout.model.storage import allocate
from rollout.request import Completion, Prompt, SamplingParams
from weights.digest import ZERO
from weights.naming import to_wire
from weights.version import WeightVersion

INIT_STD = 0.02
MAX_RUNNING = 64
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "30b-a3b": {
        "vocab_size": 151936,
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_experts": 128,
        "num_experts_per_tok": 8,
    },
    "tiny": {
        "vocab_size": 257,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "num_experts": 16,
        "num_experts_per_tok": 4,
    },
}
"""Qwen3-30B-A3B's, and one for a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Lengths:
    """Of prompts and answers: all alike, so that the learner's batch needs no padding."""

    sequences: int
    prompt: int
    answer: int


def random_model(shape: str, *, layers: int, dtype: torch.dtype, device: torch.device, seed: int) -> PreTrainedModel:
    """transformers' Qwen3-MoE, normal weights of standard deviation INIT_STD, norms 1, made on the device."""
    config = Qwen3MoeConfig(
        **SHAPES[shape],
        num_hidden_layers=layers,
        norm_topk_prob=True,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=False,
    )
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    generator = torch.Generator(device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=INIT_STD, generator=generator)
    trained: PreTrainedModel = model.eval().requires_grad_(False)
    return trained


def hosted(model: PreTrainedModel, gate: Literal["fp32", "trainer"]) -> HostedModel:
    """The same weights as our engine runs them, on the model's device and in its dtype."""
    device, dtype = model.device, model.dtype
    config = {**model.config.to_dict(), "architectures": [type(model).__name__]}
    assert dtype in (torch.bfloat16, torch.float32)
    platform = "cuda" if device.type == "cuda" else "cpu"
    asked = decoder_spec(config, Hosting(gate=gate, dtype=dtype, platform=platform))
    certification = certified(asked, device, refuses=False)  # a measurement; what differs is logged
    spec = certification.spec
    parameters = allocate(spec, device)
    layout = hosted_layout(spec, parameters)
    wire: dict[str, Tensor] = dict(to_wire(model.state_dict().items()))
    for name, block in layout.state_dict(parameters):
        block.copy_(wire[name])
    return HostedModel(
        spec=spec,
        parameters=parameters,
        layout=layout,
        wire_dtypes=dict.fromkeys(layout, dtype),
        certification=certification,
    )


def generate(host: HostedModel, lengths: Lengths, seed: int) -> list[Completion]:
    """Random prompts and what the engine answers at temperature 1, the experts of every token recorded."""
    context = lengths.prompt + lengths.answer
    engine = Engine(
        host,
        Decoder(host.spec, host.parameters),
        EngineConfig(max_running=min(MAX_RUNNING, lengths.sequences), max_context=context, prefix_cache=False),
        eos_token_ids=frozenset(),
        version=WeightVersion(run="gap", step=0, digest=ZERO),
    )
    params = SamplingParams(max_tokens=lengths.answer, seed=seed, ignore_eos=True, record_routing=True)
    numbers = torch.Generator().manual_seed(seed)
    drawn = torch.randint(host.spec.vocab_size, (lengths.sequences, lengths.prompt), generator=numbers).tolist()
    sequences = [
        Sequence(("gap", str(index), 0), Prompt(id=str(index), token_ids=tuple(token_ids)), params)
        for index, token_ids in enumerate(drawn)
    ]
    for sequence in sequences:
        engine.validate(sequence)
    engine.add(*sequences)
    while engine.has_work:
        engine.step()
    return [sequence.completion("gap") for sequence in sequences]
