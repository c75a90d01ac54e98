"""The gate's row of parity: the product itself, measured on a weight against the trainer's. E experts, D hidden."""

import torch
from torch import Tensor

from routing.gate_claims import gate_claim
from routing.gate_measure import GateMeasurement, measure_gate
from routing.parity import ParityRow
from routing.plain import dtype_name
from routing.stages import Operation
from routing.terms import GateSpec
from routing.verdict import Verdict

TOKENS = {"cuda": (1, 2, 7, 16, 33, 64, 128, 256, 333, 1024, 2048, 4096, 8192), "cpu": (1, 2, 7, 16, 64, 256)}
"""Sizes of the trainer's batch that are tried, by the kind of device."""
ENOUGH_TOKENS = 2048
"""A trainer's micro-batch has as many, or more."""


def gate_row(ours: GateSpec, trainers: GateSpec, weight_ED: Tensor, whose: str, bias_E: Tensor | None) -> ParityRow:
    """What may be said of the logits, given the hidden states.

    Args:
        ours: the gate that a host computes.
        trainers: the one that the trainer computes.
        weight_ED: on the device that is asked, in any dtype.
        whose: where the weight is from, in words.
        bias_E: for a gate with a bias.
    """
    expected = shown(trainers)
    if ours != trainers:
        why = (
            "the trainer computes another product: let it run ours (routing.install_gate), or host the trainer's with"
            " gate: trainer"
        )
        return _row(expected, f"{shown(ours)} here", Verdict.IMPOSSIBLE, why)
    kind = weight_ED.device.type
    measured = measure_gate(ours, weight_ED, TOKENS[kind], bias_E=bias_E)
    shape = f"{weight_ED.shape[0]} x {weight_ED.shape[1]}, {whose}"
    if kind == "cpu":
        return _row(expected, *_on_cpu(measured, shape))
    if not measured.is_invariant:
        return _row(
            expected, f"our rows follow the batch ({shape})", Verdict.IMPOSSIBLE, "a fault of ours", is_bad=True
        )
    return _row(expected, f"{_found(measured)} ({shape})", *_judged(ours, measured))


def _on_cpu(measured: GateMeasurement, shape: str) -> tuple[str, Verdict, str]:
    """Both sides run PyTorch's product, each with a batch of its own."""
    sizes = f"in batches of {min(measured.differing)} to {max(measured.differing)} tokens ({shape})"
    if measured.is_invariant and not any(measured.torch_varies.values()):
        why = "PyTorch's products on a CPU follow the batch for most shapes; not for this one, as far as was tried"
        return f"a row is the same {sizes}", Verdict.UNPROVED, why
    part = max(measured.torch_varies.values())
    return (
        f"up to {part:.2%} of logits vary {sizes}",
        Verdict.IMPOSSIBLE,
        "PyTorch's products on a CPU follow the batch",
    )


def shown(gate: GateSpec) -> str:
    """A gate in words."""
    tf32 = ", TF32" if gate.tf32 else ""
    bias = ", with a bias" if gate.has_bias else ""
    return f"{dtype_name(gate.operand_dtype)} operands, {dtype_name(gate.output_dtype)} logits{tf32}{bias}"


def _found(measured: GateMeasurement) -> str:
    least = measured.from_tokens
    if least == min(measured.differing):
        return f"no logit differs, in batches of {least} to {max(measured.differing)} tokens"
    if least is not None:
        return f"no logit differs in batches of {least} tokens and more"
    most = max(measured.differing)
    return f"{measured.differing[most]:.2%} of logits differ in a batch of {most} tokens"


def _judged(gate: GateSpec, measured: GateMeasurement) -> tuple[Verdict, str]:
    least = measured.from_tokens
    claim = gate_claim(gate)
    if least == min(measured.differing):
        return Verdict.EQUAL, f"equals {claim.equals}"
    if least is not None and least <= ENOUGH_TOKENS:
        return (
            Verdict.UNPROVED,
            f"the trainer's batches have to hold {least} tokens or more: smaller ones add otherwise",
        )
    if claim.impossible is not None:
        return Verdict.IMPOSSIBLE, claim.impossible
    varies = any(part > 0 for part in measured.torch_varies.values())
    return Verdict.IMPOSSIBLE, f"PyTorch's own product {'follows the batch' if varies else 'adds in another order'}"


def _row(expected: str, found: str, verdict: Verdict, why: str, *, is_bad: bool = False) -> ParityRow:
    return ParityRow(
        operation=Operation.GATE, expected=expected, found=found, verdict=verdict, why=why, is_mismatch=is_bad
    )


def drawn_weight(num_experts: int, hidden: int, device: torch.device) -> Tensor:
    """bf16 [E, D] of the usual size, from a fixed seed."""
    random = torch.Generator().manual_seed(0)
    return (torch.randn(num_experts, hidden, generator=random) * 0.02).bfloat16().to(device)
