"""What dead fleets left in the runtime directory goes at the next launch; what living ones use stays."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from rollout.whereabouts import sweep_whereabouts
from weights.rendezvous import ABANDONED_S, Roster, RosterHost, sweep


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tmp_path.chmod(0o700)
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path))
    return tmp_path


@pytest.fixture
def dead_process() -> int:
    done = subprocess.Popen([sys.executable, "-c", ""])
    done.wait()
    return done.pid


def dead_socket(path: Path, *, old: bool = False) -> Path:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))
    if old:
        then = path.stat().st_mtime - 2 * ABANDONED_S
        os.utime(path, (then, then))
    return path


def roster(name: str, launcher: int | None, *doors: Path) -> Roster:
    hosts = tuple(RosterHost(id=f"host-{index}", address=str(door)) for index, door in enumerate(doors))
    return Roster(name=name, transport="shared_memory", hosts=hosts, launcher=launcher)


def test_a_dead_fleets_roster_goes_with_its_sockets(directory: Path, dead_process: int) -> None:
    roster("dead", dead_process, dead_socket(directory / "dead.host-0.sock")).write()
    roster("orphan", None, dead_socket(directory / "orphan.host-0.sock")).write()
    assert len(sweep()) == 4
    assert list(directory.iterdir()) == []


def test_a_fleet_whose_launcher_lives_keeps_what_a_dead_host_left(directory: Path) -> None:
    roster("living", os.getpid(), dead_socket(directory / "living.host-0.sock", old=True)).write()
    assert sweep() == ()
    assert Roster.read("living").launcher == os.getpid()


def test_a_fleet_one_of_whose_hosts_listens_stays(directory: Path, dead_process: int) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(directory / "detached.host-1.sock"))
        listening.listen()
        doors = (dead_socket(directory / "detached.host-0.sock"), directory / "detached.host-1.sock")
        roster("detached", dead_process, *doors).write()
        assert sweep() == ()


def test_a_socket_in_no_roster_goes_when_it_is_old_for_a_young_one_may_be_a_starting_hosts(directory: Path) -> None:
    dead_socket(directory / "old.host-0.sock", old=True)
    young = dead_socket(directory / "young.host-0.sock")
    assert sweep() == ("old.host-0.sock",)
    assert young.exists()


def test_a_full_disk_leaves_the_old_roster_and_no_rest(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = roster("fleet", None)
    before.write()

    def full(source: str, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        roster("fleet", os.getpid()).write()
    assert [path.name for path in directory.iterdir()] == ["fleet.roster.json"]
    assert Roster.read("fleet") == before


def test_the_whereabouts_of_a_dead_launcher_go(directory: Path, dead_process: int) -> None:
    for name, launcher in (("dead", dead_process), ("living", os.getpid())):
        (directory / f"{name}.fleet.json").write_text(json.dumps({"name": name, "launcher": launcher}))
    (directory / "strange.fleet.json").write_text("not ours")
    assert sweep_whereabouts() == ("dead.fleet.json",)
