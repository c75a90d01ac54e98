"""Routers of public models, as data: what of a checkpoint's config.json they depend on.

Models with the same numbers stand in one row. The numbers are those of the released configs; where a name says so, of
transformers' class default.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch

from routing import GateSpec, Platform, RouterSpec
from routing.trainer_row import Row
from routing.trainers import row_for

TRAINER = "transformers"
BF16_GATE = GateSpec(operand_dtype=torch.bfloat16, output_dtype=torch.bfloat16)


class Logits(StrEnum):
    """In which dtype a gate leaves its logits."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, kw_only=True)
class Model:
    """A router as a checkpoint configures it."""

    name: str
    config: Mapping[str, object]

    @property
    def row(self) -> Row:
        """What the trainer computes for it. ValueError where a RouterSpec cannot say it."""
        return row_for(TRAINER, self.config)

    def spec(self, logits: Logits, platform: Platform) -> RouterSpec:
        """In fp32 throughout; or with bf16 logits, every later rounding the trainer's own in a bf16 model.

        A trainer whose gate is fp32 in a bf16 model as well is given bf16 logits all the same.
        """
        if logits is Logits.FP32:
            return RouterSpec.from_trainer(TRAINER, self.config, dtype=torch.float32, platform=platform)
        spec = RouterSpec.from_trainer(TRAINER, self.config, dtype=torch.bfloat16, platform=platform, gate="trainer")
        gate = replace(BF16_GATE, has_bias=spec.gate.has_bias)
        return replace(spec, gate=gate)


def _model(name: str, model_type: str, **config: object) -> Model:
    return Model(name=name, config={"model_type": model_type, **config})


def _deepseek(name: str, model_type: str, E: int, K: int, scale: float, groups: tuple[int, int] = (1, 1)) -> Model:
    return _model(
        name,
        model_type,
        n_routed_experts=E,
        num_experts_per_tok=K,
        n_group=groups[0],
        topk_group=groups[1],
        norm_topk_prob=True,
        routed_scaling_factor=scale,
    )


def _qwen(name: str, model_type: str, E: int, K: int, *, normalised: bool) -> Model:
    return _model(name, model_type, num_experts=E, num_experts_per_tok=K, norm_topk_prob=normalised)


MODELS = (
    _deepseek("GLM-4.5, 4.6, 4.7", "glm4_moe", 160, 8, 2.5),
    _deepseek("GLM-4.5-Air", "glm4_moe", 128, 8, 1.0),
    _deepseek("GLM-4.7-Flash", "glm4_moe_lite", 64, 4, 1.8),
    _deepseek("GLM-5, 5.2", "glm_moe_dsa", 256, 8, 2.5),
    _qwen("Qwen3-30B-A3B, 235B-A22B", "qwen3_moe", 128, 8, normalised=True),
    _qwen("Qwen3-Next-80B-A3B", "qwen3_next", 512, 10, normalised=True),
    _model("Qwen3.5-35B-A3B", "qwen3_5_moe_text", num_experts=256, num_experts_per_tok=8),
    _qwen("Qwen1.5-MoE-A2.7B", "qwen2_moe", 60, 4, normalised=False),
    _deepseek("DeepSeek-V3, R1", "deepseek_v3", 256, 8, 2.5, (8, 4)),
    _model(
        "DeepSeek-V2",
        "deepseek_v2",
        n_routed_experts=160,
        num_experts_per_tok=6,
        topk_method="group_limited_greedy",
        n_group=8,
        topk_group=3,
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
    ),
    _model(
        "DeepSeek-V4 (class default)",
        "deepseek_v4",
        n_routed_experts=256,
        num_experts_per_tok=6,
        scoring_func="sqrtsoftplus",
        routed_scaling_factor=1.5,
        mlp_layer_types=["moe"],
    ),
    _deepseek("Kimi-K2, K2.5", "kimi_k2", 384, 8, 2.827),
    _deepseek("Moonlight-16B-A3B", "deepseek_v3", 64, 6, 2.446),
    _model(
        "Kimi-Linear-48B",
        "kimi_linear",
        num_experts=256,
        num_experts_per_token=8,
        num_expert_group=1,
        topk_group=1,
        moe_renormalize=True,
        routed_scaling_factor=2.446,
    ),
    _model("Mixtral-8x7B, 8x22B", "mixtral", num_local_experts=8, num_experts_per_tok=2),
    _qwen("OLMoE-1B-7B", "olmoe", 64, 8, normalised=False),
    _model("gpt-oss-120b", "gpt_oss", num_local_experts=128, num_experts_per_tok=4),
    _model("gpt-oss-20b", "gpt_oss", num_local_experts=32, num_experts_per_tok=4),
    _model("ERNIE-4.5-21B-A3B", "ernie4_5_moe", moe_num_experts=64, moe_k=6, moe_norm_min=1e-12),
    _model("ERNIE-4.5-300B-A47B", "ernie4_5_moe", moe_num_experts=64, moe_k=8, moe_norm_min=1e-12),
    _model("MiniMax-M2, M2.5", "minimax_m2", num_local_experts=256, num_experts_per_tok=8),
    _model("Hunyuan-A13B", "hunyuan_v1_moe", num_experts=64, moe_topk=8),
    _model("Hy3 (class default)", "hy_v3", num_experts=192, num_experts_per_tok=8, router_scaling_factor=2.826),
    _model("DBRX", "dbrx", ffn_config={"moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": 1.0}),
    _model("Jamba-1.5", "jamba", num_experts=16, num_experts_per_tok=2),
    _model(
        "LFM2-8B-A1B",
        "lfm2_moe",
        num_experts=32,
        num_experts_per_tok=4,
        use_expert_bias=True,
        norm_topk_prob=True,
        routed_scaling_factor=1.0,
    ),
    _deepseek("Nemotron-3 nano", "nemotron_h", 128, 6, 2.5),
    _deepseek("Nemotron-3 super", "nemotron_h", 512, 22, 5.0),
)

REFUSED = (_model("Phi-3.5-MoE", "phimoe", num_local_experts=16, num_experts_per_tok=2),)
"""Whose router no RouterSpec describes."""


def named(names: list[str] | None) -> tuple[Model, ...]:
    """The models whose name begins like that; all of them for None. ValueError for a name that none has."""
    if names is None:
        return MODELS
    unknown = [name for name in names if not any(model.name.startswith(name) for model in MODELS)]
    if unknown:
        raise ValueError(f"no model is called {', '.join(unknown)}; known: {'; '.join(m.name for m in MODELS)}")
    return tuple(model for model in MODELS if any(model.name.startswith(name) for name in names))
