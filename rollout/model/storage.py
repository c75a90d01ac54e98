"""The hosted parameters: which there are, in which shape and dtype, allocated once and never moved.

Rows stand as in the checkpoint, so that every weight copy is a block of rows: qkv = q | k | v, qk_norm = q | k,
w13 = gate | up per expert.
"""

import math

import torch
from torch import Tensor

from rollout.model.spec import AttentionSpec, DecoderSpec, DenseSpec, MoeSpec

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def parameter_shapes(spec: DecoderSpec) -> Shapes:
    """Shape and dtype of every hosted parameter, by its name here.

    The gate's weight is as the spec says (fp32 in RL mode), the expert bias always fp32, the rest in the model's dtype.
    """
    shapes: Shapes = {"embed.weight": ((spec.vocab_size, spec.hidden), spec.dtype)}
    for index, layer in enumerate(spec.layers):
        prefix = f"layers.{index}"
        _add(shapes, f"{prefix}.attention", _attention(layer.attention, spec.hidden), spec.dtype)
        _add(shapes, prefix, {"attention_norm": (spec.hidden,), "mlp_norm": (spec.hidden,)}, spec.dtype)
        if isinstance(layer.mlp, DenseSpec):
            _add(shapes, f"{prefix}.mlp", _gated(spec.hidden, layer.mlp.intermediate), spec.dtype)
        else:
            _add_moe(shapes, prefix, layer.mlp, spec)
    shapes["norm.weight"] = ((spec.hidden,), spec.dtype)
    if not spec.tied_embeddings:
        shapes["lm_head.weight"] = ((spec.vocab_size, spec.hidden), spec.dtype)
    return shapes


def allocate(spec: DecoderSpec, device: torch.device | str) -> dict[str, Tensor]:
    """All parameters of a decoder, their content undefined.

    Args:
        spec: the decoder.
        device: where to; "meta" takes no memory.
    """
    return {
        name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in parameter_shapes(spec).items()
    }


def parameter_count(spec: DecoderSpec) -> int:
    """Elements of all hosted parameters together."""
    return sum(math.prod(shape) for shape, _ in parameter_shapes(spec).values())


def _add(shapes: Shapes, prefix: str, names: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
    shapes.update({f"{prefix}.{name}": (shape, dtype) for name, shape in names.items()})


def _attention(attention: AttentionSpec, hidden: int) -> dict[str, tuple[int, ...]]:
    rows = sum(attention.qkv_rows)
    shapes: dict[str, tuple[int, ...]] = {
        "qkv_weight": (rows, hidden),
        "o_weight": (hidden, attention.heads * attention.head_dim),
    }
    if attention.qkv_bias:
        shapes["qkv_bias"] = (rows,)
    if attention.o_bias:
        shapes["o_bias"] = (hidden,)
    if attention.qk_norm:
        shapes["qk_norm"] = (2 * attention.head_dim,)
    return shapes


def _gated(hidden: int, intermediate: int) -> dict[str, tuple[int, ...]]:
    return {"w13": (2 * intermediate, hidden), "w2": (hidden, intermediate)}


def _add_moe(shapes: Shapes, prefix: str, moe: MoeSpec, spec: DecoderSpec) -> None:
    experts = moe.router.num_experts
    shapes[f"{prefix}.gate.weight"] = ((experts, spec.hidden), moe.gate_dtype)
    if moe.router.has_bias:
        shapes[f"{prefix}.gate.bias"] = ((experts,), torch.float32)
    _add(
        shapes,
        f"{prefix}.experts",
        {name: (experts, *shape) for name, shape in _gated(spec.hidden, moe.intermediate).items()},
        spec.dtype,
    )
    if moe.shared_intermediate is not None:
        _add(shapes, f"{prefix}.shared", _gated(spec.hidden, moe.shared_intermediate), spec.dtype)
