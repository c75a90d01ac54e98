"""The gate compiles for a real GPU: fp32 to IEEE fused multiply-adds, the others to the tensor cores they name."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from routing import GateSpec

HERE = Path(__file__).resolve().parent
BF16, FP64 = torch.bfloat16, torch.float64


def compiled(gate: GateSpec, tokens: int, D: int, cache: Path) -> str:
    """The kernel's PTX."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent.parent), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(HERE / "compile_gate.py"), json.dumps(gate.to_plain()), str(tokens), str(D)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("tokens", "D"), [(1, 2048), (100, 2880), (65536, 2048)], ids=["lanes", "chunks", "whole"])
def test_fp32_is_fused_multiply_adds_and_sums_and_nothing_else(tokens: int, D: int, tmp_path: Path) -> None:
    ptx = compiled(GateSpec(), tokens, D, tmp_path)
    instructions = set(re.findall(r"\b([a-z][a-z0-9]*\.[a-z0-9.]*f32)\b", ptx))
    arithmetic = {name for name in instructions if name.split(".")[0] in ("fma", "mul", "add", "sub", "mad", "div")}
    assert arithmetic <= {"fma.rn.f32", "add.f32", "add.rn.f32"}
    assert "fma.rn.f32" in arithmetic
    assert "mma" not in ptx


@pytest.mark.parametrize(
    ("gate", "operands"),
    [
        (GateSpec(operand_dtype=BF16, output_dtype=BF16), "f32.bf16.bf16"),
        (GateSpec(tf32=True), "f32.tf32.tf32"),
        (GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64), "f64.f64.f64"),
    ],
    ids=["bf16", "tf32", "fp64"],
)
@pytest.mark.parametrize("tokens", [1, 65536])
def test_the_others_run_on_tensor_cores(gate: GateSpec, operands: str, tokens: int, tmp_path: Path) -> None:
    products = set(re.findall(r"mma[a-z_]*\.sync[a-z0-9_.]*", compiled(gate, tokens, 2048, tmp_path)))
    assert products
    assert all(operands in product for product in products)
