"""GLM-4 MoE (GLM-4.5, GLM-4.5-Air, GLM-4.6): its config as a DecoderSpec.

Formulas: transformers' models/glm4_moe. The first layers are dense, attention_bias biases q, k and v only, the router
is a sigmoid with an fp32 correction bias and groups, and a shared expert takes every token.
"""

from collections.abc import Mapping
from typing import Any

from rollout.model.hf_config import ConfigReader
from rollout.model.router import Hosting, moe_spec
from rollout.model.spec import AttentionSpec, DecoderSpec, DenseSpec, LayerSpec

ARCHITECTURE = "Glm4MoeForCausalLM"


def decoder_spec(config: Mapping[str, Any], hosting: Hosting) -> DecoderSpec:
    """Translates a config.json.

    Raises:
        ValueError: keys that are missing, malformed or beyond what is supported, all of them named.
    """
    reader = ConfigReader(config)
    reader.supported_only()
    dtype = reader.dtype(hosting.dtype)
    hidden = reader.whole("hidden_size")
    vocab_size = reader.whole("vocab_size")
    heads, kv_heads, head_dim = reader.attention_heads(hidden)
    attention = AttentionSpec(
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        qkv_bias=reader.flag("attention_bias", default=False),
        o_bias=False,
        qk_norm=reader.flag("use_qk_norm", default=False),
        rope=reader.rope(head_dim, default_fraction=0.5),
    )
    dense = DenseSpec(intermediate=reader.whole("intermediate_size"))
    moe = moe_spec(
        reader,
        hosting,
        dtype,
        experts=reader.whole("n_routed_experts", alias="num_local_experts"),
        shared_intermediate=reader.whole("moe_intermediate_size") * reader.whole("n_shared_experts"),
    )
    layers = reader.whole("num_hidden_layers")
    dense_layers = reader.whole("first_k_dense_replace", least=0)
    extra_layers = reader.whole("num_nextn_predict_layers", alias="num_mtp_layers", default=0, least=0)
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
            LayerSpec(attention=attention, mlp=dense if index < dense_layers else moe) for index in range(layers)
        ),
        extra_layers=extra_layers,
        dtype=dtype,
    )
