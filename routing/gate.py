"""The gate: hidden states -> logits, with every rounding named by a GateSpec. T tokens, D hidden, E experts."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from routing.kernel_gate import kernel_gate
from routing.terms import GateSpec


def gate_logits(hidden_TD: Tensor, weight_ED: Tensor, gate: GateSpec, bias_E: Tensor | None = None) -> Tensor:
    """[T, E] in gate.output_dtype.

    On CUDA our kernel: a row's bits depend on nothing but its own hidden state, the weight and the bias, whatever T,
    the row's place and the process's settings; routing.gate_claims says whose product it equals. It can be captured in
    a CUDA graph. Elsewhere PyTorch's own product. Operands of any floating dtype; bias_E [E] where the gate has one.
    Gradients are those of a linear layer, in fp32 (fp64 for an fp64 gate), whatever the gate rounds.

    Memory on CUDA besides the logits: none in bf16, fp16 and TF32; in fp32 and fp64 up to 128 MiB while it runs, and a
    copy of the weight. routing.kernel_gate.kernel_gate has the sizes.

    ValueError where operands do not fit, or this process or device cannot compute what the spec says.
    """
    _check_operands(hidden_TD, weight_ED, gate, bias_E)
    tensors = (hidden_TD, weight_ED) if bias_E is None else (hidden_TD, weight_ED, bias_E)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        logits_TE: Tensor = _Gate.apply(hidden_TD, weight_ED, bias_E, gate)  # type: ignore[no-untyped-call]
        return logits_TE
    return _product(hidden_TD, weight_ED, gate, bias_E)


def torch_product(hidden_TD: Tensor, weight_ED: Tensor, gate: GateSpec, bias_E: Tensor | None = None) -> Tensor:
    """[T, E]: PyTorch's own product with those roundings, as trainers call it.

    ValueError where the process's precision of fp32 products is not the gate's.
    """
    _check_precision(gate)
    hidden_TD, weight_ED = hidden_TD.to(gate.operand_dtype), weight_ED.to(gate.operand_dtype)
    bias_E = None if bias_E is None else bias_E.to(gate.operand_dtype)
    with torch.autocast(device_type=hidden_TD.device.type, enabled=False):
        if gate.output_dtype == gate.operand_dtype:
            return linear(hidden_TD, weight_ED, bias_E)
        assert gate.output_dtype == gate.accumulate_dtype, gate  # GateSpec takes no other
        if hidden_TD.device.type == "cuda":
            logits_TE = torch.mm(hidden_TD, weight_ED.t(), out_dtype=gate.output_dtype)
            return logits_TE if bias_E is None else logits_TE + bias_E.to(gate.output_dtype)
        # products of half-precision numbers are exact in fp32, so widening first is the same sum
        wide = [None if tensor is None else tensor.to(gate.output_dtype) for tensor in (hidden_TD, weight_ED, bias_E)]
        return linear(*wide)  # type: ignore[arg-type]


def _product(hidden_TD: Tensor, weight_ED: Tensor, gate: GateSpec, bias_E: Tensor | None) -> Tensor:
    if hidden_TD.device.type == "cuda":
        return kernel_gate(hidden_TD, weight_ED, gate, bias_E)
    return torch_product(hidden_TD, weight_ED, gate, bias_E)


class _Gate(torch.autograd.Function):
    """The product forward; backward, as autograd has it for the conversions and a linear layer in a wide dtype."""

    @staticmethod
    def forward(ctx: Any, hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, gate: GateSpec) -> Tensor:
        ctx.save_for_backward(hidden_TD, weight_ED)
        ctx.gate = gate
        ctx.bias_dtype = None if bias_E is None else bias_E.dtype
        return _product(hidden_TD, weight_ED, gate, bias_E)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        hidden_TD, weight_ED = ctx.saved_tensors
        gate: GateSpec = ctx.gate
        wide = gate.accumulate_dtype
        grad_hidden = grad_weight = grad_bias = None
        with torch.autocast(device_type=grad_TE.device.type, enabled=False):
            grad_TE = grad_TE.to(wide)
            if ctx.needs_input_grad[0]:
                grad_hidden = (grad_TE @ weight_ED.to(gate.operand_dtype).to(wide)).to(hidden_TD.dtype)
            if ctx.needs_input_grad[1]:
                grad_weight = (grad_TE.t() @ hidden_TD.to(gate.operand_dtype).to(wide)).to(weight_ED.dtype)
            if ctx.needs_input_grad[2]:
                grad_bias = grad_TE.sum(dim=0).to(ctx.bias_dtype)
        return grad_hidden, grad_weight, grad_bias, None


def _check_operands(hidden_TD: Tensor, weight_ED: Tensor, gate: GateSpec, bias_E: Tensor | None) -> None:
    if hidden_TD.ndim != 2 or weight_ED.ndim != 2 or hidden_TD.shape[1] != weight_ED.shape[1]:
        raise ValueError(
            f"gate: hidden [T, D] and weight [E, D] expected, got {tuple(hidden_TD.shape)}, {tuple(weight_ED.shape)}"
        )
    faults = []
    if (bias_E is not None) != gate.has_bias:
        faults.append(f"bias_E {'missing' if gate.has_bias else 'given'}, the spec says has_bias={gate.has_bias}")
    if bias_E is not None and bias_E.shape != weight_ED.shape[:1]:
        faults.append(f"bias_E of shape {tuple(bias_E.shape)}, [{weight_ED.shape[0]}] expected")
    tensors = {"hidden_TD": hidden_TD, "weight_ED": weight_ED} | ({} if bias_E is None else {"bias_E": bias_E})
    faults += [
        f"{name} in {tensor.dtype}, a floating dtype of 16 bits or more expected"
        for name, tensor in tensors.items()
        if not tensor.is_floating_point() or tensor.element_size() < 2
    ]
    if len({tensor.device for tensor in tensors.values()}) > 1:
        faults.append(f"one device expected: {', '.join(f'{name} on {t.device}' for name, t in tensors.items())}")
    if faults:
        raise ValueError(f"gate: {'; '.join(faults)}")


def _check_precision(gate: GateSpec) -> None:
    """PyTorch's fp32 products follow a process-wide switch, which the spec has to agree with; it is read, never set."""
    if gate.operand_dtype != torch.float32:
        return
    precision = torch.get_float32_matmul_precision()
    if gate.tf32 != (precision == "high") or precision == "medium":
        wanted = "high" if gate.tf32 else "highest"
        raise ValueError(
            f"gate: tf32={gate.tf32}, but this process computes fp32 products with precision {precision!r}:"
            f" call torch.set_float32_matmul_precision({wanted!r})"
        )
