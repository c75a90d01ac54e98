"""Specs of routers, of every family and of no family at all."""

from collections.abc import Mapping
from typing import Any

import torch

from routing import (
    GateSpec,
    GroupScore,
    GroupSpec,
    ReduceKind,
    RouterSpec,
    ScoreFunction,
    SlotOrder,
    SumOrder,
    TopkReduce,
)

NONE, SUM = TopkReduce(kind=ReduceKind.NONE), TopkReduce(kind=ReduceKind.SUM)
SUM_EPS = TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-20)
BF16, FP64 = torch.bfloat16, torch.float64
BF16_GATE = GateSpec(operand_dtype=BF16, output_dtype=BF16)
BF16_CHAIN = {"chain_dtype": BF16, "weight_dtype": BF16, "gate": BF16_GATE}
FP64_CHAIN = {
    "chain_dtype": FP64,
    "weight_dtype": FP64,
    "gate": GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64),
}


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
    "deepseek_v3, groups of 32": sigmoid_spec(num_experts=256, top_k=8, groups=GroupSpec(count=8, kept=4)),
    "zero-filled groups of 64": sigmoid_spec(
        num_experts=128, top_k=6, groups=GroupSpec(count=2, kept=1, mask_value=0.0), slot_order=SlotOrder.SORTED
    ),
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
    "seven slots of 72 in groups of two": sigmoid_spec(
        num_experts=72, top_k=7, groups=GroupSpec(count=36, kept=4), scale=1.0
    ),
    "as many groups kept as there are": sigmoid_spec(num_experts=24, top_k=9, groups=GroupSpec(count=4, kept=4)),
    "one group": sigmoid_spec(num_experts=24, top_k=3, groups=GroupSpec(count=1, kept=1), scale=2.827),
    "groups of the best one": sigmoid_spec(num_experts=32, groups=GroupSpec(count=8, kept=4, top=1)),
    "groups of the best eight, from logits": make_spec(
        num_experts=64,
        top_k=8,
        score=ScoreFunction.SOFTMAX_TOPK,
        groups=GroupSpec(count=4, kept=1, top=8),
        reduce=NONE,
    ),
    "masked scores": make_spec(
        num_experts=40,
        top_k=6,
        groups=GroupSpec(count=8, kept=3, score=GroupScore.MAX, top=1, mask_value=0.0, masks_scores=True),
        slot_order=SlotOrder.UNSORTED,
        reduce=NONE,
        scale=16.0,
    ),
    "mistral4, a bf16 chain in groups": make_spec(
        num_experts=32,
        groups=GroupSpec(count=4, kept=2, mask_value=0.0),
        slot_order=SlotOrder.UNSORTED,
        reduce=SUM_EPS,
        chain_dtype=BF16,
        weight_dtype=BF16,
        gate=BF16_GATE,
    ),
    "a sum and 0": sigmoid_spec(top_k=12, reduce=TopkReduce(kind=ReduceKind.SUM_EPS, eps=0.0)),
    "a sum and 1e-9": sigmoid_spec(top_k=5, has_bias=False, reduce=TopkReduce(kind=ReduceKind.SUM_EPS, eps=1e-9)),
    "kimi_k2": sigmoid_spec(num_experts=384, top_k=8, scale=2.827),
    "qwen3_next": make_spec(num_experts=512, top_k=10),
    "sixteen slots": make_spec(num_experts=48, top_k=16),
    "megatron, before the softmax": make_spec(num_experts=60, reduce=NONE, **BF16_CHAIN),
    "megatron, after the softmax": make_spec(
        num_experts=128, top_k=8, score=ScoreFunction.SOFTMAX_TOPK, reduce=NONE, **BF16_CHAIN
    ),
    "megatron, sigmoid": sigmoid_spec(
        num_experts=64, top_k=8, groups=GroupSpec(count=8, kept=4), slot_order=SlotOrder.SORTED, **BF16_CHAIN
    ),
    "megatron, one slot": sigmoid_spec(
        num_experts=12, top_k=1, reduce=NONE, scale=None, slot_order=SlotOrder.SORTED, **BF16_CHAIN
    ),
    "megatron, fp32 chain": sigmoid_spec(
        num_experts=32, top_k=8, slot_order=SlotOrder.SORTED, weight_dtype=BF16, gate=BF16_GATE
    ),
    "megatron, fp64": sigmoid_spec(
        num_experts=64, top_k=8, groups=GroupSpec(count=8, kept=4), slot_order=SlotOrder.SORTED, **FP64_CHAIN
    ),
    "megatron, fp64, softmax before": make_spec(num_experts=60, top_k=4, reduce=NONE, **FP64_CHAIN),
    "megatron, fp64, softmax after": make_spec(
        num_experts=32, top_k=8, score=ScoreFunction.SOFTMAX_TOPK, reduce=NONE, **FP64_CHAIN
    ),
    "fp64 without a bias, unsorted": sigmoid_spec(num_experts=20, top_k=6, has_bias=False, **FP64_CHAIN),
    "adjacent": sigmoid_spec(num_experts=64, top_k=8, slot_order=SlotOrder.SORTED, sum_order=SumOrder.ADJACENT),
    "adjacent, six slots": make_spec(num_experts=20, top_k=6, sum_order=SumOrder.ADJACENT),
    "adjacent, groups of the best five": sigmoid_spec(
        num_experts=32, top_k=10, groups=GroupSpec(count=4, kept=2, top=5), sum_order=SumOrder.ADJACENT
    ),
    "adjacent in fp64": sigmoid_spec(num_experts=32, top_k=7, sum_order=SumOrder.ADJACENT, **FP64_CHAIN),
}
