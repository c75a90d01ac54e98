"""The presets and the CPU reference are transformers' own routers, bit for bit."""

import dataclasses
from typing import Any

import pytest
import torch
from router_rows import bits, logit_rows
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from routing import GateSpec, GroupSpec, ReduceKind, RouterSpec, ScoreFunction, SlotOrder, gate_logits, reference, route

QWEN3 = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
GLM4 = {"model_type": "glm4_moe", "n_routed_experts": 160, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}


def preset(config: object, **options: Any) -> RouterSpec:
    return RouterSpec.from_trainer("transformers", config, **{"dtype": torch.bfloat16, "platform": "cpu", **options})


def assert_routes_alike(router: torch.nn.Module, spec: RouterSpec, hidden_TD: Tensor, **operands: Tensor) -> None:
    logits_TE, weights_TK, ids_TK = router(hidden_TD)
    found = route(logits_TE, spec, **operands)
    assert found.expert_ids_TK.tolist() == ids_TK.tolist()
    assert found.weights_TK.dtype == weights_TK.dtype
    assert bits(found.weights_TK).tolist() == bits(weights_TK).tolist()
    own = gate_logits(hidden_TD, router.weight, spec.gate)
    assert bits(own).tolist() == bits(logits_TE).tolist()


def hidden_states(spec: RouterSpec, dtype: torch.dtype) -> Tensor:
    """Every row family, as the hidden states that an identity gate turns into logits (NaN spreads, as it would)."""
    return torch.cat([rows.to(dtype) for rows in logit_rows(spec).values()])


@pytest.mark.parametrize("gate", ["fp32", "trainer"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(("E", "K"), [(128, 8), (60, 4), (512, 10), (8, 1)])
def test_qwen3_moe(E: int, K: int, normalised: bool, gate: str) -> None:
    config = Qwen3MoeConfig(num_experts=E, num_experts_per_tok=K, hidden_size=E, norm_topk_prob=normalised)
    spec = preset(config, gate=gate)
    dtype = torch.float32 if gate == "fp32" else torch.bfloat16
    router = Qwen3MoeTopKRouter(config).to(dtype).requires_grad_(False)
    router.weight.copy_(torch.eye(E))
    assert_routes_alike(router, spec, hidden_states(spec, dtype))
    router.weight.normal_(generator=torch.Generator().manual_seed(E))
    assert_routes_alike(router, spec, torch.randn(33, E, generator=torch.Generator().manual_seed(K)).to(dtype))


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("E", "K", "groups", "scale"), [(160, 8, (1, 1), 2.5), (64, 8, (8, 4), 1.0), (32, 6, (4, 2), 1.8)]
)
def test_glm4_moe(E: int, K: int, groups: tuple[int, int], scale: float, normalised: bool) -> None:
    config = Glm4MoeConfig(
        n_routed_experts=E,
        num_experts_per_tok=K,
        hidden_size=E,
        n_group=groups[0],
        topk_group=groups[1],
        routed_scaling_factor=scale,
        norm_topk_prob=normalised,
    )
    spec = preset(config)
    assert spec == preset(config, gate="trainer")
    router = Glm4MoeTopkRouter(config).requires_grad_(False)
    router.e_score_correction_bias.normal_(std=0.05, generator=torch.Generator().manual_seed(1))
    for weight_ED in (torch.eye(E), torch.randn(E, E, generator=torch.Generator().manual_seed(2))):
        router.weight.copy_(weight_ED)
        for hidden_TD in (hidden_states(spec, torch.float32), torch.randn(33, E).bfloat16()):
            assert_routes_alike(router, spec, hidden_TD, bias_E=router.e_score_correction_bias)


def test_the_preset_states_the_trainers_rounding() -> None:
    rl, trainer = preset(QWEN3), preset(QWEN3, gate="trainer")
    assert (rl.score, rl.slot_order, rl.reduce.kind) == (ScoreFunction.SOFTMAX, SlotOrder.SORTED, ReduceKind.SUM)
    assert (rl.gate, rl.weight_dtype, rl.chain_dtype, rl.scale) == (GateSpec(), torch.float32, torch.float32, None)
    assert trainer.gate == GateSpec(operand_dtype=torch.bfloat16, output_dtype=torch.bfloat16)
    assert (trainer.weight_dtype, trainer.chain_dtype) == (torch.bfloat16, torch.float32)
    glm = preset({**GLM4, "n_group": 8, "topk_group": 4})
    assert (glm.score, glm.slot_order, glm.has_bias) == (ScoreFunction.SIGMOID, SlotOrder.UNSORTED, True)
    assert (glm.reduce.kind, glm.reduce.eps, glm.scale) == (ReduceKind.SUM_EPS, 1e-20, 2.5)
    assert (glm.groups, preset(GLM4).groups) == (GroupSpec(count=8, kept=4), None)


def test_what_the_config_leaves_out_is_the_config_classs_default() -> None:
    bare = {key: value for key, value in QWEN3.items() if key != "norm_topk_prob"}
    assert preset(bare).reduce.kind is ReduceKind.NONE is preset(Qwen3MoeConfig()).reduce.kind
    bare = {key: value for key, value in GLM4.items() if key != "routed_scaling_factor"}
    assert preset(bare).reduce.kind is ReduceKind.SUM_EPS is preset(Glm4MoeConfig()).reduce.kind
    assert preset(bare).scale == 1.0 == preset(Glm4MoeConfig()).scale


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_old_and_new_names_of_the_config_mean_the_same(name: str) -> None:
    renamed = {("num_experts" if key == "n_routed_experts" else key): value for key, value in GLM4.items()}
    assert preset({**{k: v for k, v in renamed.items() if k != "num_experts"}, name: 160}) == preset(GLM4)
    assert preset({**{k: v for k, v in QWEN3.items() if k != "num_experts"}, name: 128}) == preset(QWEN3)
    assert preset(Qwen3MoeConfig(**QWEN3)) == preset(Qwen3MoeConfig(**QWEN3).to_dict()) == preset(QWEN3)
    assert preset(Glm4MoeConfig(**GLM4)) == preset(Glm4MoeConfig(**GLM4).to_dict()) == preset(GLM4)


def test_the_dtype_is_the_configs_unless_given() -> None:
    for key in ("dtype", "torch_dtype"):
        assert preset({**QWEN3, key: "float16"}, dtype=None, gate="trainer").weight_dtype == torch.float16
    with pytest.raises(ValueError, match="names no dtype"):
        preset(QWEN3, dtype=None)


@pytest.mark.parametrize(
    ("trainer", "config", "message"),
    [
        ("transformer", QWEN3, r"unknown trainer 'transformer'; did you mean 'transformers'\?"),
        ("transformers", {**QWEN3, "model_type": "mixtral"}, "known families: glm4_moe, qwen3_moe"),
        (
            "transformers",
            {"model_type": "qwen3_moe", "num_experts_per_tok": 8},
            "none of num_local_experts, num_experts",
        ),
        ("transformers", {**QWEN3, "num_local_experts": 64}, "disagrees with itself"),
        ("transformers", {"num_experts": 4}, "no 'model_type'"),
        ("transformers", {"model_type": "qwen3_moe", "num_experts": 8}, "no 'num_experts_per_tok'"),
    ],
)
def test_an_unknown_trainer_or_config_is_refused(trainer: str, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RouterSpec.from_trainer(trainer, config, dtype=torch.bfloat16, platform="cpu")


def test_the_cuda_definition_agrees_up_to_rounding() -> None:
    for config in (QWEN3, {**GLM4, "n_group": 8, "topk_group": 4}):
        cpu = preset(config)
        cuda = dataclasses.replace(cpu, platform="cuda")
        logits_TE = logit_rows(cpu)["normal"]
        operands = {"bias_E": torch.linspace(-0.1, 0.1, cpu.num_experts)} if cpu.has_bias else {}
        by_cpu, by_cuda = (reference(logits_TE, spec, **operands) for spec in (cpu, cuda))
        pairs = [found.weights_TK.gather(1, found.expert_ids_TK.argsort(dim=1)) for found in (by_cpu, by_cuda)]
        assert by_cpu.expert_ids_TK.sort(dim=1).values.tolist() == by_cuda.expert_ids_TK.sort(dim=1).values.tolist()
        torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="platform 'cuda', the logits are on cpu"):
        route(logits_TE, cuda, **operands)
