"""Every family's preset is transformers' own router, ids and weights, bit for bit: on the CPU and on a GPU."""

import dataclasses
import functools
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from router_rows import bits, logit_rows
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers_routers import HIDDEN, Device, config_of, known_as, own_bias, router_of, run

from routing import Platform, ReduceKind, RouterSpec, SlotOrder, TopkReduce, reference, route
from routing.trainer_row import Row, Setting
from routing.trainers import TRAINERS

ROWS = {row.model_types[0]: row for row in TRAINERS["transformers"].rows}
SIZES = ((32, 4), (64, 8), (48, 6))
DTYPES = (torch.float32, torch.bfloat16)


class Case:
    """A router with its spec and what it is given beside the logits."""

    def __init__(self, row: Row, size: tuple[int, int], dtype: torch.dtype, device: Device, **values: object) -> None:
        platform: Platform = "cuda" if torch.device(device).type == "cuda" else "cpu"
        config = config_of(row, *size, **values)
        self.spec = RouterSpec.from_trainer("transformers", config, dtype=dtype, platform=platform, gate="trainer")
        self.dtype, self.device = dtype, device
        self.router = router_of(row, config, dtype, device)
        held, self.passed_bias_E = own_bias(self.router), None
        if self.spec.has_bias and held is None:
            self.passed_bias_E = torch.randn(size[0], generator=torch.Generator().manual_seed(1)).to(device) * 0.05
            self.passed_bias_E = self.passed_bias_E.to(dtype) if row.rounds_bias else self.passed_bias_E
        bias_E = held if self.passed_bias_E is None else self.passed_bias_E
        self.operands: dict[str, Tensor] = {"bias_E": bias_E.float()} if self.spec.has_bias else {}
        if self.spec.expert_scale:
            self.operands["expert_scale_E"] = self.router.per_expert_scale

    def assert_routes_alike(self, T: int, logits_TE: Tensor | None = None, seed: int = 0) -> None:
        """As the router does, from its own gate's logits, or from these in their place."""
        random = torch.Generator().manual_seed(seed)
        hidden_TD = torch.randn(T, HIDDEN, generator=random).to(self.device, self.dtype) * 2
        expected = run(self.router, hidden_TD, passed_bias_E=self.passed_bias_E, logits_TE=logits_TE)
        assert expected.operand_dtypes == {self.spec.gate.operand_dtype}
        assert expected.logits_TE.dtype == self.spec.gate.output_dtype
        assert expected.gate_has_bias == self.spec.gate.has_bias
        for path in (reference, route):
            found = path(expected.logits_TE, self.spec, **self.operands)
            assert found.weights_TK.dtype == expected.weights_TK.dtype
            assert (found.expert_ids_TK != expected.ids_TK).any(dim=1).nonzero().flatten().tolist() == []
            wrong_TK = bits(found.weights_TK) != bits(expected.weights_TK)
            assert wrong_TK.any(dim=1).nonzero().flatten().tolist() == []

    def assert_routes_every_row_alike(self) -> None:
        rows_TE = torch.cat(list(logit_rows(self.spec).values())).to(self.device)
        self.assert_routes_alike(len(rows_TE), rows_TE)


def in_groups(row: Row, count: int, kept: int) -> dict[str, object]:
    """The settings that make a family with groups choose from these."""
    assert row.groups is not None
    config = CONFIG_MAPPING[row.model_types[0]]()
    switch = {} if row.groups.only_if is None else {row.groups.only_if[0].names[0]: row.groups.only_if[1]}
    return {known_as(config, row.groups.count): count, known_as(config, row.groups.kept): kept, **switch}


@functools.cache
def settings_of(model_type: str) -> tuple[dict[str, object], ...]:
    """What a family's config may switch: groups, the reduce, the scale; its own defaults come first."""
    row = ROWS[model_type]
    config = CONFIG_MAPPING[model_type]()
    switched: dict[str, object] = {}
    if row.groups is not None:
        switched |= in_groups(row, 4, 2)
    if isinstance(row.normalise, Setting):
        name = known_as(config, row.normalise)
        is_number = row.normalise.may_be_null
        switched |= {name: None if is_number else not getattr(config, name)}
    if row.scale is not None:
        switched |= {known_as(config, row.scale): 1.7}
    return ({}, switched) if switched else ({},)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("model_type", ROWS)
def test_every_family_routes_as_its_own_module(model_type: str, dtype: torch.dtype) -> None:
    for size in SIZES:
        for values in settings_of(model_type):
            case = Case(ROWS[model_type], size, dtype, "cpu", **values)
            case.assert_routes_alike(33)
            case.assert_routes_every_row_alike()


@settings(max_examples=60)
@given(data=st.data())
def test_any_small_config_routes_as_its_own_module(data: st.DataObject) -> None:
    model_type = data.draw(st.sampled_from(sorted(ROWS)))
    groups = data.draw(st.sampled_from([1, 2, 4]))
    E = groups * data.draw(st.integers(10, 24))
    K = data.draw(st.integers(1, 9))
    row, values = ROWS[model_type], data.draw(st.sampled_from(settings_of(model_type)))
    if row.groups is not None:
        values = {**values, **in_groups(row, groups, data.draw(st.integers(1, groups)))}
    case = Case(row, (E, K), data.draw(st.sampled_from([*DTYPES, torch.float16])), "cpu", **values)
    case.assert_routes_alike(data.draw(st.integers(1, 9)), seed=data.draw(st.integers(0, 2**31)))


@pytest.mark.gpu
@pytest.mark.parametrize("model_type", ROWS)
def test_every_family_routes_as_its_own_module_on_a_gpu(model_type: str, cuda: torch.device) -> None:
    """Few sizes, because each is a kernel to compile."""
    first, *others = settings_of(model_type)
    cases = [Case(ROWS[model_type], (128, 8), torch.bfloat16, cuda, **first)]
    cases += [Case(ROWS[model_type], (48, 6), torch.float32, cuda, **values) for values in others]
    for case in cases:
        for T in (1, 7, 333, 4096):
            case.assert_routes_alike(T, seed=T)
        case.assert_routes_every_row_alike()


def test_another_spec_would_be_noticed() -> None:
    for model_type in ("deepseek_v3", "qwen3_moe", "gpt_oss", "mistral4"):
        case = Case(ROWS[model_type], (64, 8), torch.bfloat16, "cpu")
        spec = case.spec
        other = SlotOrder.SORTED if spec.slot_order is SlotOrder.UNSORTED else SlotOrder.UNSORTED
        eps = TopkReduce(kind=ReduceKind.SUM_EPS, eps=0.1)
        for change in ({"slot_order": other}, {"reduce": eps}, {"scale": 1.9}):
            case.spec = dataclasses.replace(spec, **change)
            with pytest.raises(AssertionError, match=r"== \[\]"):
                case.assert_routes_alike(333)


TINY = {
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 0,
}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MODELS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"n_routed_experts": 4},
    "deepseek_v3": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, **LATENT},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0},
    "lfm2_moe": {"num_experts": 4, "num_dense_layers": 0, "layer_types": ["full_attention"] * 2},
    "hy_v3": {"num_experts": 4, "mlp_layer_types": ["sparse"] * 2},
    "minimax_m2": {"num_local_experts": 4},
    "laguna": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "afmoe": {"num_experts": 4, "num_dense_layers": 0},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_what_a_load_in_bf16_leaves_in_fp32_is_what_the_row_says(model_type: str) -> None:
    row = ROWS[model_type]
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**{**TINY, **MODELS[model_type]}), dtype=torch.float32
    )
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    tensors = dict([*loaded.named_parameters(), *loaded.named_buffers()])
    biases = {tensor.dtype for name, tensor in tensors.items() if name.endswith(("correction_bias", "expert_bias"))}
    kept = torch.bfloat16 if row.rounds_bias else torch.float32
    assert biases == ({kept} if row.bias else set())
    if model_type == "hunyuan_v1_moe":
        assert row.gate.operand == "float32"
        assert {tensor.dtype for name, tensor in tensors.items() if name.endswith("wg.weight")} == {torch.float32}
