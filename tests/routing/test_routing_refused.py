"""What no RouterSpec says, and what a config asks for and no row can do, is refused by name."""

import importlib
from typing import Any

import pytest
import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from routing import ReduceKind, RouterSpec, TopkReduce
from routing.trainers import TRAINERS

QWEN3 = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
DEEPSEEK_V2 = {"model_type": "deepseek_v2", "n_routed_experts": 160, "num_experts_per_tok": 6}
REFUSED = {name: entry for entry in TRAINERS["transformers"].refusals for name in entry.model_types}


def preset(config: object, trainer: str = "transformers") -> RouterSpec:
    return RouterSpec.from_trainer(trainer, config, dtype=torch.bfloat16, platform="cpu")


@pytest.mark.parametrize(
    ("trainer", "config", "message"),
    [
        ("transformer", QWEN3, r"unknown trainer 'transformer'; did you mean 'transformers'\?"),
        (
            "transformers",
            {**QWEN3, "model_type": "bert"},
            r"no routing known for model_type 'bert'.*glm4_moe, ",
        ),
        (
            "transformers",
            {"model_type": "qwen3_moe", "num_experts_per_tok": 8},
            "none of num_local_experts, num_experts",
        ),
        ("transformers", {**QWEN3, "num_local_experts": 64}, "disagrees with itself"),
        ("transformers", {"num_experts": 4}, "no 'model_type'"),
        ("transformers", {"model_type": "qwen3_moe", "num_experts": 8}, "none of num_experts_per_tok"),
        ("transformers", {**QWEN3, "num_experts": "many"}, "num_local_experts: a whole number expected, got 'many'"),
        ("torchtitan", {**QWEN3, "model_type": "mixtral"}, "known families: deepseek_v3, glm4_moe, kimi_k2, qwen3"),
        (
            "megatron",
            DEEPSEEK_V2,
            "cannot be said by a RouterSpec: a group's score is",
        ),
    ],
)
def test_an_unknown_trainer_or_config_is_refused(trainer: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        preset(config, trainer)


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_router_that_cannot_be_said_is_refused_with_its_operation(model_type: str) -> None:
    refusal = REFUSED[model_type]
    module, _, name = refusal.source.rpartition(".")
    assert hasattr(importlib.import_module(module), name)
    with pytest.raises(ValueError, match=rf"under trainer 'transformers' cannot be said.*{refusal.why}"):
        preset(CONFIG_MAPPING[model_type]())


@pytest.mark.parametrize(
    ("trainer", "changes", "message"),
    [
        (
            "transformers",
            {"model_type": "mixtral", "router_jitter_noise": 0.1},
            "router_jitter_noise=0.1 asks for noise",
        ),
        ("transformers", {"model_type": "minimax_m2", "router_jitter_noise": 0.1}, "asks for noise"),
        (
            "transformers",
            {"model_type": "laguna", "moe_router_logit_softcapping": 30.0},
            "bounded by a tanh; 0.0 expected",
        ),
        (
            "transformers",
            {"model_type": "glm4_moe", "scoring_func": "softmax"},
            "scoring_func='softmax' asks for another",
        ),
        (
            "transformers",
            {"model_type": "deepseek_v3", "topk_method": "greedy"},
            "topk_method='greedy' asks for another",
        ),
        (
            "transformers",
            {"model_type": "deepseek_v2", "topk_method": "noaux_tc"},
            "'greedy' or 'group_limited_greedy'",
        ),
        (
            "transformers",
            {"model_type": "cohere2_moe", "expert_selection_fn": "sigmoid"},
            "a sigmoid of the chosen logits",
        ),
        (
            "transformers",
            {"model_type": "deepseek_v4", "scoring_func": "sigmoid"},
            "another score.*looked up by token id",
        ),
        (
            "transformers",
            {"model_type": "deepseek_v4", "mlp_layer_types": ["hash_moe", "moe"]},
            "differs from layer to",
        ),
        ("megatron", {"model_type": "qwen3_moe", "norm_topk_prob": False}, "weights that are not normalised"),
        ("megatron", {"model_type": "qwen2_moe", "norm_topk_prob": True}, "does not have on its pre-softmax path"),
        ("megatron", {"model_type": "glm4_moe", "norm_topk_prob": False}, "weights that are not normalised"),
    ],
)
def test_what_a_config_asks_for_and_a_row_cannot_do_is_refused(
    trainer: str, changes: dict[str, Any], message: str
) -> None:
    config = {"num_experts": 16, "num_local_experts": 16, "num_experts_per_tok": 4, **changes}
    with pytest.raises(ValueError, match=message):
        preset(config, trainer)


def test_layers_may_not_differ() -> None:
    hunyuan = {"model_type": "hunyuan_v1_moe", "num_experts": [16, 16], "moe_topk": [2, 2]}
    assert preset(hunyuan) == preset({**hunyuan, "num_experts": 16, "moe_topk": 2})
    with pytest.raises(ValueError, match=r"moe_topk differs from layer to layer.*\[2, 1\]"):
        preset({**hunyuan, "moe_topk": [2, 1]})


def test_dbrx_is_normalised_by_the_sum_or_not_at_all() -> None:
    def dbrx(p: object) -> dict[str, Any]:
        ffn = {"moe_num_experts": 16, "moe_top_k": 4, "moe_normalize_expert_weights": p}
        return {"model_type": "dbrx", "ffn_config": ffn}

    assert preset(dbrx(1)).reduce == preset(dbrx(1.0)).reduce == TopkReduce(kind=ReduceKind.L1)
    assert preset(dbrx(None)).reduce == TopkReduce(kind=ReduceKind.NONE)
    with pytest.raises(ValueError, match=r"moe_normalize_expert_weights=2\.0 asks for a norm of another order than 1"):
        preset(dbrx(2.0))
