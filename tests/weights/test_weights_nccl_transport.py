"""The transport `nccl`, with real processes on gloo: killed, frozen, restarted in the midst of a stream."""

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fakes.weights_fleet import BUCKET_BYTES, learner_state
from fakes.weights_learner import Acting
from fakes.weights_processes import HostProcess, Process, assert_all, await_settled

from weights.errors import CommitIncomplete, UpdateAborted
from weights.publisher import Publisher
from weights.rendezvous import Roster, RosterHost, socket_path
from weights.transports.by_roster import transport_of

pytestmark = pytest.mark.processes

FLEET = "wired"
SILENCE_S = 5.0
DEADLINE_S = 3.0
Hosts = dict[str, HostProcess]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    """Two hosts in processes of their own."""
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", str(Path(path)))
        found = {host: host_process(host) for host in "ab"}
        for process in found.values():
            process.event("ready")
        yield found
        for process in found.values():
            process.end()


@pytest.fixture
def streamed(hosts: Hosts) -> Hosts:
    write_roster(shadow=False)
    return hosts


@pytest.fixture
def shadowed(hosts: Hosts) -> Hosts:
    write_roster(shadow=True)
    return hosts


def host_process(host: str) -> HostProcess:
    return HostProcess(FLEET, host, SILENCE_S, "nccl")


def write_roster(*, shadow: bool) -> None:
    Roster(
        name=FLEET,
        transport="nccl",
        backend="gloo",
        shadow=shadow,
        hosts=tuple(RosterHost(id=host, address=socket_path(FLEET, host)) for host in "ab"),
        bucket_bytes=BUCKET_BYTES,
        deadline_s=DEADLINE_S,
        silence_s=2 * DEADLINE_S,
    ).write()


def assert_good(hosts: Hosts, run: str, seed: int) -> str:
    """A learner that nothing happens to publishes to all."""
    with Publisher.connect(FLEET, run=run, deadline_s=10.0) as publisher:
        version = str(publisher.publish(learner_state(seed), 1).version)
    assert_all(hosts, serve=version, hold=seed)
    return version


@pytest.mark.parametrize("shadow", [False, True])
def test_several_updates_reach_every_host_over_one_wire(hosts: Hosts, shadow: bool) -> None:
    write_roster(shadow=shadow)
    with Publisher.connect(FLEET, run=f"several-{shadow}", deadline_s=10.0) as publisher:
        publisher.publish(learner_state(1), 1)
        before = {host: process.describe()["descriptors"] for host, process in hosts.items()}
        own = len(os.listdir("/proc/self/fd"))
        for step in range(2, 8):
            report = publisher.publish(learner_state(step), step)
            assert set(report.hosts) == {"a", "b"}
            assert_all(hosts, serve=str(report.version), hold=step)
        assert {host: process.describe()["descriptors"] for host, process in hosts.items()} == before
        assert len(os.listdir("/proc/self/fd")) == own


def test_a_host_that_was_restarted_between_two_updates_is_met_on_a_new_wire(streamed: Hosts) -> None:
    with Publisher.connect(FLEET, run="restart", deadline_s=10.0) as publisher:
        publisher.publish(learner_state(10), 1)
        streamed["b"].end()
        streamed["b"] = host_process("b")
        streamed["b"].event("ready")
        version = publisher.publish(learner_state(11), 2).version
    assert_all(streamed, serve=str(version), hold=11)


def broken(run: str, seed: int, before: tuple[str, int], act: Callable[[], None]) -> Exception:
    """What a publish ends with when `act` happens before its n-th message of a kind to b."""
    transport = Acting(transport_of(Roster.read(FLEET)), before, "b", act)
    publisher = Publisher(transport, run=run, deadline_s=DEADLINE_S, bucket_bytes=BUCKET_BYTES)
    with publisher, pytest.raises((CommitIncomplete, UpdateAborted)) as caught:
        publisher.publish(learner_state(seed), 1)
    return caught.value


@pytest.mark.parametrize("before", [("Deliver", 1), ("Deliver", 4), ("Finish", 1)])
def test_a_host_that_is_killed_in_the_midst_of_a_stream_is_named(streamed: Hosts, before: tuple[str, int]) -> None:
    assert_good(streamed, "before-the-kill", 20)
    try:
        error = broken("killed", 21, before, streamed["b"].end)
    finally:
        streamed["b"] = host_process("b")
        streamed["b"].event("ready")
    assert isinstance(error, CommitIncomplete)
    assert "b" in (error.torn | error.unknown)
    await_settled(streamed)
    left = streamed["a"].describe(20, 21)
    if left["serves"] == "None":
        assert left["state"] == "torn"
    else:  # it had everything, or nothing yet
        assert left["holds"] == [21 if before[0] == "Finish" else 20]
    assert_good(streamed, "after-the-kill", 22)


@pytest.mark.parametrize("before", [("Deliver", 4), ("Commit", 1)])
def test_a_host_that_is_frozen_in_the_midst_of_a_stream_costs_a_deadline(
    streamed: Hosts, before: tuple[str, int]
) -> None:
    old = assert_good(streamed, "before-the-frost", 30)
    try:
        error = broken("frozen", 31, before, streamed["b"].freeze)
        await_settled({"a": streamed["a"]})
        left = streamed["a"].describe(30, 31)
    finally:
        streamed["b"].popen.send_signal(signal.SIGCONT)
    if before[0] == "Deliver":
        assert isinstance(error, CommitIncomplete)
        assert (left["state"], left["serves"]) == ("torn", "None")
    else:
        assert isinstance(error, UpdateAborted)
        assert list(error.hosts) == ["b"]
        assert (left["serves"], left["holds"]) == (old, [30])
    await_settled(streamed)
    assert_good(streamed, "after-the-frost", 32)


@pytest.mark.parametrize(
    ("before", "host", "left", "way"),
    [
        (("Deliver", 1), "a", "old", signal.SIGKILL),
        (("Deliver", 3), "b", "torn", signal.SIGKILL),
        (("Deliver", 3), "b", "torn", signal.SIGSTOP),  # a waits on the wire, and b for a message
        (("Finish", 1), "a", "torn", signal.SIGKILL),
    ],
)
def test_a_learner_that_is_lost_in_the_midst_of_a_stream(
    streamed: Hosts, before: tuple[str, int], host: str, left: str, way: signal.Signals
) -> None:
    old = assert_good(streamed, "before-the-loss", 40)
    learner = Process("fakes.weights_learner", FLEET, "lost", "41", before[0], host, str(before[1]))
    try:
        assert learner.line() == "waiting"
        if way is signal.SIGSTOP:
            learner.freeze()
        else:
            learner.popen.send_signal(way)
        await_settled(streamed)
        for process in streamed.values():
            found = process.describe(40, 41)
            if left == "old":
                assert (found["state"], found["serves"], found["holds"]) == ("idle", old, [40])
            else:
                assert (found["state"], found["serves"]) == ("torn", "None")
        assert_good(streamed, "after-the-loss", 42)
    finally:
        learner.end()


@pytest.mark.parametrize(("host", "held"), [("a", 50), ("b", 51)])
def test_a_learner_that_is_killed_at_the_commit_of_a_shadowed_update_leaves_one_version(
    shadowed: Hosts, host: str, held: int
) -> None:
    assert_good(shadowed, "before-the-commit", 50)
    learner = Process("fakes.weights_learner", FLEET, "killed", "51", "Commit", host)
    try:
        assert learner.line() == "waiting"
    finally:
        learner.end()
    await_settled(shadowed)
    assert [process.describe(50, 51)["holds"] for process in shadowed.values()] == [[held], [held]]
    assert_good(shadowed, "after-the-commit", 52)
