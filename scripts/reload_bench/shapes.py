"""Models by their shape: the config.json of a public checkpoint, and a learner's tensors with random weights."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).resolve().parent / "shapes"
STD = 0.02


def config_of(shape: str, layers: int | None) -> dict[str, Any]:
    """The config of a shape, with fewer layers where asked."""
    config: dict[str, Any] = json.loads((FOLDER / f"{shape}.json").read_text(encoding="utf-8"))
    return config if layers is None else config | {"num_hidden_layers": layers}


def learner_tensors(config: dict[str, Any], device: torch.device) -> dict[str, Tensor]:
    """A Qwen3-MoE learner's weights under checkpoint names, one tensor per expert and projection, in bfloat16.

    Experts of a layer share their storage, as they do where a trainer holds them stacked.
    """
    return dict(_named(config, device))


def _named(config: dict[str, Any], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    hidden, experts, width = config["hidden_size"], config["num_experts"], config["moe_intermediate_size"]
    queries, keys = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    generator = torch.Generator(device).manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16, device=device).normal_(0.0, STD, generator=generator)

    yield "model.embed_tokens.weight", normal(config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        own = f"model.layers.{layer}."
        for part, rows in (("q", queries), ("k", keys), ("v", keys)):
            yield f"{own}self_attn.{part}_proj.weight", normal(rows, hidden)
        yield f"{own}self_attn.o_proj.weight", normal(hidden, queries)
        for norm, size in (
            ("self_attn.q_norm", config["head_dim"]),
            ("self_attn.k_norm", config["head_dim"]),
            ("input_layernorm", hidden),
            ("post_attention_layernorm", hidden),
        ):
            yield f"{own}{norm}.weight", torch.ones(size, dtype=torch.bfloat16, device=device)
        yield f"{own}mlp.gate.weight", normal(experts, hidden)
        gate_up, down = normal(experts, 2 * width, hidden), normal(experts, hidden, width)
        for expert in range(experts):
            yield f"{own}mlp.experts.{expert}.gate_proj.weight", gate_up[expert, :width]
            yield f"{own}mlp.experts.{expert}.up_proj.weight", gate_up[expert, width:]
            yield f"{own}mlp.experts.{expert}.down_proj.weight", down[expert]
    yield "model.norm.weight", torch.ones(hidden, dtype=torch.bfloat16, device=device)
    yield "lm_head.weight", normal(config["vocab_size"], hidden)


@torch.no_grad()
def optimizer_step_(tensors: dict[str, Tensor]) -> None:
    """Changes most elements of every storage, as a step of an optimizer does."""
    storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors.values()}
    for tensor in storages.values():
        whole = torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(tensor.untyped_storage())
        whole.mul_(1.0117)
