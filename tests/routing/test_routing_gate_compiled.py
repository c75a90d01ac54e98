"""The gate compiles for a real GPU: fp32 to IEEE fused multiply-adds, the others to the tensor cores they name."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from routing import GateSpec

HERE = Path(__file__).resolve().parent
BF16, FP64 = torch.bfloat16, torch.float64
GATES = {
    "fp32": GateSpec(),
    "bf16": GateSpec(operand_dtype=BF16, output_dtype=BF16),
    "tf32": GateSpec(tf32=True),
    "fp64": GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64),
}
WALKS = {"lanes": (1, 2048), "chunks": (100, 2880), "whole": (65536, 2048)}
"""Of fp32: tokens whose tile walks so, and D."""
SIZES = ((1, 2048), (65536, 2048))
JOBS = (
    *(("fp32", *size) for size in WALKS.values()),
    *((name, *size) for name in ("bf16", "tf32", "fp64") for size in SIZES),
    *(("tf32", tokens, 1001) for tokens in (1, 1000, 65536)),
)
Ptx = Callable[[str, int, int], str]


@pytest.fixture(scope="module")
def ptx(tmp_path_factory: pytest.TempPathFactory) -> Ptx:
    """Name of a gate, tokens, D -> the kernel's PTX. All are compiled in one process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent.parent), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    jobs = json.dumps([(GATES[name].to_plain(), tokens, D) for name, tokens, D in JOBS])
    command = [sys.executable, str(HERE / "compile_gate.py"), jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found = dict(zip(JOBS, json.loads(done.stdout), strict=True))
    return lambda name, tokens, D: found[name, tokens, D]


@pytest.mark.parametrize("walk", WALKS)
def test_fp32_is_fused_multiply_adds_and_sums_and_nothing_else(walk: str, ptx: Ptx) -> None:
    text = ptx("fp32", *WALKS[walk])
    instructions = set(re.findall(r"\b([a-z][a-z0-9]*\.[a-z0-9.]*f32)\b", text))
    arithmetic = {name for name in instructions if name.split(".")[0] in ("fma", "mul", "add", "sub", "mad", "div")}
    assert arithmetic <= {"fma.rn.f32", "add.f32", "add.rn.f32"}
    assert "fma.rn.f32" in arithmetic
    assert "mma" not in text


def products(text: str) -> set[str]:
    """The tensor cores' instructions."""
    return set(re.findall(r"mma[a-z_]*\.sync[a-z0-9_.]*", text))


@pytest.mark.parametrize(
    ("name", "operands"), [("bf16", "f32.bf16.bf16"), ("tf32", "f32.tf32.tf32"), ("fp64", "f64.f64.f64")]
)
@pytest.mark.parametrize("size", SIZES)
def test_the_others_run_on_tensor_cores(name: str, operands: str, size: tuple[int, int], ptx: Ptx) -> None:
    found = products(ptx(name, *size))
    assert found
    assert all(operands in product for product in found)


@pytest.mark.parametrize("size", [job[1:] for job in JOBS if job[0] == "tf32"])
def test_tf32_keeps_to_the_warp_groups_instruction(size: tuple[int, int], ptx: Ptx) -> None:
    """One warp's instruction adds in another order; an odd D must not fall back to it."""
    found = products(ptx("tf32", *size))
    assert found
    assert all(product.startswith("mma_async.") for product in found)
