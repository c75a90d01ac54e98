"""Qwen3-MoE: its config as a DecoderSpec.

Formulas: transformers' models/qwen3_moe. Every layer has QK norm, heads rotate whole, attention_bias biases q, k, v and
o, the router is a softmax.
"""

from collections.abc import Mapping
from typing import Any

from rollout.model.hf_config import ConfigReader
from rollout.model.router import Hosting, moe_spec
from rollout.model.spec import AttentionSpec, DecoderSpec, DenseSpec, LayerSpec

ARCHITECTURE = "Qwen3MoeForCausalLM"


def decoder_spec(config: Mapping[str, Any], hosting: Hosting) -> DecoderSpec:
    """Translates a config.json.

    Raises:
        ValueError: keys that are missing, malformed or beyond what is supported, all of them named.
    """
    reader = ConfigReader(config)
    reader.supported_only()
    if config.get("use_sliding_window"):
        reader.only("sliding_window", None)
    dtype = reader.dtype(hosting.dtype)
    hidden = reader.whole("hidden_size")
    vocab_size = reader.whole("vocab_size")
    heads, kv_heads, head_dim = reader.attention_heads(hidden)
    bias = reader.flag("attention_bias", default=False)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=bias,
        o_bias=bias,
        qk_norm=True,
        rope=reader.rope(head_dim),
    )
    dense = DenseSpec(intermediate=reader.whole("intermediate_size"))
    moe = moe_spec(
        reader,
        hosting,
        dtype,
        experts=reader.whole("num_local_experts", alias="num_experts"),
        shared_intermediate=None,
    )
    layers = reader.whole("num_hidden_layers")
    dense_layers = reader.layer_indices("mlp_only_layers")
    sparse_step = reader.whole("decoder_sparse_step", default=1)
    norm_eps = reader.real("rms_norm_eps")
    tied = reader.flag("tie_word_embeddings", default=False)
    context_length = reader.whole("max_position_embeddings")
    reader.check()
    assert moe is not None
    return DecoderSpec(
        architecture=ARCHITECTURE,
        vocab_size=vocab_size,
        hidden=hidden,
        norm_eps=norm_eps,
        tied_embeddings=tied,
        context_length=context_length,
        layers=tuple(
            LayerSpec(
                attention=attention,
                mlp=dense if index in dense_layers or (index + 1) % sparse_step else moe,
            )
            for index in range(layers)
        ),
        dtype=dtype,
    )
