"""The kernel compiles for a real GPU, to IEEE division, and to no fused multiply-add of its own."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from router_rows import BF16, make_spec, sigmoid_spec

from routing import GateSpec, GroupSpec, ReduceKind, RouterSpec, ScoreFunction, TopkReduce

HERE = Path(__file__).resolve().parent


def compiled(spec: RouterSpec, score: str, cache: Path, *, rows: str = "exact") -> set[str]:
    """The fp32 instructions in the kernel's PTX."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent.parent), "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(HERE / "compile_kernel.py"), json.dumps(spec.to_plain()), score, rows]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"\b([a-z0-9]+\.[a-z0-9.]*f32)\b", done.stdout))


@pytest.mark.parametrize(
    "spec",
    [
        make_spec(weight_dtype=BF16, gate=GateSpec(operand_dtype=BF16, output_dtype=BF16)),
        make_spec(num_experts=12, top_k=1, score=ScoreFunction.SQRT_SOFTPLUS, chain_dtype=BF16),
        sigmoid_spec(groups=GroupSpec(count=4, kept=2)),
        make_spec(top_k=3, score=ScoreFunction.SOFTMAX_TOPK, reduce=TopkReduce(kind=ReduceKind.SOFTMAX)),
    ],
    ids=["softmax", "sqrt_softplus", "sigmoid in groups", "softmax_topk"],
)
def test_divisions_and_roots_are_ieee(spec: RouterSpec, tmp_path: Path) -> None:
    instructions = compiled(spec, str(spec.score), tmp_path)
    assert {name for name in instructions if name.split(".")[0] in ("div", "sqrt", "rcp")} <= {
        "div.rn.f32",
        "sqrt.rn.f32",
    }
    assert "div.rn.f32" in instructions
    assert not {name for name in instructions if name.startswith(("add", "mul")) and "ftz" in name}


def test_without_an_exponential_nothing_is_fused_or_approximate(tmp_path: Path) -> None:
    spec = sigmoid_spec(num_experts=20, expert_scale=True)
    instructions = compiled(spec, "given", tmp_path)
    assert {"add.rn.f32", "mul.rn.f32", "div.rn.f32"} <= instructions
    assert not {name for name in instructions if name.startswith("fma") or "approx" in name or "ftz" in name}


@pytest.mark.parametrize(
    ("spec", "approximate"),
    [
        (make_spec(num_experts=128, top_k=8), set()),
        (sigmoid_spec(num_experts=160, top_k=8), {"rcp.approx.ftz.f32"}),
        (sigmoid_spec(num_experts=256, top_k=8, groups=GroupSpec(count=8, kept=4)), {"rcp.approx.ftz.f32"}),
        (make_spec(num_experts=64, top_k=6, has_bias=True), {"div.full.f32"}),
    ],
    ids=["softmax", "sigmoid", "groups", "softmax with a bias"],
)
def test_bounds_are_approximate_only_where_they_say_so(spec: RouterSpec, approximate: set[str], tmp_path: Path) -> None:
    instructions = compiled(spec, str(spec.score), tmp_path, rows="bounded")
    quotients = {name for name in instructions if name.split(".")[0] in ("div", "sqrt", "rcp")}
    assert quotients == {"div.rn.f32"} | approximate
