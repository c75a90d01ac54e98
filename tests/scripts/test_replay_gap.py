"""replay_gap.py: the same weights on both sides agree, other routers are replayed away, and no Ray is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from gap.rollout import SHAPES, Lengths, generate, hosted, random_model
from gap.scoring import Routing, gap, log_probability_figures
from replay_gap import main, parse, table

TINY = ["--shape", "tiny", "--device", "cpu", "--layers", "2", "--prompt-length", "5", "--answer-length", "7"]
TOLERANCE = 1e-5


def run(tmp_path: Path, dtype: str) -> dict[str, Any]:
    out = tmp_path / "results" / "gap.json"
    assert main([*TINY, "--dtype", dtype, "--tokens", "100", "--out", str(out), "--commit", "abc"]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_in_fp32_learner_and_engine_agree_with_every_gate_and_every_replay(tmp_path: Path) -> None:
    found = run(tmp_path, "float32")
    assert [(row["rollout_gate"], row["learner_gate"], row["routing"]) for row in found["rows"]] == [
        (*gates, str(routing))
        for gates in (("trainer", "its own"), ("fp32", "its own"), ("fp32", "ours, fp32"))
        for routing in Routing
    ]
    for row in found["rows"]:
        assert row["tokens"] == 15 * 7  # 100 tokens need 15 answers
        assert row["positions"] == 15 * 11
        assert row["decisions"] == 15 * 11 * 2
        assert row["logprob_abs_diff_mean"] <= row["logprob_abs_diff_p99"] <= row["logprob_abs_diff_max"] < TOLERANCE
        assert row["own_decisions_differing_share"] == 0
        assert row["weight_abs_diff_max"] < TOLERANCE
    assert found["commit"] == "abc"
    assert found["model"]["num_experts"] == SHAPES["tiny"]["num_experts"]


def test_in_bf16_there_is_a_gap_and_a_table_of_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(tmp_path, "bfloat16")
    assert all(TOLERANCE < row["logprob_abs_diff_mean"] < 0.1 for row in found["rows"])
    assert table(found["rows"]) in capsys.readouterr().out


def test_a_learner_with_other_routers_is_as_far_as_its_routing_is_its_own() -> None:
    model = random_model("tiny", layers=2, dtype=torch.float32, device=torch.device("cpu"), seed=1)
    completions = generate(hosted(model, "fp32"), Lengths(sequences=12, prompt=5, answer=7), seed=2)
    numbers = torch.Generator().manual_seed(3)
    for layer in model.model.layers:
        layer.mlp.gate.weight += 0.05 * torch.randn(layer.mlp.gate.weight.shape, generator=numbers)
    own, ids, both = (gap(model, completions, routing) for routing in Routing)
    assert own["logprob_abs_diff_mean"] > ids["logprob_abs_diff_mean"] > 10 * both["logprob_abs_diff_mean"]
    assert both["logprob_abs_diff_max"] < TOLERANCE
    assert both["own_decisions_differing_share"] > 0.1


def test_what_is_no_number_is_no_gap() -> None:
    with pytest.raises(ValueError, match="1 of 3 differences are not finite"):
        log_probability_figures(torch.tensor([0.0, float("nan"), 1.0]))


def test_the_estimate_of_the_divergence_is_positive_and_of_second_order() -> None:
    figures = log_probability_figures(torch.tensor([0.01, -0.01], dtype=torch.float64))
    assert figures["kl_estimate"] == pytest.approx(5e-5, rel=1e-2)


def test_sizes_below_one_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([*TINY, "--tokens", "0", "--out", "x", "--commit", "abc"])
    assert "--tokens: got 0, must be at least 1" in capsys.readouterr().err


def test_it_runs_where_there_is_no_ray() -> None:
    code = "import sys; sys.modules['ray'] = None; import replay_gap; print('imported')"
    root = Path(__file__).resolve().parent.parent.parent
    path = os.pathsep.join([str(root / "scripts"), str(root), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "imported"
