"""Every known way to get the kernel wrong changes a result somewhere in the corpus."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from mutations import MUTATIONS, Mutation, mutated

TESTS = Path(__file__).resolve().parent.parent


def wrong_rows(mutation: Mutation | None, spec: str, folder: Path, *, interpreted: bool) -> tuple[int, int, int]:
    """(rows, rows with wrong ids, rows with wrong weights)"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if interpreted:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(mutated(mutation, folder)), str(TESTS)])
    command = [sys.executable, "-W", "ignore", str(TESTS / "compare_rows.py"), spec]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    rows, ids, weights = json.loads(done.stdout)
    return rows, ids, weights


@pytest.mark.parametrize("spec", sorted({mutation.spec for mutation in MUTATIONS}))
def test_unedited_it_gets_no_row_wrong(spec: str, tmp_path: Path) -> None:
    rows, ids, weights = wrong_rows(None, spec, tmp_path, interpreted=True)
    assert (rows > 500, ids, weights) == (True, 0, 0)


@pytest.mark.parametrize("mutation", [m for m in MUTATIONS if not m.needs_gpu], ids=lambda m: m.name)
def test_each_edit_is_noticed(mutation: Mutation, tmp_path: Path) -> None:
    _rows, ids, weights = wrong_rows(mutation, mutation.spec, tmp_path, interpreted=True)
    assert ids + weights > 0


@pytest.mark.gpu
@pytest.mark.parametrize("mutation", [None, *MUTATIONS], ids=lambda m: "unedited" if m is None else m.name)
def test_on_a_gpu_each_edit_is_noticed(mutation: Mutation | None, tmp_path: Path) -> None:
    spec = "qwen3" if mutation is None else mutation.spec_on_gpu or mutation.spec
    _rows, ids, weights = wrong_rows(mutation, spec, tmp_path, interpreted=False)
    assert (ids + weights > 0) == (mutation is not None)
