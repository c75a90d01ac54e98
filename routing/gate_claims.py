"""What may be said of the gate's bits on a GPU: whose product each variant equals, from how many tokens on, and which
none can equal. E experts, D hidden."""

from collections.abc import Mapping
from dataclasses import dataclass

from routing.gate_tiles import Arithmetic
from routing.plain import dtype_name
from routing.terms import GateSpec
from routing.verdict import Verdict

MEASURED_ON = "NVIDIA H200, torch 2.11.0+cu130"
"""Where from_tokens comes from. cuBLAS chooses by device and release: elsewhere measure_gate has the word."""

FROM_TOKENS: Mapping[tuple[str, str], Mapping[tuple[int, int], int]] = {
    ("bfloat16", "bfloat16"): {(128, 2048): 1, (128, 4096): 2048, (160, 5120): 8192, (256, 7168): 2048},
    ("bfloat16", "float32"): {(128, 2048): 1, (128, 4096): 2048, (160, 5120): 8192, (256, 7168): 2048},
    ("tf32", "float32"): {(128, 2048): 2048, (160, 5120): 2048, (256, 7168): 2048},
    ("float64", "float64"): {(128, 2048): 4096, (160, 5120): 8192, (256, 7168): 8192},
}
"""By the dtypes of operands and logits, then by (E, D): every tried number of tokens from this one on gave equal bits.
Below it cuBLAS splits the sum along D."""


@dataclass(frozen=True, kw_only=True)
class GateClaim:
    """What is known of one gate on a GPU."""

    equals: str
    """The product that ours follows, and the trainers that compute it."""
    from_tokens: Mapping[tuple[int, int], int]
    """(E, D) -> the tokens from which on every row was found equal to it, on MEASURED_ON. Empty: none measured."""
    impossible: str | None
    """Why nothing can equal it, where nothing can."""

    def verdict(self, *, num_experts: int, hidden: int, tokens: int) -> Verdict:
        """Of rows from a batch of that many tokens."""
        if self.impossible is not None:
            return Verdict.IMPOSSIBLE
        least = self.from_tokens.get((num_experts, hidden))
        return Verdict.EQUAL if least is not None and tokens >= least else Verdict.UNPROVED


def gate_claim(gate: GateSpec) -> GateClaim:
    """Of the gate with those roundings."""
    operand, output = dtype_name(gate.operand_dtype), dtype_name(gate.output_dtype)
    impossible = None
    match Arithmetic.of(gate):
        case Arithmetic.FP32:
            equals = (
                "torch.nn.functional.linear in float32: transformers' DeepSeek-V3, GLM-4 MoE, ERNIE-4.5 and Hunyuan,"
                " torchtitan, PaddleFormers"
            )
            impossible = (
                "cuBLAS gives a row of a float32 product other bits at almost every batch size, so such a trainer has"
                " no one answer: install our gate in the learner (routing.install_gate), and both sides compute one"
            )
        case Arithmetic.TF32:
            equals = "torch.nn.functional.linear in float32 at matmul precision 'high': prime-rl as it is delivered"
        case Arithmetic.FP64:
            equals = "torch.mm in float64: Megatron-Core with moe_router_dtype=fp64, verl's DeepSeek-V3 recipe"
        case Arithmetic.HALF if gate.output_dtype == gate.operand_dtype:
            equals = (
                f"torch.nn.functional.linear in {operand}: transformers' Qwen2-MoE, Qwen3-MoE, Mixtral, OLMoE,"
                f" MiniMax-M2 and gpt-oss loaded in {operand}, Megatron-Core without moe_router_dtype"
            )
        case Arithmetic.HALF:
            equals = (
                f"torch.mm of {operand} operands with out_dtype=torch.float32: Megatron-Core with Transformer Engine"
                " and moe_router_dtype=fp32, prime-rl's serving side"
            )
    key = ("tf32", output) if gate.tf32 else (operand, output)
    return GateClaim(equals=equals, from_tokens=FROM_TOKENS.get(key, {}), impossible=impossible)
