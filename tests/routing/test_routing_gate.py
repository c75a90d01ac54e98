"""The gate's product rounds where its spec says, and nowhere else; its gradient is a linear layer's."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from routing import GateSpec, gate_logits

BF16 = torch.bfloat16
HIDDEN = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(BF16)
BIAS = torch.randn(16, generator=torch.Generator().manual_seed(2)).to(BF16)
FP64 = GateSpec(operand_dtype=torch.float64, accumulate_dtype=torch.float64, output_dtype=torch.float64)


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts the process-wide precision of fp32 products back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_rl_mode_widens_both_operands_and_keeps_fp32() -> None:
    logits_TE = gate_logits(HIDDEN, WEIGHT, GateSpec())
    assert logits_TE.dtype == torch.float32
    assert torch.equal(logits_TE, linear(HIDDEN.float(), WEIGHT.float()))


def test_the_trainers_gate_rounds_to_its_dtype() -> None:
    logits_TE = gate_logits(HIDDEN, WEIGHT, GateSpec(operand_dtype=BF16, output_dtype=BF16))
    assert logits_TE.dtype == BF16
    assert torch.equal(logits_TE, linear(HIDDEN, WEIGHT))


def test_bf16_operands_with_fp32_output_round_the_operands_only() -> None:
    wide = WEIGHT.float() * 1.001
    logits_TE = gate_logits(HIDDEN, wide, GateSpec(operand_dtype=BF16))
    assert torch.equal(logits_TE, linear(HIDDEN.float(), wide.to(BF16).float()))
    assert not torch.equal(logits_TE, gate_logits(HIDDEN, wide, GateSpec()))


def test_an_fp64_gate_widens_first() -> None:
    logits_TE = gate_logits(HIDDEN, WEIGHT, FP64)
    assert torch.equal(logits_TE, linear(HIDDEN.double(), WEIGHT.double()))


def test_the_bias_is_the_linear_layers_own() -> None:
    gate = GateSpec(operand_dtype=BF16, output_dtype=BF16, has_bias=True)
    assert torch.equal(gate_logits(HIDDEN, WEIGHT, gate, BIAS), linear(HIDDEN, WEIGHT, BIAS))
    wide = dataclasses.replace(gate, output_dtype=torch.float32)
    found = gate_logits(HIDDEN, WEIGHT, wide, BIAS.float() * 1.001)
    assert torch.equal(found, linear(HIDDEN.float(), WEIGHT.float(), (BIAS.float() * 1.001).to(BF16).float()))


def test_autocast_changes_nothing() -> None:
    with torch.autocast(device_type="cpu", dtype=BF16):
        logits_TE = gate_logits(HIDDEN, WEIGHT.float(), GateSpec())
    assert torch.equal(logits_TE, linear(HIDDEN.float(), WEIGHT.float()))


def test_on_the_cpu_a_process_that_computes_another_product_is_refused(precision: None) -> None:
    with pytest.raises(ValueError, match=r"tf32=True.*set_float32_matmul_precision\('high'\)"):
        gate_logits(HIDDEN, WEIGHT, GateSpec(tf32=True))
    for other in ("high", "medium"):
        torch.set_float32_matmul_precision(other)
        with pytest.raises(ValueError, match=rf"precision '{other}'.*set_float32_matmul_precision\('highest'\)"):
            gate_logits(HIDDEN, WEIGHT, GateSpec())
    gate_logits(HIDDEN, WEIGHT, GateSpec(operand_dtype=BF16, output_dtype=BF16))


def test_operands_that_do_not_multiply_are_refused() -> None:
    with pytest.raises(ValueError, match=r"hidden \[T, D\] and weight \[E, D\]"):
        gate_logits(HIDDEN, WEIGHT.t(), GateSpec())
    with pytest.raises(ValueError, match=r"bias_E missing.*weight_ED in torch\.int64"):
        gate_logits(HIDDEN, WEIGHT.long(), GateSpec(has_bias=True))
    with pytest.raises(ValueError, match=r"bias_E given, the spec says has_bias=False.*shape \(3,\), \[16\] expected"):
        gate_logits(HIDDEN, WEIGHT, GateSpec(), torch.zeros(3))
    with pytest.raises(ValueError, match="one device expected: hidden_TD on cpu, weight_ED on meta"):
        gate_logits(HIDDEN, WEIGHT.to("meta"), GateSpec())


def gradients(logits_TE: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    """Of a sum that weighs every logit differently."""
    weights = torch.arange(logits_TE.numel(), dtype=torch.float64).view_as(logits_TE).sin()
    return torch.autograd.grad((logits_TE.double() * weights).sum(), leaves)


@pytest.mark.parametrize(
    "gate",
    [
        GateSpec(has_bias=True),
        GateSpec(operand_dtype=BF16, has_bias=True),
        GateSpec(operand_dtype=BF16, output_dtype=BF16, has_bias=True),
        dataclasses.replace(FP64, has_bias=True),
    ],
    ids=["fp32", "bf16 to fp32", "bf16", "fp64"],
)
def test_gradients_are_those_of_a_plain_linear_layer(gate: GateSpec) -> None:
    leaves = [tensor.clone().requires_grad_() for tensor in (HIDDEN, WEIGHT.float(), BIAS.float())]
    hidden_TD, weight_ED, bias_E = leaves
    found = gradients(gate_logits(hidden_TD, weight_ED, gate, bias_E), *leaves)
    wide = [leaf.detach().to(gate.operand_dtype).to(gate.accumulate_dtype).requires_grad_() for leaf in leaves]
    expected = gradients(linear(*wide).to(gate.output_dtype), *wide)
    for leaf, one, other in zip(leaves, found, expected, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one, other.to(leaf.dtype), rtol=8e-3 if one.dtype == BF16 else 1e-5, atol=1e-5)


def test_the_gradient_stands_up_to_finite_differences() -> None:
    random = torch.Generator().manual_seed(3)
    inputs = [torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((3, 5), (4, 5), (4,))]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    gate = dataclasses.replace(FP64, has_bias=True)
    assert torch.autograd.gradcheck(lambda hidden, weight, bias: gate_logits(hidden, weight, gate, bias), leaves)


def test_only_what_asks_for_a_gradient_gets_one() -> None:
    weight_ED = WEIGHT.float().requires_grad_()
    logits_TE = gate_logits(HIDDEN, weight_ED, GateSpec())
    assert torch.equal(logits_TE, gate_logits(HIDDEN, WEIGHT, GateSpec()))
    (grad,) = gradients(logits_TE, weight_ED)
    assert grad.shape == weight_ED.shape
    with torch.no_grad():
        assert not gate_logits(HIDDEN, weight_ED, GateSpec()).requires_grad
