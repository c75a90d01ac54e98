"""Who is taken out, started again, brought to which version, and let in: without Ray, processes or time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rollout.actor import Outcome
from rollout.balance import Rotation
from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded
from rollout.introduction import Introduction
from rollout.member import Stage
from rollout.status import HostStatus
from rollout.supervisor import BEHIND_LOOKS, WATCH_S, Supervisor
from weights.digest import Digest
from weights.rendezvous import Roster
from weights.version import WeightVersion

CHECKPOINT = WeightVersion(run="checkpoint", step=0, digest=Digest(1, 1))
FIRST = WeightVersion(run="learner", step=1, digest=Digest(2, 2))
SECOND = WeightVersion(run="learner", step=2, digest=Digest(3, 3))


@dataclass(eq=False)
class FakeHost:
    """An actor whose answers are as told."""

    host_id: str
    incarnation: int
    hold: bool
    world: "World"
    version: WeightVersion | None = CHECKPOINT
    state: str = "idle"
    alive: bool = True
    frozen: bool = False
    broken: str = ""
    ended: bool = False
    admitted: bool = False
    shared: list[str] = field(default_factory=list)

    def answer(self, method: str, *args: Any) -> Outcome | None:
        if not self.alive:
            return Outcome(error="its process ended", gone=True)
        if self.frozen:
            return None
        if method == "start":
            if self.broken:
                return Outcome(error=self.broken, raised=ValueError(self.broken))
            self.version = None if self.hold else CHECKPOINT
            return Outcome(value=introduction(self))
        if method == "share":
            if self.world.sharing:
                return None
            if self.world.unshared:
                return Outcome(error=self.world.unshared)
            self.world.host(args[0]).version, self.world.host(args[0]).state = self.version, "idle"
            self.shared.append(args[0])
        if method == "admit":
            self.admitted = True
        return Outcome(value=self.status())

    def status(self) -> HostStatus:
        return HostStatus(
            host_id=self.host_id,
            state=self.state,
            version=None if self.state == "torn" else self.version,
            running=0,
            waiting=0,
            process=1,
            blocks_free=1,
            blocks=1,
            detail="why it is",
        )


def introduction(host: FakeHost) -> Introduction:
    config = host.world.config
    return Introduction(
        host_id=host.host_id,
        config=config,
        version=host.version,
        address=f"/run/{host.host_id}",
        process=1,
        machine="m",
    )


class FakeCall:
    def __init__(self, host: FakeHost, method: str, *args: Any) -> None:
        self._asked = (host, method, args)

    def outcome(self) -> Outcome | None:
        host, method, args = self._asked
        return host.answer(method, *args)


class World:
    """Ray, a clock, and three hosts."""

    def __init__(self, **fields: Any) -> None:
        self.config = RolloutConfig.from_mapping({"name": "fleet", "model": "m", "hosts": 3} | fields)
        self.now_s = 0.0
        self.placed: list[FakeHost] = []
        self.unshared = ""
        self.sharing = False
        """A host that shares is not done yet."""
        self.broken = ""
        self.asked_again = 0
        self.rotation = Rotation()
        self.supervisor = Supervisor(
            self.config, self, self.rotation, nobody_shares=self.publish_again, clock=lambda: self.now_s
        )
        self.supervisor.start_all()
        self.supervisor.await_all()
        self.look()

    def place(self, host_id: str, incarnation: int, hold: bool) -> FakeHost:
        self.placed.append(FakeHost(host_id, incarnation, hold, self, broken=self.broken))
        return self.placed[-1]

    def call(self, actor: FakeHost, method: str, *args: Any) -> FakeCall:
        call = FakeCall(actor, method, *args)
        if method == "admit":
            call.outcome()
        return call

    def end(self, actor: FakeHost, introduction: Introduction | None) -> None:
        actor.alive, actor.ended = False, True

    def publish_again(self) -> None:
        self.asked_again += 1

    def host(self, host_id: str) -> FakeHost:
        return next(host for host in reversed(self.placed) if host.host_id == host_id)

    def look(self, times: int = 1) -> None:
        for _ in range(times):
            self.now_s += WATCH_S
            self.supervisor.tick()

    def publish(self, version: WeightVersion, *hosts: str) -> None:
        for host_id in hosts or ("host-0", "host-1", "host-2"):
            self.host(host_id).version = version

    def stage(self, host_id: str) -> Stage:
        return self.supervisor.members[host_id].stage

    @property
    def roster(self) -> list[str]:
        return [host.id for host in Roster.read("fleet").hosts]


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(tmp_path))
    return


@pytest.fixture
def world(runtime: None) -> World:
    return World()


ALL = ["host-0", "host-1", "host-2"]


def test_all_hosts_serve_after_the_launch(world: World) -> None:
    assert world.roster == list(world.rotation.hosts()) == ALL
    assert all(host.admitted for host in world.placed)
    assert world.supervisor.current == CHECKPOINT


def test_a_dead_host_leaves_roster_and_rotation_at_once_and_comes_back_with_a_siblings_weights(world: World) -> None:
    world.publish(FIRST)
    world.look()
    world.host("host-1").alive = False
    world.look()
    assert world.roster == list(world.rotation.hosts()) == ["host-0", "host-2"]
    assert world.stage("host-1") is Stage.DOWN
    world.look()
    again = world.host("host-1")
    assert (again.incarnation, again.hold) == (1, True)
    while not again.admitted:
        assert "host-1" not in world.rotation.hosts()
        world.look()
    assert again.version == FIRST
    assert world.host("host-0").shared == ["host-1"]
    assert world.roster == list(world.rotation.hosts()) == ALL
    assert world.rotation.hosts()["host-1"] is again


def test_an_update_that_lands_meanwhile_is_shared_too_before_the_host_is_let_in(world: World) -> None:
    world.publish(FIRST)
    world.look()
    world.host("host-1").alive = False
    while not world.host("host-0").shared:
        world.look()
    world.publish(SECOND, "host-0", "host-2")
    while not world.host("host-1").admitted:
        assert "host-1" not in world.rotation.hosts()
        world.look()
    assert world.host("host-1").version == SECOND
    shared = [*world.host("host-0").shared, *world.host("host-2").shared]
    assert shared == ["host-1", "host-1"]


def test_before_any_update_the_checkpoint_is_the_fleets_version(world: World) -> None:
    world.host("host-2").alive = False
    world.look(5)
    assert not world.host("host-2").hold
    assert world.stage("host-2") is Stage.SERVING
    assert [host.shared for host in world.placed] == [[]] * 4


def test_without_a_sibling_it_holds_in_the_roster_until_an_update(world: World) -> None:
    world.publish(FIRST)
    world.look()
    for host_id in ALL:
        world.host(host_id).alive = False
    world.look(4)
    assert {world.stage(host_id) for host_id in ALL} == {Stage.HOLDING}
    assert world.roster == ALL
    assert world.rotation.hosts() == {}
    assert world.asked_again == 3
    world.publish(SECOND)
    world.look(2)
    assert list(world.rotation.hosts()) == ALL
    assert world.supervisor.current == SECOND


def test_a_frozen_host_is_ended_at_its_deadline(world: World) -> None:
    frozen = world.host("host-0")
    frozen.frozen = True
    world.look(int(world.config.deadlines.answer_s / WATCH_S) - 1)
    assert not frozen.ended
    world.look(3)
    assert frozen.ended
    assert "waited 30 s for it to say how it is" in world.supervisor.incidents[0].what


def test_a_launcher_that_stood_still_blames_nobody(world: World) -> None:
    world.host("host-0").frozen = True
    world.look()
    world.now_s += 1000
    world.look()
    assert not world.host("host-0").ended
    world.host("host-0").frozen = False
    world.look()
    assert list(world.supervisor.incidents) == []


def test_a_torn_host_is_healed_by_a_sibling_and_never_leaves_the_roster(world: World) -> None:
    world.publish(FIRST)
    world.look(2)
    torn = world.host("host-2")
    torn.state = "torn"
    world.look(2)
    assert "host-2" not in world.rotation.hosts()
    assert "host-2" in world.roster
    world.look(3)
    assert torn.version == FIRST
    assert torn.admitted
    assert not torn.ended
    assert "host-2" in world.rotation.hosts()


def test_a_torn_host_takes_no_work_is_healed_by_an_update_and_started_again_without_one(world: World) -> None:
    world.unshared = "has a publisher already"
    torn = world.host("host-2")
    torn.state = "torn"
    world.look()
    assert list(world.rotation.hosts()) == ["host-0", "host-1"]
    assert world.roster == ALL, "the next update may heal it"
    torn.state, torn.version = "idle", CHECKPOINT
    world.look()
    assert list(world.rotation.hosts()) == ALL
    torn.state = "torn"
    world.look(int(world.config.deadlines.torn_s / WATCH_S) - 1)
    assert not torn.ended
    world.look(8)
    assert torn.ended
    assert world.stage("host-2") is Stage.SERVING


def test_a_torn_host_is_not_ended_while_a_sibling_shares(world: World) -> None:
    world.publish(FIRST)
    world.look(2)
    world.sharing = True
    torn = world.host("host-2")
    torn.state = "torn"
    world.look(2 * int(world.config.deadlines.torn_s / WATCH_S))
    assert not torn.ended
    assert world.stage("host-2") is Stage.SERVING
    world.sharing = False
    world.look(2)
    assert (torn.version, torn.ended) == (FIRST, False)
    assert "host-2" in world.rotation.hosts()


def test_a_share_that_fails_in_the_same_way_again_is_reported_once(world: World) -> None:
    def reports(reason: str) -> int:
        return sum(f"a sibling could not share: {reason}" in incident.what for incident in world.supervisor.incidents)

    world.unshared = "has a publisher already"
    torn = world.host("host-2")
    torn.state = "torn"
    world.look(int(world.config.deadlines.torn_s / WATCH_S) // 2)
    assert reports("has a publisher already") == 1
    world.unshared = "it changed while it was read"
    world.look(int(world.config.deadlines.torn_s / WATCH_S) // 3)
    assert reports("has a publisher already") == reports("it changed while it was read") == 1
    assert not torn.ended


def test_a_failed_engine_is_started_again(world: World) -> None:
    world.host("host-0").state = "failed"
    world.look()
    assert world.supervisor.incidents[0].what.startswith("its engine stopped: why it is")
    world.look(5)
    assert world.stage("host-0") is Stage.SERVING


def test_a_host_left_behind_by_its_siblings_is_brought_to_their_version_without_a_restart(world: World) -> None:
    world.publish(FIRST, "host-0", "host-1")
    world.look(BEHIND_LOOKS)
    assert world.stage("host-2") is Stage.SERVING, "an update under way reaches hosts one by one"
    world.look(8)
    assert world.host("host-2").version == FIRST
    assert world.stage("host-2") is Stage.SERVING
    assert world.host("host-2").incarnation == 0


def test_a_host_that_keeps_dying_is_left_out(runtime: None) -> None:
    world = World(restarts=2)
    for _ in range(3):
        world.host("host-1").alive = False
        world.look(8)
    assert world.stage("host-1") is Stage.LEFT_OUT
    assert (
        "is left out: was started again 2 times within an hour, of 2 (restarts)" in world.supervisor.incidents[-1].what
    )
    assert world.roster == ["host-0", "host-2"]
    placed = len(world.placed)
    world.look(50)
    assert len(world.placed) == placed


def test_starts_that_fail_are_spaced_out(runtime: None) -> None:
    world = World(restarts=1000)
    world.broken = "no checkpoint"
    world.host("host-1").alive = False
    world.look(int(60 / WATCH_S))
    starts = len(world.placed) - 3
    assert 5 <= starts <= 8  # at 0, 1, 3, 7, 15, 31 s
    assert "could not start: no checkpoint" in world.supervisor.absence()


def test_sharing_that_fails_is_tried_again(world: World) -> None:
    world.publish(FIRST)
    world.look()
    world.unshared = "UpdateAborted: it changed while it was read"
    world.host("host-1").alive = False
    world.look(10)
    assert world.stage("host-1") is Stage.JOINING
    assert "it changed while it was read" in world.supervisor.absence()
    world.unshared = ""
    world.look(8)
    assert world.host("host-1").admitted


def test_a_host_that_cannot_start_at_the_launch_ends_it(runtime: None) -> None:
    with pytest.raises(ValueError, match="must be"):
        RolloutConfig.from_mapping({"name": "fleet", "model": "m", "restarts": -1})
    world = World()
    world.supervisor.members["host-0"].actor.broken = "wrong"
    world.broken = "wrong"
    world.supervisor.start_all()
    with pytest.raises(ValueError, match="wrong"):
        world.supervisor.await_all()


def test_no_host_within_the_deadline_says_where_they_are(runtime: None) -> None:
    world = World(restarts=0)
    for host_id in ALL:
        world.host(host_id).alive = False
    world.look()
    with pytest.raises(DeadlineExceeded, match=r"a host that takes work; host-0 is left out \(its process ended\)"):
        world.rotation.place([1], 0.01, world.supervisor.absence)


def test_a_roster_that_cannot_be_written_is_written_when_it_can(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = Roster.write

    def no_space(roster: Roster) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Roster, "write", no_space)
    world.broken = "not yet"
    world.host("host-0").alive = False
    world.look()
    assert world.roster == ALL
    monkeypatch.setattr(Roster, "write", full)
    world.look()
    assert world.roster == ["host-1", "host-2"]
