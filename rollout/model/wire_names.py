"""Under which checkpoint names the hosted parameters go: Llama's names, as Qwen3-MoE and GLM-4 MoE use them."""

from collections.abc import Iterator

from rollout.model.spec import DecoderSpec, LayerSpec, MoeSpec
from weights.naming import ExpertRows, Rows, Rule, Whole

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def rules(spec: DecoderSpec) -> Iterator[Rule]:
    """The wire tensors that each parameter of `storage.parameter_shapes` is made of, in the model's order."""
    yield Whole(parameter="embed.weight", name=EMBEDDING)
    for index, layer in enumerate(spec.layers):
        yield from _layer(layer, f"layers.{index}", f"model.layers.{index}")
    yield Whole(parameter="norm.weight", name="model.norm.weight")
    if not spec.tied_embeddings:
        yield Whole(parameter="lm_head.weight", name=HEAD)


def tied(spec: DecoderSpec) -> dict[str, str]:
    """Names that a checkpoint may repeat -> the name under which the tensor is hosted."""
    return {HEAD: EMBEDDING} if spec.tied_embeddings else {}


def _layer(layer: LayerSpec, own: str, wire: str) -> Iterator[Rule]:
    attention = layer.attention
    q_k_v = tuple(f"{wire}.self_attn.{part}_proj" for part in "qkv")
    yield Whole(parameter=f"{own}.attention_norm", name=f"{wire}.input_layernorm.weight")
    yield Rows(
        parameter=f"{own}.attention.qkv_weight",
        names=tuple(f"{name}.weight" for name in q_k_v),
        rows=attention.qkv_rows,
    )
    if attention.qkv_bias:
        yield Rows(
            parameter=f"{own}.attention.qkv_bias",
            names=tuple(f"{name}.bias" for name in q_k_v),
            rows=attention.qkv_rows,
        )
    if attention.qk_norm:
        yield Rows(
            parameter=f"{own}.attention.qk_norm",
            names=(f"{wire}.self_attn.q_norm.weight", f"{wire}.self_attn.k_norm.weight"),
            rows=(attention.head_dim, attention.head_dim),
        )
    yield Whole(parameter=f"{own}.attention.o_weight", name=f"{wire}.self_attn.o_proj.weight")
    if attention.o_bias:
        yield Whole(parameter=f"{own}.attention.o_bias", name=f"{wire}.self_attn.o_proj.bias")
    yield Whole(parameter=f"{own}.mlp_norm", name=f"{wire}.post_attention_layernorm.weight")
    if isinstance(layer.mlp, MoeSpec):
        yield from _moe(layer.mlp, own, f"{wire}.mlp")
    else:
        yield from _gated(f"{own}.mlp", f"{wire}.mlp", layer.mlp.intermediate)


def _moe(moe: MoeSpec, own: str, wire: str) -> Iterator[Rule]:
    yield Whole(parameter=f"{own}.gate.weight", name=f"{wire}.gate.weight")
    if moe.router.has_bias:
        yield Whole(parameter=f"{own}.gate.bias", name=f"{wire}.gate.e_score_correction_bias")
    yield ExpertRows(
        parameter=f"{own}.experts.w13",
        patterns=(f"{wire}.experts.{{expert}}.gate_proj.weight", f"{wire}.experts.{{expert}}.up_proj.weight"),
    )
    yield ExpertRows(parameter=f"{own}.experts.w2", patterns=(f"{wire}.experts.{{expert}}.down_proj.weight",))
    if moe.shared_intermediate is not None:
        yield from _gated(f"{own}.shared", f"{wire}.shared_experts", moe.shared_intermediate)


def _gated(own: str, wire: str, intermediate: int) -> Iterator[Rule]:
    yield Rows(
        parameter=f"{own}.w13",
        names=(f"{wire}.gate_proj.weight", f"{wire}.up_proj.weight"),
        rows=(intermediate, intermediate),
    )
    yield Whole(parameter=f"{own}.w2", name=f"{wire}.down_proj.weight")
