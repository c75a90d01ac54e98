"""Specs and rows that routers get wrong, and bit-exact comparison. T tokens, E experts, K slots of a token."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from routing import (
    Assignment,
    GateSpec,
    GroupScore,
    GroupSpec,
    ReduceKind,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    TopkReduce,
)

NONE, SUM = TopkReduce(kind=ReduceKind.NONE), TopkReduce(kind=ReduceKind.SUM)
SUM_EPS = TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-20)
BF16 = torch.bfloat16


def make_spec(**changes: Any) -> RouterSpec:
    """A small softmax router on platform "cuda", with changes."""
    fields: dict[str, Any] = {
        "num_experts": 16,
        "top_k": 4,
        "score": ScoreFunction.SOFTMAX,
        "slot_order": SlotOrder.SORTED,
        "reduce": SUM,
        "weight_dtype": torch.float32,
        "platform": "cuda",
    }
    return RouterSpec(**{**fields, **changes})


def sigmoid_spec(**changes: Any) -> RouterSpec:
    """A router of the DeepSeek kind: biased choice, unsorted slots, sum + 1e-20, scaled."""
    fields: dict[str, Any] = {"score": ScoreFunction.SIGMOID, "has_bias": True, "slot_order": SlotOrder.UNSORTED}
    return make_spec(**{**fields, "reduce": SUM_EPS, "scale": 2.5, **changes})


SPECS: Mapping[str, RouterSpec] = {
    "qwen3": make_spec(num_experts=128, top_k=8),
    "qwen3 with a bf16 gate": make_spec(
        num_experts=128, top_k=8, weight_dtype=BF16, gate=GateSpec(operand_dtype=BF16, output_dtype=BF16)
    ),
    "qwen2, 60 experts, no norm": make_spec(num_experts=60, reduce=NONE),
    "glm4": sigmoid_spec(num_experts=160, top_k=8),
    "moonlight, six slots": sigmoid_spec(num_experts=64, top_k=6, scale=2.446),
    "deepseek_v3": sigmoid_spec(num_experts=64, top_k=8, groups=GroupSpec(count=8, kept=4)),
    "zero-filled groups": sigmoid_spec(
        num_experts=40, top_k=6, groups=GroupSpec(count=8, kept=3, mask_value=0.0), slot_order=SlotOrder.SORTED
    ),
    "groups of the best expert": make_spec(
        num_experts=24,
        top_k=6,
        groups=GroupSpec(count=4, kept=2, score=GroupScore.MAX, top=1, mask_value=0.0),
        slot_order=SlotOrder.UNSORTED,
        reduce=NONE,
        scale=16.0,
    ),
    "groups of the best five": sigmoid_spec(num_experts=32, groups=GroupSpec(count=4, kept=2, top=5), has_bias=False),
    "minimax": sigmoid_spec(num_experts=48, top_k=8, reduce=SUM, scale=None),
    "ernie": make_spec(
        num_experts=64, top_k=6, has_bias=True, reduce=TopkReduce(kind=ReduceKind.CLAMPED_SUM, eps=1e-12)
    ),
    "lfm2, a bf16 chain": sigmoid_spec(
        num_experts=32,
        slot_order=SlotOrder.SORTED,
        reduce=TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-6),
        scale=1.8,
        chain_dtype=BF16,
        weight_dtype=BF16,
        gate=GateSpec(operand_dtype=BF16, output_dtype=BF16),
    ),
    "clamped bf16 chain, groups unbiased": sigmoid_spec(
        has_bias=False,
        groups=GroupSpec(count=4, kept=2),
        reduce=TopkReduce(kind=ReduceKind.CLAMPED_SUM, eps=1e-3),
        chain_dtype=BF16,
    ),
    "gpt_oss": make_spec(num_experts=32, score=ScoreFunction.SOFTMAX_TOPK, reduce=NONE),
    "gpt_oss in fp16": make_spec(
        num_experts=32,
        score=ScoreFunction.SOFTMAX_TOPK,
        reduce=NONE,
        chain_dtype=torch.float16,
        weight_dtype=torch.float16,
        gate=GateSpec(operand_dtype=torch.float16, output_dtype=torch.float16),
    ),
    "softmax over sigmoids": sigmoid_spec(top_k=5, has_bias=False, reduce=TopkReduce(kind=ReduceKind.SOFTMAX)),
    "dbrx": make_spec(reduce=TopkReduce(kind=ReduceKind.L1), chain_dtype=BF16, weight_dtype=BF16),
    "deepseek_v4": sigmoid_spec(num_experts=32, top_k=6, score=ScoreFunction.SQRT_SOFTPLUS, scale=1.5),
    "gemma4": make_spec(num_experts=20, expert_scale=True),
    "scaled twice": sigmoid_spec(top_k=3, expert_scale=True, reduce=NONE),
    "one slot": make_spec(num_experts=12, top_k=1),
    "one slot, unsorted": sigmoid_spec(num_experts=12, top_k=1),
    "every expert, sorted": make_spec(num_experts=10, top_k=10, score=ScoreFunction.SIGMOID),
    "every expert, unsorted": sigmoid_spec(num_experts=8, top_k=8, has_bias=False),
    "two experts": make_spec(num_experts=2, top_k=2),
    "twenty-two slots of 96": sigmoid_spec(num_experts=96, top_k=22, scale=5.0, slot_order=SlotOrder.SORTED),
}


def logit_rows(spec: RouterSpec) -> dict[str, Tensor]:
    """Families of rows [T, E] by name, in fp32 or rounded to the spec's gate output dtype."""
    E, K = spec.num_experts, spec.top_k
    random = torch.Generator().manual_seed(E * 100 + K)
    normal = torch.randn(12, E, generator=random)
    above, below = min(K, E - 1), max(K - 1, 0)
    levels = torch.arange(E).float()

    def row(fill: float, **at: float) -> Tensor:
        """One row of `fill`, with values at positions: first, middle, last, boundary (the k-th)."""
        places = {"first": 0, "middle": E // 2, "last": E - 1, "boundary": below}
        filled = torch.full((1, E), fill)
        for name, value in at.items():
            filled[0, places[name]] = value
        return filled

    families = {
        "normal": normal[:6] * 1.5,
        "near uniform": normal[6:8] * 0.02,
        "peaked": normal[8:10] * 8,
        "one hot": row(0.0, middle=50.0),
        "all equal": torch.cat([row(0.0), row(1.0), row(-3.5), row(1e30)]).clamp(max=_largest(spec)),
        "two-valued": torch.stack([(levels % 2), (levels % 3 == 1).float(), (levels >= E - above).float()]),
        "tie across the boundary": torch.stack([-levels.clamp(below - 1), levels.clamp(max=E - K - 1).flip(0)]),
        "ties above the boundary": torch.stack([-(levels // 2), (levels // 3), -(levels // 4)]),
        "first and last tie": row(-1.0, first=2.0, last=2.0),
        "quantised": normal[:4].to(BF16).float() * 1.5,
        "saturated sigmoid": 16.0 + levels.view(1, E) * 0.125,
        "softplus threshold": torch.stack([normal[10] * 1e-4 + 20, normal[11] * 4 + 20]),
        "overflowing exp": torch.stack([normal[0] * 0.1 + 95, normal[1] * 0.02 - 87.45, normal[2] * 5 - 150]),
        "zero denominator": row(-120.0),
        "small denominators": normal[:4] * 0.1 - torch.tensor([[14.0], [21.0], [29.0], [30.5]]),
        "underflowing softmax": torch.stack([-levels * 60, -levels * 30, -levels * 13]),
        "nan": torch.cat([row(0.5, middle=math.nan), row(math.nan), torch.where(levels < K, math.nan, levels)[None]]),
        "negative nan": row(-math.nan, first=1.0, last=-math.inf),
        "inf": torch.cat([row(0.0, last=math.inf), row(1.0, first=math.inf, last=math.inf), row(math.inf)]),
        "minus inf": torch.cat([row(0.25, first=-math.inf), row(-math.inf, last=1.0), row(-math.inf)]),
        "nan and inf": row(0.0, first=math.nan, middle=math.inf, last=-math.inf),
        "signed zeros": torch.where(levels % 2 == 0, 0.0, -0.0).view(1, E).repeat(2, 1),
    }
    return {name: rows.to(spec.gate.output_dtype) for name, rows in families.items()}


def bias_rows(E: int) -> dict[str, Tensor]:
    """Biases [E] by name: some hide the score's last bits, some turn the order around, one makes it negative."""
    random = torch.Generator().manual_seed(E)
    small = torch.randn(E, generator=random) * 0.05
    return {
        "small": small,
        "zero": torch.zeros(E),
        "large": small.to(BF16).float() + 8,
        "negative": -1.5 - small.abs(),
        "reversing": torch.linspace(4, -4, E),
        "nan": torch.where(torch.arange(E) == 1, math.nan, small),
    }


def operands(spec: RouterSpec, bias: str = "small") -> dict[str, Tensor]:
    """The keyword operands that a spec asks for."""
    found = {}
    if spec.has_bias:
        found["bias_E"] = bias_rows(spec.num_experts)[bias]
    if spec.expert_scale:
        found["expert_scale_E"] = torch.linspace(0.3, 1.7, spec.num_experts).to(spec.chain_dtype)
    return found


def _largest(spec: RouterSpec) -> float:
    return 6e4 if spec.gate.output_dtype == torch.float16 else 1e30


def has_distinct_ids(assignment: Assignment, num_experts: int) -> bool:
    """Whether no token has an id out of range or twice."""
    rows = assignment.expert_ids_TK.tolist()
    return all(len(set(row)) == len(row) and set(row) <= set(range(num_experts)) for row in rows)


def bits(x: Tensor) -> Tensor:
    """int64 bit patterns, with one pattern for every NaN."""
    pattern = x.contiguous().view({2: torch.int16, 4: torch.int32}[x.element_size()]).long()
    return torch.where(x.isnan(), 1 << 40, pattern)


def ulps(a: Tensor, b: Tensor) -> Tensor:
    """How many representable numbers lie between, elementwise; NaN is next to nothing but NaN."""

    def ordinal(x: Tensor) -> Tensor:
        pattern = bits(x)
        lowest = -(1 << (8 * x.element_size() - 1))
        return torch.where(pattern < 0, lowest - pattern, pattern)

    return (ordinal(a) - ordinal(b)).abs()
