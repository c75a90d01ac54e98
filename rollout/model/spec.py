"""A decoder as data: what a family's config is translated into, and all that the Decoder knows of a model.

The order of operations is that of transformers' modules (RMSNorm in fp32 and rounded before its weight multiplies,
softmax in fp32, combine weights after down_proj); what differs between families and checkpoints stands here.
"""

from dataclasses import dataclass

import torch

from routing import RouterSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class RopeSpec:
    """Rotary position embedding of the default type, half-rotated (x1 | x2), on the first dimensions of a head."""

    theta: float
    """Base of the frequencies: theta ** -(2 i / rotary_dim)."""
    rotary_dim: int
    """Dimensions of a head that rotate; even. The rest pass through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSpec:
    """Grouped-query attention over all earlier tokens."""

    heads: int
    """Query heads; a multiple of kv_heads."""
    kv_heads: int
    head_dim: int
    qkv_bias: bool
    o_bias: bool
    qk_norm: bool
    """RMSNorm over head_dim of each query and key head, before the rotation."""
    rope: RopeSpec

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Rows of q, k and v in the hosted qkv weight, in this order."""
        return self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim


@dataclass(frozen=True, kw_only=True, slots=True)
class DenseSpec:
    """A gated MLP: down(silu(gate(x)) * up(x))."""

    intermediate: int


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeSpec:
    """Routed experts, each a gated MLP, and perhaps a shared one that every token passes."""

    router: RouterSpec
    gate_dtype: torch.dtype
    """Of the hosted gate weight: fp32 in RL mode, whatever the checkpoint's."""
    intermediate: int
    """Of one routed expert."""
    shared_intermediate: int | None
    """Of the shared expert; None where there is none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerSpec:
    """Pre-norm attention, then a pre-norm MLP, each added to the residual."""

    attention: AttentionSpec
    mlp: DenseSpec | MoeSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class DecoderSpec:
    """A decoder-only language model."""

    architecture: str
    """As config.json names it; picks the family and with it the checkpoint's names."""
    vocab_size: int
    hidden: int
    norm_eps: float
    tied_embeddings: bool
    """The output projection is the embedding table; there is no lm_head of its own."""
    context_length: int
    """Tokens of a sequence, at most: the positions that the model was made for."""
    layers: tuple[LayerSpec, ...]
    extra_layers: int = 0
    """Multi-token-prediction layers that a checkpoint may carry after the decoder's own; they are not hosted."""
    dtype: torch.dtype
    """Of activations, keys, values and all parameters, apart from gates and expert biases."""

    @property
    def kv_heads(self) -> int:
        """Key/value heads, the same in all layers, since they share one cache."""
        return self.layers[0].attention.kv_heads

    @property
    def head_dim(self) -> int:
        """Size of a head, the same in all layers."""
        return self.layers[0].attention.head_dim

    def __post_init__(self) -> None:
        cached = {(layer.attention.kv_heads, layer.attention.head_dim) for layer in self.layers}
        if len(cached) != 1:
            raise ValueError(
                f"layers share one KV cache: expected one pair of key/value heads and head size, got {sorted(cached)}"
            )
