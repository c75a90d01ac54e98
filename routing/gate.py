"""The gate: hidden states -> logits, with every rounding named by a GateSpec. T tokens, D hidden, E experts."""

import torch
from torch import Tensor
from torch.nn.functional import linear

from routing.terms import GateSpec


def gate_logits(hidden_TD: Tensor, weight_ED: Tensor, gate: GateSpec) -> Tensor:
    """[T, E] in gate.output_dtype. ValueError where this process or device cannot compute what the spec says."""
    if hidden_TD.ndim != 2 or weight_ED.ndim != 2 or hidden_TD.shape[1] != weight_ED.shape[1]:
        raise ValueError(
            f"gate: hidden [T, D] and weight [E, D] expected, got {tuple(hidden_TD.shape)}, {tuple(weight_ED.shape)}"
        )
    _check_precision(gate)
    hidden_TD, weight_ED = hidden_TD.to(gate.operand_dtype), weight_ED.to(gate.operand_dtype)
    if gate.output_dtype == gate.operand_dtype:
        return linear(hidden_TD, weight_ED)
    assert gate.output_dtype == gate.accumulate_dtype, gate  # GateSpec takes no other
    if hidden_TD.device.type == "cuda":
        return torch.mm(hidden_TD, weight_ED.t(), out_dtype=gate.output_dtype)
    # products of half-precision numbers are exact in fp32, so widening first is the same sum
    return linear(hidden_TD.to(gate.output_dtype), weight_ED.to(gate.output_dtype))


def _check_precision(gate: GateSpec) -> None:
    """fp32 products follow a process-wide switch, which the spec has to agree with; it is read, never set."""
    if gate.operand_dtype != torch.float32:
        return
    precision = torch.get_float32_matmul_precision()
    if gate.tf32 != (precision == "high") or precision == "medium":
        wanted = "high" if gate.tf32 else "highest"
        raise ValueError(
            f"gate: tf32={gate.tf32}, but this process computes fp32 products with precision {precision!r}:"
            f" call torch.set_float32_matmul_precision({wanted!r})"
        )
