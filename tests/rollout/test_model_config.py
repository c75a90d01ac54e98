"""config.json, in both of its forms, becomes a DecoderSpec or one error that names every key in the way."""

from typing import Any

import pytest
import torch
from checkpoints import MODELS, glm4_config, qwen3_config
from transformers import Glm4MoeConfig, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRotaryEmbedding

from rollout.model.families import decoder_spec, hosted_layout
from rollout.model.router import Hosting
from rollout.model.spec import DecoderSpec, DenseSpec, MoeSpec, RopeSpec
from rollout.model.storage import allocate, parameter_count

# as released with Qwen3-30B-A3B, before transformers 5
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "max_window_layers": 48,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "norm_topk_prob": True,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "output_router_logits": False,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "router_aux_loss_coef": 0.001,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 151936,
}
# as released with GLM-4.5-Air, before transformers 5
GLM_4_5_AIR: dict[str, Any] = {
    "architectures": ["Glm4MoeForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "eos_token_id": [151329, 151336, 151338],
    "first_k_dense_replace": 1,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 10944,
    "max_position_embeddings": 131072,
    "model_type": "glm4_moe",
    "moe_intermediate_size": 1408,
    "n_group": 1,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 96,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 46,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "pad_token_id": 151329,
    "partial_rotary_factor": 0.5,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.0,
    "tie_word_embeddings": False,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_qk_norm": False,
    "vocab_size": 151552,
}
SPELLED_OUT: dict[str, Any] = {
    "num_experts": 128,
    "top_k": 8,
    "score": "softmax",
    "slot_order": "sorted",
    "reduce": "sum",
    "weight_dtype": "float32",
}
RELEASED = {"qwen3": (QWEN3_30B_A3B, Qwen3MoeConfig), "glm4": (GLM_4_5_AIR, Glm4MoeConfig)}


def moe_layers(spec: DecoderSpec) -> list[int]:
    """Which layers route."""
    return [index for index, layer in enumerate(spec.layers) if isinstance(layer.mlp, MoeSpec)]


@pytest.mark.parametrize("family", RELEASED)
def test_a_released_config_hosts_as_many_parameters_as_transformers_has(family):
    released, config_class = RELEASED[family]
    spec = decoder_spec(released)
    fields = {key: value for key, value in released.items() if key != "architectures"}
    with torch.device("meta"):
        theirs = MODELS[released["model_type"]](config_class(**fields))
    elements = sum(parameter.numel() for parameter in theirs.parameters())
    elements += sum(b.numel() for name, b in theirs.named_buffers() if name.endswith("e_score_correction_bias"))
    parameters = allocate(spec, "meta")
    assert parameter_count(spec) == elements
    assert sum(parameter.numel() for parameter in parameters.values()) == elements
    wired = sum(torch.Size(at.shape).numel() for at in hosted_layout(spec, parameters).values())
    assert wired == elements


def test_qwen3_30b_a3b_is_what_its_card_says():
    spec = decoder_spec(QWEN3_30B_A3B)
    assert round(parameter_count(spec) / 1e7) == 3053
    assert spec.dtype == torch.bfloat16
    assert spec.context_length == 40960
    assert len(spec.layers) == len(moe_layers(spec)) == 48
    assert (spec.kv_heads, spec.head_dim) == (4, 128)
    assert spec.layers[0].attention.rope == RopeSpec(theta=1e6, rotary_dim=128)
    assert spec.layers[0].attention.qk_norm
    moe = spec.layers[0].mlp
    assert isinstance(moe, MoeSpec)
    assert (moe.router.num_experts, moe.router.top_k) == (128, 8)
    assert moe.gate_dtype == torch.float32
    assert len(hosted_layout(spec, allocate(spec, "meta"))) == 18867


def test_glm_4_5_air_is_what_its_config_says():
    spec = decoder_spec(GLM_4_5_AIR)
    attention = spec.layers[0].attention
    assert attention.rope == RopeSpec(theta=1e6, rotary_dim=64)
    assert (attention.qkv_bias, attention.o_bias, attention.qk_norm) == (True, False, False)
    assert spec.layers[0].mlp == DenseSpec(intermediate=10944)
    assert moe_layers(spec) == list(range(1, 46))
    assert spec.extra_layers == 1
    moe = spec.layers[1].mlp
    assert isinstance(moe, MoeSpec)
    assert moe.shared_intermediate == 1408
    assert moe.router.has_bias


@pytest.mark.parametrize("family", RELEASED)
def test_both_forms_of_a_config_mean_the_same(family):
    released, config_class = RELEASED[family]
    fields = {key: value for key, value in released.items() if key != "architectures"}
    rewritten = config_class(**fields).to_diff_dict() | {"architectures": released["architectures"]}
    assert "rope_parameters" in rewritten
    assert "rope_theta" not in rewritten
    assert "torch_dtype" not in rewritten
    assert decoder_spec(rewritten) == decoder_spec(released)


def test_heads_are_hidden_over_heads_where_the_config_does_not_say():
    config = {key: value for key, value in QWEN3_30B_A3B.items() if key != "head_dim"}
    assert decoder_spec(config).head_dim == 2048 // 32


@pytest.mark.parametrize("choice", [torch.float32, torch.bfloat16])
def test_a_chosen_dtype_replaces_the_checkpoints(choice):
    spec = decoder_spec(QWEN3_30B_A3B, Hosting(dtype=choice, gate="trainer"))
    assert spec.dtype == choice
    moe = spec.layers[0].mlp
    assert isinstance(moe, MoeSpec)
    assert moe.gate_dtype == moe.router.gate.output_dtype == choice


def test_the_trainers_glm4_gate_keeps_its_dtype_and_multiplies_in_fp32():
    moe = decoder_spec(GLM_4_5_AIR, Hosting(gate="trainer")).layers[1].mlp
    assert isinstance(moe, MoeSpec)
    assert moe.gate_dtype == torch.bfloat16
    assert moe.router.gate.operand_dtype == torch.float32


UNSUPPORTED = {
    "hidden_act": "gelu",
    "quantization_config": {"quant_method": "fp8"},
    "rope_scaling": {"rope_type": "yarn", "factor": 4.0},
    "sliding_window": 4096,
    "use_sliding_window": True,
    "torch_dtype": "float16",
    "hidden_size": 0,
    "num_hidden_layers": None,
    "num_key_value_heads": 5,
    "tie_word_embeddings": "no",
    "mlp_only_layers": "0",
    "rms_norm_eps": -1.0,
    "layer_types": ["sliding_attention"],
    "moe_intermediate_size": "wide",
    "partial_rotary_factor": 0.5,
    "num_local_experts": 64,
}


def test_every_key_in_the_way_is_named_in_one_error():
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        decoder_spec(QWEN3_30B_A3B | UNSUPPORTED)
    message = str(caught.value)
    named = set(UNSUPPORTED) - {"use_sliding_window", "torch_dtype", "rope_scaling"}
    assert [key for key in named if key not in message] == []
    for fact in ("yarn", "'float16'", "is missing", "contradict", "sliding_window=4096"):
        assert fact in message


@pytest.mark.parametrize("key", sorted(UNSUPPORTED.keys() - {"use_sliding_window", "sliding_window"}))
def test_one_key_in_the_way_is_enough(key):
    with pytest.raises(ValueError, match=r"config\.json cannot be hosted"):
        decoder_spec(QWEN3_30B_A3B | {key: UNSUPPORTED[key]})


def test_a_sliding_window_that_is_not_in_use_is_no_obstacle():
    spec = decoder_spec(QWEN3_30B_A3B | {"sliding_window": 4096, "use_sliding_window": False})
    assert spec == decoder_spec(QWEN3_30B_A3B)


@pytest.mark.parametrize("kind", ["linear", "dynamic", "yarn", "longrope", "llama3"])
@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_rope_types_other_than_default_are_refused_by_name(kind, form):
    nested = {"rope_type": kind, "rope_theta": 1e6, "factor": 2.0}
    with pytest.raises(ValueError, match=f"{form}.rope_type='{kind}'"):
        decoder_spec(QWEN3_30B_A3B | {form: nested})


@pytest.mark.parametrize("form", ["rope_parameters", "rope_scaling"])
def test_a_qwen3_head_rotates_whole_whatever_the_config_says_of_a_part(form):
    for whole in ({}, {"partial_rotary_factor": 1.0}, {"partial_rotary_factor": None}):
        nested = {"rope_type": "default", "rope_theta": 1e6}
        assert decoder_spec(QWEN3_30B_A3B | {form: nested | whole} | whole) == decoder_spec(QWEN3_30B_A3B)
    with pytest.raises(ValueError, match=rf"{form}\.partial_rotary_factor=0\.5: expected 1\.0, the only one supported"):
        decoder_spec(QWEN3_30B_A3B | {form: {"rope_theta": 1e6, "partial_rotary_factor": 0.5}})
    both = {form: {"rope_theta": 1e6, "partial_rotary_factor": 1.0}, "partial_rotary_factor": 0.5}
    with pytest.raises(ValueError, match=r"hosted: partial_rotary_factor=0\.5: expected 1\.0"):
        decoder_spec(QWEN3_30B_A3B | both)


def test_transformers_rotates_qwen3_heads_whole_and_that_is_why():
    rope_parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    embedding = Qwen3MoeRotaryEmbedding(qwen3_config(head_dim=8, rope_parameters=rope_parameters))
    assert embedding(torch.zeros(1, 3, 8), torch.arange(3)[None])[0].shape[-1] == 8


def test_two_accounts_of_the_rotation_that_contradict_each_other_are_refused():
    two = {"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
    with pytest.raises(ValueError, match=r"rope_parameters=.* and rope_scaling=.* contradict each other"):
        decoder_spec(QWEN3_30B_A3B | two)


BOTH = ["Qwen3MoeForCausalLM", "Glm4MoeForCausalLM"]


@pytest.mark.parametrize("architectures", [None, [], ["LlamaForCausalLM"], ["Qwen3MoeModel"], BOTH, [7], [[]]])
def test_other_architectures_are_refused_with_the_supported_ones(architectures):
    with pytest.raises(ValueError, match="supported is one of Qwen3MoeForCausalLM, Glm4MoeForCausalLM"):
        decoder_spec(QWEN3_30B_A3B | {"architectures": architectures})


@pytest.mark.parametrize("released", [QWEN3_30B_A3B, GLM_4_5_AIR], ids=["qwen3", "glm4"])
def test_a_config_without_anything_names_all_that_is_missing(released):
    bare = {"architectures": released["architectures"], "model_type": released["model_type"]}
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        decoder_spec(bare)
    shape = ("hidden_size", "vocab_size", "num_attention_heads", "num_hidden_layers", "rope_theta", "rms_norm_eps")
    for key in (*shape, "intermediate_size", "moe_intermediate_size", "max_position_embeddings", "dtype"):
        assert f"{key} is missing" in str(caught.value)


def test_a_router_that_contradicts_the_config_is_refused():
    with pytest.raises(ValueError, match=r"8 of 64 experts, config\.json says 8 of 128"):
        decoder_spec(QWEN3_30B_A3B, Hosting(trainer=SPELLED_OUT | {"num_experts": 64}))


def test_a_router_spelled_out_runs_on_the_hosts_platform_and_may_say_so():
    for plain in (SPELLED_OUT, SPELLED_OUT | {"platform": "cuda"}):
        moe = decoder_spec(QWEN3_30B_A3B, Hosting(trainer=plain, platform="cuda")).layers[0].mlp
        assert isinstance(moe, MoeSpec)
        assert moe.router.platform == "cuda"


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"expert_scale": True}, "expert_scale=True, but checkpoints of this architecture hold no such factors"),
        ({"gate": {"has_bias": True}}, "has_bias=True, but gates of this architecture have no bias"),
        ({"platform": "cuda"}, "platform='cuda', but the model is hosted on 'cpu'; leave platform out"),
        (
            {"gate": {"operand_dtype": "bfloat16", "output_dtype": "float16"}},
            r"output_dtype=torch\.float16: PyTorch has no product of torch\.bfloat16 operands with it",
        ),
        (
            {"gate": {"output_dtype": "bfloat16"}},
            r"no product of torch\.float32 operands with it; torch\.float32 expected",
        ),
    ],
)
@pytest.mark.parametrize("gate", ["fp32", "trainer"])
def test_a_router_spelled_out_that_cannot_be_computed_is_refused(fields, says, gate):
    with pytest.raises(ValueError, match=rf"config\.json cannot be hosted: .*{says}"):
        decoder_spec(QWEN3_30B_A3B, Hosting(trainer=SPELLED_OUT | fields, gate=gate))


def test_an_unknown_trainer_is_refused():
    with pytest.raises(ValueError, match="transfomers"):
        decoder_spec(QWEN3_30B_A3B, Hosting(trainer="transfomers"))


def test_dense_layers_follow_the_list_and_the_step():
    config = qwen3_config(num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3]).to_diff_dict()
    config |= {"architectures": ["Qwen3MoeForCausalLM"], "dtype": "float32"}
    assert moe_layers(decoder_spec(config)) == [1, 5]


def test_a_share_of_a_head_that_cannot_rotate_is_refused():
    config = glm4_config(head_dim=8).to_diff_dict()
    config |= {"architectures": ["Glm4MoeForCausalLM"], "dtype": "float32"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.4}
    with pytest.raises(ValueError, match=r"partial_rotary_factor=0.4: 3 of 8"):
        decoder_spec(config)
