"""Tiny real checkpoints: transformers models of the two families, every weight away from its trivial value, written by
save_pretrained. The same models are what the tests compare with."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)
from transformers.utils import logging

logging.disable_progress_bar()

MODELS = {"qwen3_moe": Qwen3MoeForCausalLM, "glm4_moe": Glm4MoeForCausalLM}


def qwen3_config(**changes: Any) -> Qwen3MoeConfig:
    """A Qwen3-MoE of two layers, five experts, two of them per token; `changes` are fields of Qwen3MoeConfig."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "moe_intermediate_size": 12,
        "num_experts": 5,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
    }
    return Qwen3MoeConfig(**fields | changes)


def glm4_config(**changes: Any) -> Glm4MoeConfig:
    """A GLM-4 MoE of two layers, the first dense, six experts in two groups; `changes` are fields of Glm4MoeConfig."""
    fields: dict[str, Any] = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 256,
        "moe_intermediate_size": 12,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 1.5,
        "first_k_dense_replace": 1,
        "attention_bias": True,
    }
    return Glm4MoeConfig(**fields | changes)


def tiny_model(config: PreTrainedConfig, seed: int, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A transformers model of this config in eval mode, attention and experts eager, all weights drawn from `seed`.

    In bfloat16 the experts' correction bias stays in fp32, as transformers loads it.
    """
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    model = MODELS[config.model_type](config).eval().requires_grad_(False)
    perturb_(model, seed)
    biases = {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    model.to(dtype)
    for name, bias in biases.items():
        model.get_submodule(name.rpartition(".")[0]).e_score_correction_bias = nn.Buffer(bias)
    return model


def perturb_(model: nn.Module, seed: int) -> None:
    """Draws every parameter and saved buffer anew, in place, from `seed`: a different seed changes every tensor.

    Scales keep activations and logits of order 1: an error shows in them, and fp32's own rounding stays below 1e-5.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("e_score_correction_bias"):
                drawn = 0.1 * noise
            elif "norm" in name:
                drawn = 1 + 0.2 * noise
            elif name.endswith(".bias"):
                drawn = 0.2 * noise
            elif "embed" in name or "lm_head" in name:
                drawn = 0.15 * noise
            else:
                drawn = noise / tensor.shape[-1] ** 0.5
            tensor.copy_(drawn)


def save(model: PreTrainedModel, folder: Path | str, *, sharded: bool = False) -> Path:
    """Writes the checkpoint with save_pretrained, in one file or in many small ones, and returns its folder."""
    model.save_pretrained(folder, max_shard_size="20KB" if sharded else "5GB")
    return Path(folder)


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What one MoE layer of transformers did with T tokens."""

    logits_TE: Tensor
    weights_TK: Tensor
    expert_ids_TK: Tensor


@contextmanager
def routers_watched(model: PreTrainedModel) -> Iterator[list[Routed]]:
    """Collects what the MoE layers' routers return, layer by layer, while the block runs."""
    seen: list[Routed] = []
    routers = [module for name, module in model.named_modules() if name.endswith("mlp.gate")]
    hooks = [
        router.register_forward_hook(
            lambda _module, _inputs, out: seen.append(
                Routed(logits_TE=out[0].clone(), weights_TK=out[1].clone(), expert_ids_TK=out[2].clone())
            )
        )
        for router in routers
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
