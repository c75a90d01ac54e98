"""Executes a DecoderSpec over hosted parameters: the one forward pass of every family.

T tokens of the step, D hidden, H query heads, G key/value heads, d head size, E experts, L MoE layers, K slots of a
token, R rows of logits, V vocabulary.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rollout.model.attention import AttentionGroup, attend, plan_attention
from rollout.model.batch import ForwardBatch, KvCache
from rollout.model.experts import gated_mlp, routed_experts
from rollout.model.norm import rms_norm
from rollout.model.rope import rotate, rotation
from rollout.model.spec import AttentionSpec, DecoderSpec, LayerSpec, MoeSpec
from routing import Assignment, gate_logits, route


@dataclass(frozen=True, kw_only=True, slots=True)
class ForwardOutput:
    """What a step gives to the sampler."""

    logits_RV: Tensor
    """fp32, of the rows asked for."""
    expert_ids_TLK: Tensor | None
    """int32: the experts of every token in every MoE layer, in the trainer's slot order. None unless asked for, and
    where no layer routes."""
    expert_weights_TLK: Tensor | None
    """Their combine weights, in the router's weight dtype."""


class Decoder:
    """A model whose parameters live elsewhere and change in place; nothing here is derived from their content.

    Args:
        spec: what to compute.
        parameters: by hosted name, as `storage.allocate` makes them; they must not move.
    """

    def __init__(self, spec: DecoderSpec, parameters: Mapping[str, Tensor]) -> None:
        self.spec = spec
        self._embedding = parameters["embed.weight"]
        self._norm = parameters["norm.weight"]
        self._head = parameters["embed.weight" if spec.tied_embeddings else "lm_head.weight"]
        self._blocks = [_Block(layer, index, spec.norm_eps, parameters) for index, layer in enumerate(spec.layers)]

    def forward(self, batch: ForwardBatch, kv: KvCache, *, record_routing: bool) -> ForwardOutput:
        """Runs the step's tokens, writes their keys and values, and returns logits of the rows asked for.

        Args:
            batch: the step; not empty.
            kv: read up to each sequence's context, written at the step's slots.
            record_routing: whether to return the experts of every token.
        """
        spec = self.spec
        groups = plan_attention(batch, kv.block_size)
        rotations = {
            rope: rotation(batch.positions_T, rope, spec.dtype)
            for rope in dict.fromkeys(layer.attention.rope for layer in spec.layers)
        }
        assignments: list[Assignment] = []
        hidden_TD = functional.embedding(batch.token_ids_T, self._embedding)
        for block in self._blocks:
            hidden_TD = block.attention(hidden_TD, rotations[block.spec.attention.rope], kv, batch.slots_T, groups)
            hidden_TD, assignment = block.mlp(hidden_TD)
            if assignment is not None:
                assignments.append(assignment)
        hidden_RD = rms_norm(hidden_TD[batch.logit_rows_R], self._norm, spec.norm_eps)
        recorded = record_routing and len(assignments) > 0
        return ForwardOutput(
            logits_RV=functional.linear(hidden_RD, self._head).float(),
            expert_ids_TLK=torch.stack([a.expert_ids_TK for a in assignments], dim=1) if recorded else None,
            expert_weights_TLK=torch.stack([a.weights_TK for a in assignments], dim=1) if recorded else None,
        )


class _Block:
    """One layer and its parameters, looked up once."""

    def __init__(self, spec: LayerSpec, index: int, norm_eps: float, parameters: Mapping[str, Tensor]) -> None:
        prefix = f"layers.{index}."
        own = {name.removeprefix(prefix): tensor for name, tensor in parameters.items() if name.startswith(prefix)}
        self.spec = spec
        self._index = index
        self._eps = norm_eps
        self._attention_norm = own["attention_norm"]
        self._mlp_norm = own["mlp_norm"]
        self._qkv_weight = own["attention.qkv_weight"]
        self._qkv_bias = own.get("attention.qkv_bias")
        self._o_weight = own["attention.o_weight"]
        self._o_bias = own.get("attention.o_bias")
        attention = spec.attention
        self._qk_norm_2d = own["attention.qk_norm"].view(2, -1) if attention.qk_norm else None
        self._kind_of_head = _kind_of_head(attention, self._qkv_weight.device)
        self._gate_weight = own.get("gate.weight")
        self._gate_bias = own.get("gate.bias")
        name = "experts" if isinstance(spec.mlp, MoeSpec) else "mlp"
        self._w13, self._w2 = own[f"{name}.w13"], own[f"{name}.w2"]
        self._shared = (own["shared.w13"], own["shared.w2"]) if "shared.w13" in own else None

    def attention(
        self,
        hidden_TD: Tensor,
        cos_sin: tuple[Tensor, Tensor],
        kv: KvCache,
        slots_T: Tensor,
        groups: tuple[AttentionGroup, ...],
    ) -> Tensor:
        """The residual after attention."""
        spec = self.spec.attention
        qkv = functional.linear(rms_norm(hidden_TD, self._attention_norm, self._eps), self._qkv_weight, self._qkv_bias)
        heads = qkv.view(len(qkv), -1, spec.head_dim)
        rotating, values_TGd = heads[:, : -spec.kv_heads], heads[:, -spec.kv_heads :]
        if self._qk_norm_2d is not None:
            rotating = rms_norm(rotating, self._qk_norm_2d[self._kind_of_head], self._eps)
        rotated = rotate(rotating, *cos_sin)
        queries_THd, keys_TGd = rotated[:, : spec.heads], rotated[:, spec.heads :]
        kv.write(self._index, slots_T, keys_TGd, values_TGd)
        attended_THd = attend(queries_THd, kv, self._index, groups)
        return hidden_TD + functional.linear(attended_THd.flatten(1), self._o_weight, self._o_bias)

    def mlp(self, hidden_TD: Tensor) -> tuple[Tensor, Assignment | None]:
        """The residual after the MLP, and where its tokens went if it routes."""
        spec = self.spec.mlp
        normed_TD = rms_norm(hidden_TD, self._mlp_norm, self._eps)
        if not isinstance(spec, MoeSpec):
            return hidden_TD + gated_mlp(normed_TD, self._w13, self._w2), None
        assert self._gate_weight is not None
        logits_TE = gate_logits(normed_TD, self._gate_weight, spec.router.gate)
        assignment = route(logits_TE, spec.router, bias_E=self._gate_bias)
        mixed_TD = routed_experts(normed_TD, assignment, self._w13, self._w2)
        if self._shared is not None:
            mixed_TD = mixed_TD + gated_mlp(normed_TD, *self._shared)
        return hidden_TD + mixed_TD, assignment


def _kind_of_head(attention: AttentionSpec, device: torch.device) -> Tensor:
    """Which row of the hosted qk norm belongs to a head: 0 for each query head, 1 for each key head."""
    return torch.tensor([0] * attention.heads + [1] * attention.kv_heads, device=device)
