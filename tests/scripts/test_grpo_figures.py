"""What a run ends with: figures, the verdict on them, a picture, and lines for the terminal."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from grpo.agreement import Agreement, Replayed
from grpo.figures import figures_of, misses
from grpo.plot import draw
from grpo.record import Record
from grpo.view import LiveView, PlainView, sparkline
from rich.console import Console

REQUIRED = {
    *("updates", "reward_first", "reward_last", "hosts", "tokens", "transport", "update_s_median", "pause_s_median"),
    *("versions_seen", "completions_across_commits", "tokens_compared", "logprob_abs_diff_max"),
    *("routing_decisions_compared", "routing_mismatches", "near_ties", "replay", "seconds"),
}


def record(update: int, reward: float, agreement: Agreement | None = None) -> Record:
    return Record(
        update=update,
        reward=reward,
        tokens=4096,
        generated=2048,
        seconds=0.5,
        hosts=frozenset({"host-0", "host-1"}),
        crossed=2,
        versions=frozenset({f"run@{update - 1}:aa"}),
        published=f"run@{update}:bb",
        update_s=update / 100,
        pause_s=(update / 1000, update / 1000),
        learn_s=0.1,
        staleness=0.5,
        masked_tokens=0,
        agreement=agreement or Agreement(tokens=2000, logprob_abs_diff_max=2e-6, decisions=4000, near_ties=1),
        example="ab -> abababab",
    )


def good_run() -> list[Record]:
    return [record(update, 0.1 + 0.02 * update) for update in range(1, 42)]


def test_the_figures_of_a_good_run() -> None:
    figures = figures_of(good_run(), family="qwen3_moe", transport="shared_memory", seconds=60.0)
    assert set(figures) >= REQUIRED
    assert json.loads(json.dumps(figures)) == figures
    assert figures["reward_first"] == pytest.approx(0.14)
    assert figures["reward_last"] == pytest.approx(0.90)
    assert figures["update_s_median"] == pytest.approx(0.21)
    assert figures["versions_seen"] == 41
    assert figures["completions_across_commits"] == 82
    assert misses(figures, hosts=2) == []


def replaying_run() -> list[Record]:
    replayed = Replayed(decisions=1000, differing=3, tokens=500, logprob_abs_diff_max=1e-6)
    return [replace(one, replayed=replayed) for one in good_run()]


def test_a_run_that_replays_tells_so_and_what_was_replayed() -> None:
    plain = figures_of(good_run(), family="qwen3_moe", transport="shared_memory", seconds=60.0)
    figures = figures_of(replaying_run(), family="qwen3_moe", transport="shared_memory", seconds=60.0)
    assert json.loads(json.dumps(figures)) == figures
    assert {name: value for name, value in figures.items() if plain.get(name) != value} == {
        "replay": True,
        "replay_decisions": 41_000,
        "replay_decisions_other_than_own": 123,
        "replay_tokens_compared": 20_500,
        "replay_logprob_abs_diff_max": 1e-6,
    }
    assert not plain["replay"]
    assert misses(figures, hosts=2) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("replay_decisions", 9999),
        ("replay_tokens_compared", 9999),
        ("replay_logprob_abs_diff_max", 1e-4),
        ("replay_logprob_abs_diff_max", math.nan),
    ],
)
def test_each_miss_of_a_replay_is_named(name: str, value: float) -> None:
    figures = figures_of(replaying_run(), family="qwen3_moe", transport="shared_memory", seconds=60.0)
    (line,) = misses(figures | {name: value}, hosts=2)
    assert line.startswith(f"{name} is ")


def test_a_run_without_updates_has_no_figures() -> None:
    with pytest.raises(ValueError, match="no update"):
        figures_of([], family="qwen3_moe", transport="shared_memory", seconds=1.0)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("updates", 29, "at least 30"),
        ("reward_first", 0.41, "at most 0.4"),
        ("reward_last", 0.79, "at least 0.8"),
        ("hosts", 1, "must be 2"),
        ("completions_across_commits", 19, "at least 20"),
        ("tokens_compared", 9999, "at least 10,000"),
        ("logprob_abs_diff_max", 1e-4, "below 1e-4"),
        ("logprob_abs_diff_max", math.inf, "below 1e-4"),
        ("logprob_abs_diff_max", math.nan, "below 1e-4"),
        ("routing_decisions_compared", 9999, "at least 10,000"),
        ("routing_mismatches", 1, "must be 0"),
        ("seconds", 301, "at most 300"),
    ],
)
def test_each_miss_is_named(name: str, value: float, words: str) -> None:
    figures = figures_of(good_run(), family="qwen3_moe", transport="shared_memory", seconds=60.0)
    (line,) = misses(figures | {name: value}, hosts=2)
    assert line.startswith(f"{name} is ")
    assert words in line


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    draw(good_run(), tmp_path / "plot.png", title="a run")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_plain_lines_tell_each_update_once() -> None:
    out = io.StringIO()
    with PlainView(Console(file=out, width=40)) as view:
        view.phase("training")
        for one in good_run():
            view.update(one)
    lines = out.getvalue().splitlines()
    assert len(lines) == 1 + 41
    assert "reward 0.120" in lines[1]
    assert "tokens/s 4096" in lines[1]
    assert "routing mismatches 0 of 4000" in lines[1]
    assert "replay" not in lines[1]


def test_a_line_tells_what_was_replayed() -> None:
    out = io.StringIO()
    with PlainView(Console(file=out)) as view:
        view.update(replaying_run()[0])
    assert "replay 3 of 1000 decisions not the learner's own, log-prob gap 1.0e-06 over 500 tokens" in out.getvalue()


def test_the_live_view_shows_the_last_update_and_the_runs_gaps() -> None:
    out = io.StringIO()
    with LiveView(Console(file=out, width=120, force_terminal=True), title="GRPO", updates=41) as view:
        view.phase("training")
        view.update(record(1, 0.25, Agreement(tokens=5, logprob_abs_diff_max=3e-5, decisions=7, mismatches=1)))
        view.update(record(2, 0.5))
    shown = out.getvalue()
    for text in ("0.500", "run@2:bb", "3.0e-05 over 2005 tokens", "1 of 4007", "2/41"):
        assert text in shown


def test_the_sparkline_spans_its_bars() -> None:
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
