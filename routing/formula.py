"""A RouterSpec in words, operation by operation."""

import math

from routing.fusion import said
from routing.orders import uses_sum
from routing.plain import dtype_name
from routing.spec import RouterSpec
from routing.stages import Operation
from routing.terms import GroupScore, GroupSpec, ReduceKind, ScoreFunction, SlotOrder

NONE = "none"
"""Of an operation that a router has not."""

REDUCES = {
    ReduceKind.NONE: NONE,
    ReduceKind.SUM: "s / sum(s)",
    ReduceKind.SUM_EPS: "s / (sum(s) + {eps:g})",
    ReduceKind.CLAMPED_SUM: "s / max(sum(s), {eps:g})",
    ReduceKind.SOFTMAX: "softmax(s)",
    ReduceKind.L1: "s / sum(|s|)",
}


def formula(spec: RouterSpec) -> dict[Operation, str]:
    """What each operation of a router is, in the order in which a token meets them."""
    chain = dtype_name(spec.chain_dtype)
    scores = {
        ScoreFunction.SOFTMAX: f"softmax over {spec.num_experts} experts",
        ScoreFunction.SOFTMAX_TOPK: f"softmax over the chosen {spec.top_k}",
        ScoreFunction.SIGMOID: "sigmoid",
        ScoreFunction.SQRT_SOFTPLUS: "sqrt(softplus)",
    }
    lines = {
        Operation.SCORE: f"{scores[spec.score]}, {chain}",
        Operation.BIAS: "float32, in the choice only" if spec.has_bias else NONE,
        Operation.GROUPS: NONE if spec.groups is None else _groups(spec.groups),
        Operation.IDS: f"{spec.top_k} of {spec.num_experts}",
        Operation.SLOTS: f"torch.topk(sorted={spec.slot_order is SlotOrder.SORTED})",
        Operation.TIES: "torch.topk's ties, NaN and signed zeros",
        Operation.SUM: f"torch.sum over {spec.top_k} slots, {chain}" if uses_sum(spec) else NONE,
        Operation.DIVISION: "IEEE" if spec.reduce.kind is not ReduceKind.NONE else NONE,
        Operation.REDUCE: _reduce(spec),
        Operation.SCALE: NONE if spec.scale is None else f"times {spec.scale:g}, after the reduce",
    }
    if spec.expert_scale:
        lines[Operation.EXPERT_SCALE] = "times the expert's factor, last"
    return lines | {Operation.DTYPE: dtype_name(spec.weight_dtype)}


def _groups(groups: GroupSpec) -> str:
    best = "best" if groups.score is GroupScore.MAX else f"best {groups.top}, added"
    mask = "-inf" if groups.mask_value == -math.inf else "0"
    return f"{groups.kept} of {groups.count} by their {best}; others masked with {mask}"


def _reduce(spec: RouterSpec) -> str:
    if spec.reduce.kind is ReduceKind.CALLABLE:
        return said(spec.reduce)
    return REDUCES[spec.reduce.kind].format(eps=spec.reduce.eps)
