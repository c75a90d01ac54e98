"""The kernels compile for a real GPU to what makes them fast: 16-byte vectors, products fused with their sums, nothing
spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weights.kernel_digest import DEFAULT_TILE, tile_for
from weights.spans import Form

HERE = Path(__file__).resolve().parent


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, int]]:
    """How often each machine instruction stands in each kernel."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent.parent), "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))}
    command = [sys.executable, str(HERE / "compile_kernels.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_spilled_to_local_memory(compiled: dict[str, dict[str, int]]) -> None:
    assert len(compiled) == 18
    spilling = [name for name, found in compiled.items() if any(op.startswith(("LDL", "STL")) for op in found)]
    assert spilling == []


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_aligned_spans_are_loaded_in_vectors_of_sixteen_bytes(compiled: dict[str, dict[str, int]], form: Form) -> None:
    tile = tile_for(form, True, DEFAULT_TILE)
    block_bytes = 4096 if form is Form.SAME else 8192
    digest = compiled[f"digest {form.name} aligned"]
    loaded = 2 * 4096 + tile.blocks * block_bytes  # the keys of both lanes, and a round of blocks
    assert digest["LDG.E.128"] == loaded // (16 * 32 * tile.warps)
    for name in (f"digest {form.name} aligned", f"copy {form.name} aligned", f"pack {form.name} aligned"):
        narrow = {op for op in compiled[name] if op.startswith(("LDG.E.U8", "LDG.E.U16", "STG.E.U8", "STG.E.U16"))}
        assert narrow == set(), name
    for name in (f"copy {form.name} aligned", f"pack {form.name} aligned"):
        assert compiled[name]["LDG.E.128"] >= 4
        assert compiled[name]["STG.E.128"] >= 4
        assert {op for op in compiled[name] if op.startswith("STG")} == {"STG.E.128"}


@pytest.mark.parametrize("form", list(Form), ids=lambda form: form.name)
def test_a_product_of_words_and_its_sum_are_one_instruction(compiled: dict[str, dict[str, int]], form: Form) -> None:
    tile = tile_for(form, True, DEFAULT_TILE)
    products = 2 * 512 * tile.blocks // (32 * tile.warps)  # of a thread, in both lanes
    found = compiled[f"digest {form.name} aligned"]
    assert products <= found["IMAD.WIDE"] <= products + 4
    assert found["REDG.E.ADD.64.STRONG.GPU"] == 2
