"""Writes the tiny checkpoint that the demo starts from: transformers' own class with random weights, in fp32."""

from pathlib import Path
from typing import Any

import torch
from transformers import Glm4MoeConfig, Glm4MoeForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter

from grpo.families import FAMILIES
from grpo.task import ANSWER_TOKENS, PROMPT_TOKENS, VOCAB_SIZE

BIAS_STD = 0.1  # wide enough to change which experts win, narrow enough that the scores still decide

SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "max_position_embeddings": 64,
    "initializer_range": 0.05,
    "tie_word_embeddings": False,
}
ROPE_THETA = 100.0  # the usual 10,000 turns most of a head's planes too slowly to tell ten positions apart


def build_model(family: str) -> PreTrainedModel:
    """A model of the family with weights from torch's global random numbers.

    Raises:
        ValueError: the demo has no such family.
    """
    assert SHAPE["max_position_embeddings"] >= PROMPT_TOKENS + ANSWER_TOKENS
    rope = {"rope_type": "default", "rope_theta": ROPE_THETA}
    if family == "qwen3_moe":
        return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, num_hidden_layers=2, num_experts=8, rope_parameters=rope))
    if family == "glm4_moe":
        config = Glm4MoeConfig(
            **SHAPE,
            num_hidden_layers=2,
            n_routed_experts=8,
            n_shared_experts=1,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=1.5,
            first_k_dense_replace=1,
            use_qk_norm=True,
            attention_bias=True,
            num_mtp_layers=0,
            rope_parameters={**rope, "partial_rotary_factor": 0.5},
        )
        model = Glm4MoeForCausalLM(config)
        for router in model.modules():
            if isinstance(router, Glm4MoeTopkRouter):
                router.e_score_correction_bias.normal_(std=BIAS_STD)
        return model
    raise ValueError(f"family: got {family!r}, the demo has {', '.join(FAMILIES)}")


def write_checkpoint(family: str, folder: Path, *, seed: int) -> None:
    """A Hugging Face checkpoint folder with random weights; the same seed writes the same bytes."""
    torch.manual_seed(seed)
    build_model(family).save_pretrained(folder)
