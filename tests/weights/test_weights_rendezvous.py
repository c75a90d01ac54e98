"""Rosters: found by name, whole or not at all, in a directory of one's own."""

import json
import os
import stat
from pathlib import Path

import pytest

from weights.errors import RosterError
from weights.rendezvous import Roster, RosterHost, runtime_directory, socket_path

ROSTER = Roster(
    name="grpo-run-7",
    transport="shared_memory",
    hosts=(RosterHost(id="a", address="/tmp/a.sock"), RosterHost(id="b", address="/tmp/b.sock")),
    bucket_bytes=8192,
    deadline_s=1.5,
    silence_s=9,
)


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    return tmp_path / "run"


def test_a_roster_reads_back_as_written(directory: Path) -> None:
    ROSTER.write()
    assert Roster.read("grpo-run-7") == ROSTER
    assert [path.name for path in directory.iterdir()] == ["grpo-run-7.roster.json"]
    ROSTER.remove()
    ROSTER.remove()
    assert list(directory.iterdir()) == []


def test_a_roster_that_is_written_again_is_replaced() -> None:
    ROSTER.write()
    fewer = Roster(name=ROSTER.name, transport=ROSTER.transport, hosts=ROSTER.hosts[:1])
    fewer.write()
    assert Roster.read(ROSTER.name) == fewer


def test_a_fleet_that_is_not_there_is_answered_with_those_that_are() -> None:
    ROSTER.write()
    with pytest.raises(RosterError, match=r"no fleet 'grpo' in .*there: grpo-run-7.*MOE_ROLLOUT_RUNTIME_DIR"):
        Roster.read("grpo")


@pytest.mark.parametrize(
    "change",
    [
        {"hosts": "a"},
        {"hosts": [["a"]]},
        {"hosts": [["a", "x"], ["a", "y"]]},
        {"bucket_bytes": 1},
        {"bucket_bytes": "4096"},
        {"deadline_s": 0},
        {"deadline_s": 10},
        {"silence_s": float("inf")},
        {"transport": "carrier pigeon"},
        {"name": "../up"},
    ],
)
def test_a_malformed_roster_is_refused(change: dict[str, object]) -> None:
    path = ROSTER.write()
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(RosterError, match="is no roster"):
        Roster.read(ROSTER.name)


@pytest.mark.parametrize("text", ["", "{", "[]", "null"])
def test_what_is_no_mapping_is_no_roster(text: str) -> None:
    ROSTER.write().write_text(text)
    with pytest.raises(RosterError, match="is no roster"):
        Roster.read(ROSTER.name)


@pytest.mark.parametrize("name", ["", "../up", "a/b", ".hidden", "a b", "x" * 65])
def test_a_name_that_would_leave_the_directory_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="is named by"):
        Roster.read(name)
    with pytest.raises(ValueError, match="is named by"):
        socket_path("fleet", name)


def test_the_directory_is_this_user_s_alone(directory: Path) -> None:
    assert runtime_directory() == directory
    assert stat.S_IMODE(directory.stat().st_mode) == 0o700
    directory.chmod(0o755)
    with pytest.raises(RosterError, match="mode 755, expected user"):
        runtime_directory()


def test_the_directory_follows_the_session_or_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOE_ROLLOUT_RUNTIME_DIR")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime_directory() == tmp_path / "moe-rollout"
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert runtime_directory() == tmp_path / f"moe-rollout-{os.getuid()}"


def test_a_path_too_long_for_a_socket_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / ("d" * 100)))
    with pytest.raises(RosterError, match="shorter directory"):
        socket_path("fleet", "a")
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path / "r"))
    assert socket_path("fleet", "a").endswith("r/fleet.a.sock")
