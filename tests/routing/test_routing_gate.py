"""The gate's product rounds where its spec says, and nowhere else."""

from collections.abc import Iterator

import pytest
import torch

from routing import GateSpec, gate_logits

BF16 = torch.bfloat16
HIDDEN = torch.randn(9, 64, generator=torch.Generator().manual_seed(0)).to(BF16)
WEIGHT = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).to(BF16)


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts the process-wide precision of fp32 products back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_rl_mode_widens_both_operands_and_keeps_fp32() -> None:
    logits_TE = gate_logits(HIDDEN, WEIGHT, GateSpec())
    assert logits_TE.dtype == torch.float32
    assert torch.equal(logits_TE, torch.nn.functional.linear(HIDDEN.float(), WEIGHT.float()))


def test_the_trainers_gate_rounds_to_its_dtype() -> None:
    logits_TE = gate_logits(HIDDEN, WEIGHT, GateSpec(operand_dtype=BF16, output_dtype=BF16))
    assert logits_TE.dtype == BF16
    assert torch.equal(logits_TE, torch.nn.functional.linear(HIDDEN, WEIGHT))


def test_bf16_operands_with_fp32_output_round_the_operands_only() -> None:
    wide = WEIGHT.float() * 1.001
    logits_TE = gate_logits(HIDDEN, wide, GateSpec(operand_dtype=BF16))
    assert torch.equal(logits_TE, torch.nn.functional.linear(HIDDEN.float(), wide.to(BF16).float()))
    assert not torch.equal(logits_TE, gate_logits(HIDDEN, wide, GateSpec()))


def test_a_process_that_computes_another_product_is_refused(precision: None) -> None:
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
