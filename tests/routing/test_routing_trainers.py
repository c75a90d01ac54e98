"""The trainers' tables: what is read from a config, and what is assumed without it."""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from router_rows import bits, logit_rows
from torch import Tensor
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers_routers import config_of

from routing import GateSpec, GroupSpec, ReduceKind, RouterSpec, ScoreFunction, SlotOrder, reference, route
from routing.trainer_row import Row, Setting
from routing.trainers import TRAINERS, row_for, trainer_named

QWEN3 = {"model_type": "qwen3_moe", "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True}
GLM4 = {"model_type": "glm4_moe", "n_routed_experts": 160, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}
DEEPSEEK_V3 = {"model_type": "deepseek_v3", "n_routed_experts": 256, "num_experts_per_tok": 8}
ROWS = {row.model_types[0]: row for row in TRAINERS["transformers"].rows}
BF16, FP64 = torch.bfloat16, torch.float64
UNSAID = object()


def preset(config: object, trainer: str = "transformers", **options: Any) -> RouterSpec:
    return RouterSpec.from_trainer(trainer, config, **{"dtype": BF16, "platform": "cpu", **options})


def settings_of(row: Row) -> list[Setting]:
    """Every setting that a row reads."""
    groups = row.groups
    found = [row.num_experts, row.extra_experts, row.top_k, row.bias, row.normalise, row.scale, *row.reduce.values()]
    found += [demand.of for demand in row.demands]
    if groups is not None:
        found += [groups.count, groups.kept, None if groups.only_if is None else groups.only_if[0]]
    return [entry for entry in found if isinstance(entry, Setting)]


def without(plain: dict[str, Any], setting: Setting) -> dict[str, Any]:
    """A config.json that does not say it."""
    plain = copy.deepcopy(plain)
    for name in setting.names:
        *path, last = name.split(".")
        part = plain
        for step in path:
            part = part.get(step, {})
        part.pop(last, None)
    return plain


def said_by(plain: dict[str, Any], setting: Setting) -> object:
    """What a mapping says under the first name of a setting that it knows."""
    for name in setting.names:
        value: Any = plain
        for step in name.split("."):
            value = value.get(step, UNSAID) if isinstance(value, dict) else UNSAID
        if value is not UNSAID:
            return value
    return UNSAID


@pytest.mark.parametrize("model_type", ROWS)
def test_a_config_object_and_its_mapping_mean_the_same_and_sizes_have_to_be_said(model_type: str) -> None:
    row = ROWS[model_type]
    config = config_of(row, 32, 4)
    assert config.model_type == model_type
    plain = config.to_dict()
    assert preset(plain) == preset(config)
    for setting in settings_of(row):
        if setting.default is None:
            with pytest.raises(ValueError, match=f"none of {setting.names[0]}"):
                preset(without(plain, setting))


@pytest.mark.parametrize("trainer", TRAINERS)
def test_what_a_config_may_leave_out_is_the_config_classs_default(trainer: str) -> None:
    """A class without the setting, or with null in it, leaves the default to the row."""
    for row in TRAINERS[trainer].rows:
        for model_type in set(row.model_types) & set(CONFIG_MAPPING):
            plain = CONFIG_MAPPING[model_type]().to_dict()
            for setting in settings_of(row):
                found = said_by(plain, setting)
                if setting.default is not None and isinstance(found, list):
                    assert setting.default in found, (model_type, setting)
                elif setting.default is not None:
                    assert found in (UNSAID, None, setting.default), (model_type, setting)


@pytest.mark.parametrize("trainer", TRAINERS)
def test_every_row_of_every_trainer_gives_a_spec(trainer: str) -> None:
    for row in TRAINERS[trainer].rows:
        for model_type in row.model_types:
            plain = {
                "model_type": model_type,
                "mlp_layer_types": ["moe"],
                "norm_topk_prob": row_for("transformers", {"model_type": model_type}).normalise is not False
                and not model_type.startswith("qwen2"),
                row.num_experts.names[0]: 64,
                row.top_k.names[0]: 8,
            }
            if model_type == "dbrx":
                plain["ffn_config"] = {"moe_num_experts": 64, "moe_top_k": 8}
            assert row_for(trainer, plain) is row
            for gate in ("fp32", "trainer"):
                spec = preset(plain, trainer, gate=gate, platform="cuda")
                assert spec.top_k == 8
                assert spec.gate.output_dtype in (torch.float32, FP64) or gate == "trainer"
    assert TRAINERS[trainer].description
    assert trainer_named(trainer).name == trainer
    families = [model_type for row in TRAINERS[trainer].rows for model_type in row.model_types]
    families += [model_type for refusal in TRAINERS[trainer].refusals for model_type in refusal.model_types]
    assert len(set(families)) == len(families)


def test_the_transformers_preset_states_the_trainers_rounding() -> None:
    rl, trainer = preset(QWEN3), preset(QWEN3, gate="trainer")
    assert (rl.score, rl.slot_order, rl.reduce.kind) == (ScoreFunction.SOFTMAX, SlotOrder.SORTED, ReduceKind.SUM)
    assert (rl.gate, rl.weight_dtype, rl.chain_dtype, rl.scale) == (GateSpec(), torch.float32, torch.float32, None)
    assert trainer.gate == GateSpec(operand_dtype=BF16, output_dtype=BF16)
    assert (trainer.weight_dtype, trainer.chain_dtype) == (BF16, torch.float32)
    glm = preset({**GLM4, "n_group": 8, "topk_group": 4})
    assert (glm.score, glm.slot_order, glm.has_bias) == (ScoreFunction.SIGMOID, SlotOrder.UNSORTED, True)
    assert (glm.reduce.kind, glm.reduce.eps, glm.scale) == (ReduceKind.SUM_EPS, 1e-20, 2.5)
    assert (glm.groups, preset(GLM4).groups) == (GroupSpec(count=8, kept=4), None)
    oss = preset({"model_type": "gpt_oss", "num_local_experts": 32, "num_experts_per_tok": 4})
    assert oss.gate == GateSpec(has_bias=True)


@pytest.mark.parametrize("name", ["num_experts", "num_local_experts"])
def test_old_and_new_names_of_the_config_mean_the_same(name: str) -> None:
    renamed = {("num_experts" if key == "n_routed_experts" else key): value for key, value in GLM4.items()}
    assert preset({**{k: v for k, v in renamed.items() if k != "num_experts"}, name: 160}) == preset(GLM4)
    assert preset({**{k: v for k, v in QWEN3.items() if k != "num_experts"}, name: 128}) == preset(QWEN3)
    assert preset(Qwen3MoeConfig(**QWEN3)) == preset(Qwen3MoeConfig(**QWEN3).to_dict()) == preset(QWEN3)
    assert preset(Glm4MoeConfig(**GLM4)) == preset(Glm4MoeConfig(**GLM4).to_dict()) == preset(GLM4)


def test_a_model_of_several_parts_is_routed_as_its_language_model() -> None:
    text = {"num_experts": 64, "num_experts_per_tok": 4, "dtype": "float16"}
    nested = {"model_type": "qwen3_vl_moe", "dtype": "bfloat16", "text_config": text}
    spec = preset(nested, dtype=None, gate="trainer")
    assert (spec.num_experts, spec.weight_dtype) == (64, torch.float16)
    omni = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": {**text, "model_type": "qwen3_omni_moe_text"}},
    }
    assert preset(omni) == preset({**text, "model_type": "qwen3_omni_moe_text"})
    kimi = {
        "model_type": "kimi_k25",
        "text_config": {**DEEPSEEK_V3, "model_type": "kimi_k2", "n_group": 1, "topk_group": 1},
    }
    assert preset(kimi) == preset({**DEEPSEEK_V3, "n_group": 1, "topk_group": 1})


def test_experts_without_weights_are_counted_by_the_gate() -> None:
    longcat = {"model_type": "longcat_flash", "n_routed_experts": 512, "zero_expert_num": 256, "moe_topk": 12}
    assert preset(longcat).num_experts == 768


def test_the_dtype_is_the_configs_unless_given() -> None:
    for key in ("dtype", "torch_dtype"):
        assert preset({**QWEN3, key: "float16"}, dtype=None, gate="trainer").weight_dtype == torch.float16
    with pytest.raises(ValueError, match="names no dtype"):
        preset(QWEN3, dtype=None, gate="trainer")
    assert preset(QWEN3, dtype=None) == preset(QWEN3)  # nothing in it depends on the model's dtype


def test_megatrons_settings_are_trainers_of_their_own() -> None:
    def facts(trainer: str, config: dict[str, Any] = DEEPSEEK_V3) -> tuple[Any, ...]:
        spec = preset(config, trainer, gate="trainer")
        return spec.gate.operand_dtype, spec.gate.output_dtype, spec.chain_dtype, spec.weight_dtype

    assert facts("megatron") == (BF16, BF16, BF16, BF16)
    assert facts("megatron_router_fp32") == (BF16, torch.float32, torch.float32, torch.float32)
    assert facts("megatron_router_fp64") == (FP64, FP64, FP64, FP64)
    assert facts("megatron_fp32_chain") == facts("megatron_fp32_chain_no_grad") == (BF16, BF16, torch.float32, BF16)
    for name in ("megatron", "megatron_router_fp32", "megatron_fp32_chain"):
        assert preset(DEEPSEEK_V3, name) == preset(DEEPSEEK_V3, "megatron")  # one chain, where logits are fp32
        assert preset(DEEPSEEK_V3, name).gate == GateSpec()
    wide = preset(DEEPSEEK_V3, "megatron_router_fp64")
    assert wide == preset(DEEPSEEK_V3, "megatron_router_fp64", gate="trainer")  # fp32 would be narrower
    assert wide.groups == GroupSpec(count=8, kept=4, top=2)
    assert preset({**DEEPSEEK_V3, "n_group": 4, "topk_group": 1}, "megatron").groups == GroupSpec(
        count=4, kept=1, top=8
    )
    one = {**GLM4, "num_experts_per_tok": 1}
    assert preset(one, "megatron").reduce.kind is ReduceKind.NONE
    assert preset(one).reduce.kind is ReduceKind.SUM_EPS


def test_without_gradients_megatrons_slots_are_unsorted_except_in_groups() -> None:
    grouped, plain = DEEPSEEK_V3, {**DEEPSEEK_V3, "n_group": 1, "topk_group": 1}
    for config, order in ((grouped, SlotOrder.SORTED), (plain, SlotOrder.UNSORTED), (QWEN3, SlotOrder.UNSORTED)):
        assert preset(config, "megatron_fp32_chain").slot_order is SlotOrder.SORTED
        assert preset(config, "megatron_fp32_chain_no_grad").slot_order is order


@pytest.mark.parametrize("has_grad", [True, False])
def test_megatrons_newer_chain_rounds_once_at_the_end(has_grad: bool) -> None:
    """Restated from the repository, since no released package has it."""
    spec = preset(GLM4, "megatron_fp32_chain" if has_grad else "megatron_fp32_chain_no_grad", gate="trainer")
    logits_TE = torch.cat(list(logit_rows(spec).values()))
    bias_E = torch.linspace(-0.1, 0.1, spec.num_experts)
    scores_TE = torch.sigmoid(logits_TE.float())
    ids_TK = torch.topk(scores_TE + bias_E, k=8, dim=1, sorted=has_grad).indices
    chosen_TK = scores_TE.gather(1, ids_TK)
    expected_TK = (chosen_TK / (chosen_TK.sum(dim=-1, keepdim=True) + 1e-20) * 2.5).type_as(logits_TE)
    found = reference(logits_TE, spec, bias_E=bias_E)
    assert found.expert_ids_TK.tolist() == ids_TK.tolist()
    assert bits(found.weights_TK).tolist() == bits(expected_TK).tolist()
    released = reference(logits_TE, preset(GLM4, "megatron", gate="trainer"), bias_E=bias_E)
    assert (bits(released.weights_TK) != bits(expected_TK)).any()


def test_prime_rls_gate_runs_in_tf32_unless_fp32_is_asked_for() -> None:
    assert preset(QWEN3, "prime_rl", gate="trainer").gate == GateSpec(tf32=True)
    assert preset(QWEN3, "prime_rl").gate == GateSpec()
    assert preset(QWEN3, "prime_rl").slot_order is SlotOrder.SORTED
    assert preset(QWEN3, "torchtitan").slot_order is SlotOrder.UNSORTED


def test_both_settings_of_paddles_switch_have_one_formula() -> None:
    assert preset(GLM4, "paddle") == preset(GLM4, "paddle_phi")
    assert preset({**GLM4, "norm_topk_prob": False}, "paddle").scale == 2.5  # which no reduce gates
    assert TRAINERS["paddle"].description != TRAINERS["paddle_phi"].description


def test_the_cuda_definition_agrees_up_to_rounding() -> None:
    for config in (QWEN3, {**GLM4, "n_group": 8, "topk_group": 4}):
        cpu = preset(config)
        cuda = dataclasses.replace(cpu, platform="cuda")
        logits_TE = logit_rows(cpu)["normal"]
        operands: dict[str, Tensor] = {"bias_E": torch.linspace(-0.1, 0.1, cpu.num_experts)} if cpu.has_bias else {}
        by_cpu, by_cuda = (reference(logits_TE, spec, **operands) for spec in (cpu, cuda))
        pairs = [found.weights_TK.gather(1, found.expert_ids_TK.argsort(dim=1)) for found in (by_cpu, by_cuda)]
        assert by_cpu.expert_ids_TK.sort(dim=1).values.tolist() == by_cuda.expert_ids_TK.sort(dim=1).values.tolist()
        torch.testing.assert_close(pairs[0], pairs[1], rtol=1e-6, atol=0)
    with pytest.raises(ValueError, match="platform 'cuda', the logits are on cpu"):
        route(logits_TE, cuda, **operands)
