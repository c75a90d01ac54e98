"""What is said of the gate's bits: the claims, and the measurement that they rest on."""

import dataclasses

import pytest
import torch

from routing import GateSpec
from routing.gate_claims import FROM_TOKENS, gate_claim
from routing.gate_measure import GateMeasurement, measure_gate
from routing.gate_tiles import Arithmetic
from routing.verdict import Verdict

BF16, FP64 = torch.bfloat16, torch.float64


def test_a_bf16_gate_equals_the_trainers_where_cublas_does_not_split_the_sum() -> None:
    claim = gate_claim(GateSpec(operand_dtype=BF16, output_dtype=BF16))
    assert claim.impossible is None
    assert claim.verdict(num_experts=128, hidden=2048, tokens=1) is Verdict.EQUAL
    assert claim.verdict(num_experts=128, hidden=4096, tokens=2048) is Verdict.EQUAL
    assert claim.verdict(num_experts=128, hidden=4096, tokens=2047) is Verdict.UNPROVED
    assert claim.verdict(num_experts=77, hidden=4096, tokens=2048) is Verdict.UNPROVED


def test_a_true_fp32_gate_equals_nobodys_and_says_what_to_do() -> None:
    claim = gate_claim(GateSpec())
    assert claim.impossible is not None
    assert "install_gate" in claim.impossible
    assert claim.verdict(num_experts=128, hidden=2048, tokens=65536) is Verdict.IMPOSSIBLE


@pytest.mark.parametrize(
    ("gate", "word"),
    [
        (GateSpec(operand_dtype=BF16), "out_dtype=torch.float32"),
        (GateSpec(operand_dtype=torch.float16, output_dtype=torch.float16), "linear in float16"),
        (GateSpec(tf32=True), "precision 'high'"),
        (GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64), "torch.mm in float64"),
    ],
)
def test_every_gate_names_the_product_that_it_follows(gate: GateSpec, word: str) -> None:
    assert word in gate_claim(gate).equals
    assert gate_claim(dataclasses.replace(gate, has_bias=True)).equals == gate_claim(gate).equals


def test_the_claims_are_of_gates_that_exist() -> None:
    kinds = {("tf32", "float32"), *((operand, out) for operand in ("bfloat16", "float16", "float64") for out in
             {operand, "float32" if operand != "float64" else operand})}  # fmt: skip
    assert set(FROM_TOKENS) <= kinds
    assert all(least >= 1 for found in FROM_TOKENS.values() for least in found.values())


def test_a_measurement_counts_from_the_largest_batch_downwards() -> None:
    found = GateMeasurement(differing={1: 0.0, 16: 0.25, 64: 0.0, 256: 0.0}, torch_varies={}, is_invariant=True)
    assert found.equal_tokens == (1, 64, 256)
    assert found.from_tokens == 64
    assert dataclasses.replace(found, differing={1: 0.0, 16: 0.25}).from_tokens is None


def test_measuring_compares_with_pytorchs_own_product_and_puts_the_precision_back() -> None:
    """On a CPU the gate is PyTorch's product, so every batch size is equal to it."""
    before = torch.get_float32_matmul_precision()
    weight_ED = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    for gate in (GateSpec(), GateSpec(tf32=True)):
        found = measure_gate(gate, weight_ED, [1, 16, 5])
        assert found.equal_tokens == (1, 5, 16)
        assert set(found.torch_varies) == {1, 5, 16}
        assert torch.get_float32_matmul_precision() == before
    with pytest.raises(ValueError, match=r"numbers of tokens expected, got \[\]"):
        measure_gate(GateSpec(), weight_ED, [])


def test_every_kind_of_arithmetic_is_some_gates() -> None:
    gates = (GateSpec(), GateSpec(tf32=True), GateSpec(operand_dtype=BF16), GateSpec(
        operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64
    ))  # fmt: skip
    assert {Arithmetic.of(gate) for gate in gates} == set(Arithmetic)
