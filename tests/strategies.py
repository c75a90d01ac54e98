"""Hypothesis strategies that several tests share: configs of tiny models, all the shapes that their families allow."""

from checkpoints import glm4_config, qwen3_config
from hypothesis import strategies as st
from transformers import Glm4MoeConfig, Qwen3MoeConfig


@st.composite
def attention_fields(draw: st.DrawFn) -> dict[str, object]:
    """Heads, key/value heads, head size, biases, RoPE's base, of both families."""
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    return {
        "hidden_size": draw(st.sampled_from([16, 24, 36])),
        "num_attention_heads": kv_heads * draw(st.sampled_from([1, 2, 3])),
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([4, 8, 12])),
        "attention_bias": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5])),
        "vocab_size": draw(st.integers(30, 70)),
        "intermediate_size": draw(st.sampled_from([20, 32])),
        "moe_intermediate_size": draw(st.sampled_from([8, 10])),
    }


@st.composite
def qwen3_configs(draw: st.DrawFn) -> Qwen3MoeConfig:
    """Qwen3-MoE: experts not a power of two, dense layers by list and by step, top-k normalised or not."""
    layers = draw(st.integers(1, 3))
    experts = draw(st.integers(2, 11))
    return qwen3_config(
        **draw(attention_fields()),
        num_hidden_layers=layers,
        num_experts=experts,
        num_experts_per_tok=draw(st.integers(1, min(experts, 5))),
        norm_topk_prob=draw(st.booleans()),
        decoder_sparse_step=draw(st.sampled_from([1, 1, 2])),
        mlp_only_layers=draw(st.sampled_from([[], [0], [layers - 1]])),
        rope_parameters={"rope_type": "default", "rope_theta": draw(st.sampled_from([1e4, 1e6]))},
    )


@st.composite
def glm4_configs(draw: st.DrawFn) -> Glm4MoeConfig:
    """GLM-4 MoE: one and more groups, shared experts, dense first layers, partial rotation, QK norm or not."""
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    per_group = draw(st.integers(2, 5))
    kept = draw(st.integers(1, groups))
    return glm4_config(
        **draw(attention_fields()),
        num_hidden_layers=draw(st.integers(1, 3)),
        first_k_dense_replace=draw(st.integers(0, 2)),
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=kept,
        num_experts_per_tok=draw(st.integers(1, min(5, kept * per_group))),
        n_shared_experts=draw(st.integers(1, 2)),
        norm_topk_prob=draw(st.booleans()),
        routed_scaling_factor=draw(st.sampled_from([1.0, 1.5, 2.5])),
        use_qk_norm=draw(st.booleans()),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": draw(st.sampled_from([1e4, 1e6])),
            "partial_rotary_factor": draw(st.sampled_from([0.5, 1.0])),
        },
    )
