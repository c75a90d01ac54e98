"""The routers whose speed is measured, and in which way each is called. T tokens, E experts, K slots of a token."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from routing import (
    GroupSpec,
    ReduceKind,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    TopkReduce,
    expert_counts,
    kernel_route,
    route,
)
from routing_bench.bits import FUNCTIONS
from routing_bench.compilation import Kind
from routing_bench.models import BF16_GATE

FUNCTION = FUNCTIONS["sum + 1e-20"]
"""What the sigmoid routers below do fused."""


class Way(StrEnum):
    """How the kernel is called."""

    FUSED = "fused"
    COUNTED = "tokens per expert counted as well"
    FUNCTION = "reduce function in Python"


KINDS: Mapping[Way, tuple[Kind, Kind]] = {
    Way.FUSED: (Kind.FEW, Kind.MANY),
    Way.COUNTED: (Kind.COUNTED_FEW, Kind.COUNTED_MANY),
    Way.FUNCTION: (Kind.CHOSEN_FEW, Kind.CHOSEN_MANY),
}
"""The kernels that each way needs."""


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table."""

    name: str
    spec: RouterSpec
    way: Way = Way.FUSED

    def call(self, logits_TE: Tensor, bias_E: Tensor | None) -> Callable[[], object]:
        """One call of ours."""
        spec, operands = self.spec, {} if bias_E is None else {"bias_E": bias_E}
        match self.way:
            case Way.FUSED:
                return lambda: kernel_route(logits_TE, spec, **operands)
            case Way.COUNTED:
                counts_E = expert_counts(spec.num_experts, logits_TE.device)
                return lambda: kernel_route(logits_TE, spec, **operands, counts_E=counts_E)
            case Way.FUNCTION:
                return lambda: route(logits_TE, spec, **operands, topk_reduce_func=FUNCTION)


def softmax(E: int, K: int = 8, **changes: Any) -> RouterSpec:
    """A router of the Qwen3 kind."""
    return _spec(
        num_experts=E,
        top_k=K,
        score=ScoreFunction.SOFTMAX,
        slot_order=SlotOrder.SORTED,
        reduce=TopkReduce(kind=ReduceKind.SUM),
        **changes,
    )


def sigmoid(E: int, groups: GroupSpec | None = None) -> RouterSpec:
    """A router of the DeepSeek-V3 kind: sigmoid, a bias, perhaps groups."""
    return _spec(
        num_experts=E,
        top_k=8,
        score=ScoreFunction.SIGMOID,
        has_bias=True,
        groups=groups,
        slot_order=SlotOrder.UNSORTED,
        reduce=TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-20),
        scale=2.5,
    )


def _spec(**fields: Any) -> RouterSpec:
    return RouterSpec(**{"weight_dtype": torch.float32, "platform": "cuda", **fields})


COLUMNS = (
    Column(name="softmax E=128", spec=softmax(128)),
    Column(name="sigmoid+bias E=128", spec=sigmoid(128)),
    Column(name="softmax E=160", spec=softmax(160)),
    Column(name="sigmoid+bias E=160", spec=sigmoid(160)),
    Column(name="softmax E=256", spec=softmax(256)),
    Column(name="sigmoid+bias E=256", spec=sigmoid(256)),
    Column(name="E=256, 4 of 8 groups", spec=sigmoid(256, GroupSpec(count=8, kept=4))),
)
"""fp32 logits, 8 slots."""
MORE_COLUMNS = (
    Column(name="softmax E=128, bf16", spec=softmax(128, gate=BF16_GATE, weight_dtype=torch.bfloat16)),
    Column(name="softmax E=512 k=10", spec=softmax(512, 10)),
    Column(name="softmax E=128, counts", spec=softmax(128), way=Way.COUNTED),
    Column(name="4 of 8 groups, counts", spec=sigmoid(256, GroupSpec(count=8, kept=4)), way=Way.COUNTED),
    Column(name="sigmoid E=160, function", spec=sigmoid(160), way=Way.FUNCTION),
)
