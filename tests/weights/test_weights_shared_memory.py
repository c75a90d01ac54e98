"""The transport between processes, with real ones: killed, frozen, restarted, and many updates long."""

import os
import resource
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from fakes.weights_fleet import BUCKET_BYTES, FakeHost, learner_state, offer_of
from fakes.weights_processes import PATIENCE_S, HostProcess, Process, assert_all, await_settled
from torch import Tensor

from weights.codec import decode, encode
from weights.errors import (
    CommitIncomplete,
    DeadlineExceeded,
    MessageError,
    PeerGone,
    RosterError,
    TransportError,
    UpdateAborted,
)
from weights.manifest import Manifest
from weights.messages import PROTOCOL, Ask, Hello, Refused, Stage, Welcome
from weights.publisher import Publisher
from weights.rendezvous import Roster, RosterHost, socket_path
from weights.state import Intent, State
from weights.transports.segment import SharedSegment, map_segment
from weights.transports.server import HostServer
from weights.transports.shared_memory import OneHost, SocketSibling, open_stream
from weights.transports.stream import FrameStream
from weights.version import WeightVersion

FLEET = "fleet"
SILENCE_S = 4.0


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as path, pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOE_ROLLOUT_RUNTIME_DIR", path)
        yield Path(path)


@pytest.fixture(scope="module")
def fleet(directory: Path) -> Iterator[dict[str, HostProcess]]:
    """Two hosts in processes of their own, and their roster."""
    Roster(
        name=FLEET,
        transport="shared_memory",
        hosts=tuple(RosterHost(id=host, address=socket_path(FLEET, host)) for host in "ab"),
        bucket_bytes=BUCKET_BYTES,
        deadline_s=PATIENCE_S,
        silence_s=2 * PATIENCE_S,
    ).write()
    hosts = {host: HostProcess(FLEET, host, SILENCE_S) for host in "ab"}
    for process in hosts.values():
        process.event("ready")
    yield hosts
    for process in hosts.values():
        process.end()


def test_three_updates_reach_every_host(fleet: dict[str, HostProcess]) -> None:
    with Publisher.connect(FLEET, run="three") as publisher:
        for step in (1, 2, 3):
            report = publisher.publish(learner_state(step), step)
            assert set(report.hosts) == {"a", "b"}
            assert set(report.phases) == {"gather", "offer", "stage", "vote", "commit"}
            assert sum(report.phases.values()) == pytest.approx(report.seconds)
            assert_all(fleet, serve=str(report.version), hold=step)


def test_descriptors_mappings_and_memory_do_not_grow(fleet: dict[str, HostProcess]) -> None:
    with Publisher.connect(FLEET, run="twenty") as publisher:
        for step in range(3):
            publisher.publish(learner_state(step), step)
        before = {host: process.describe() for host, process in fleet.items()}
        own = len(os.listdir("/proc/self/fd"))
        for step in range(3, 23):
            publisher.publish(learner_state(step), step)
        assert len(os.listdir("/proc/self/fd")) == own
        for host, process in fleet.items():
            after = process.describe()
            assert after["mapped"] == before[host]["mapped"] == 0
            assert after["descriptors"] == before[host]["descriptors"]
            assert after["resident_kib"] < before[host]["resident_kib"] + 4096


def test_a_second_publisher_is_turned_away_while_the_first_is_connected(fleet: dict[str, HostProcess]) -> None:
    with Publisher.connect(FLEET, run="first") as first:
        with pytest.raises(UpdateAborted, match="has a publisher already, first") as caught:
            Publisher.connect(FLEET, run="second")
        assert set(caught.value.hosts) == {"a", "b"}
        first.publish(learner_state(1), 1)  # unharmed
    with Publisher.connect(FLEET, run="third") as third:
        third.publish(learner_state(2), 1)


@pytest.mark.parametrize(("before", "to", "expected"), [("Commit", "a", "old"), ("Commit", "b", "new")])
def test_a_learner_killed_at_the_commit_leaves_one_version_everywhere(
    fleet: dict[str, HostProcess], before: str, to: str, expected: str
) -> None:
    with Publisher.connect(FLEET, run=f"before-{expected}") as publisher:
        old = publisher.publish(learner_state(10), 1).version
    learner = Process("fakes.weights_learner", FLEET, f"killed-{expected}", "11", before, to)
    assert learner.line() == "waiting"
    learner.end()
    await_settled(fleet)
    if expected == "old":
        assert_all(fleet, serve=str(old), hold=10)
    else:
        new = [process.describe(11) for process in fleet.values()]
        assert [found["holds"] for found in new] == [[11], [11]]
        assert new[0]["serves"] == new[1]["serves"] != str(old)
    with Publisher.connect(FLEET, run=f"after-{expected}") as publisher:
        version = publisher.publish(learner_state(12), 1).version
    assert_all(fleet, serve=str(version), hold=12)


def test_hosts_settle_under_a_frozen_learner_at_their_deadline(fleet: dict[str, HostProcess]) -> None:
    with Publisher.connect(FLEET, run="before-frozen") as publisher:
        old = publisher.publish(learner_state(20), 1).version
    learner = Process("fakes.weights_learner", FLEET, "frozen", "21", "Commit", "a")
    assert learner.line() == "waiting"
    learner.freeze()
    await_settled(fleet)  # after SILENCE_S, by whichever host's clock runs out first
    assert_all(fleet, serve=str(old), hold=20)
    with Publisher.connect(FLEET, run="after-frozen") as publisher:  # the frozen one no longer counts as connected
        publisher.publish(learner_state(22), 1)
    learner.end()


def test_a_frozen_host_hits_the_deadline_and_is_named(fleet: dict[str, HostProcess]) -> None:
    with Publisher.connect(FLEET, run="host-frozen", deadline_s=3.0) as publisher:
        old = publisher.publish(learner_state(30), 1).version
        fleet["b"].freeze()
        try:
            began = time.monotonic()
            with pytest.raises(UpdateAborted, match=r"b sent 0 of 28 bytes of a frame within 3.0 s") as caught:
                publisher.publish(learner_state(31), 2)
            assert time.monotonic() - began < PATIENCE_S / 2
        finally:
            fleet["b"].popen.send_signal(signal.SIGCONT)  # the tests to come use it
        assert list(caught.value.hosts) == ["b"]
        assert_all(fleet, serve=str(old), hold=30)
    with Publisher.connect(FLEET, run="host-thawed") as publisher:
        version = publisher.publish(learner_state(32), 3).version
    assert_all(fleet, serve=str(version), hold=32)


def test_a_restarted_host_is_found_again(fleet: dict[str, HostProcess]) -> None:
    with Publisher.connect(FLEET, run="restart") as publisher:
        publisher.publish(learner_state(40), 1)
        fleet["b"].end()
        with pytest.raises(UpdateAborted, match="cannot connect to b") as caught:
            publisher.publish(learner_state(41), 2)
        assert list(caught.value.hosts) == ["b"]
        fleet["b"] = HostProcess(FLEET, "b", SILENCE_S)  # on the path where the killed one left its socket
        fleet["b"].event("ready")
        version = publisher.publish(learner_state(42), 3).version
    assert_all(fleet, serve=str(version), hold=42)


def test_a_fleet_that_is_not_there_is_named_with_those_that_are(fleet: dict[str, HostProcess]) -> None:
    with pytest.raises(RosterError, match=r"no fleet 'other' .*there: fleet"):
        Publisher.connect("other")


@pytest.fixture
def served(directory: Path) -> Iterator[tuple[FakeHost, RosterHost]]:
    """A host in this process, behind a real socket."""
    host = FakeHost("solo", clock=time.monotonic)
    address = RosterHost(id="solo", address=socket_path("solo", "solo"))
    with HostServer(host.receiver, address.address, tuple, deadline_s=5.0, takeover_s=0.1):
        yield host, address
    assert not os.path.exists(address.address)


def greet(address: RosterHost) -> FrameStream:
    stream = open_stream(address, 5.0)
    stream.send(encode(Hello(sequence=1, protocol=PROTOCOL, publisher="test")), None, 5.0)
    assert isinstance(decode(stream.receive(5.0)[0]), Welcome)
    return stream


@pytest.mark.parametrize("greeted", [False, True])
@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"MoRW" + b"\xff" * 24,
        encode(Refused(sequence=1, update="", state=State.IDLE, reason="a reply is no request")),
    ],
    ids=["http", "length", "reply"],
)
def test_garbage_ends_its_connection_and_harms_nobody(
    served: tuple[FakeHost, RosterHost], garbage: bytes, greeted: bool
) -> None:
    host, address = served
    stream = greet(address) if greeted else open_stream(address, 5.0)
    stream.send(garbage, None, 5.0)
    if greeted:
        reply = decode(stream.receive(5.0)[0])
        assert isinstance(reply, Refused)
        assert reply.sequence == 0
        assert "could not read a message" in reply.reason
    with pytest.raises((TransportError, MessageError)):
        stream.receive(5.0)
    stream.close()
    greet(address).close()
    assert host.serving.serves == host.initial


def test_a_frame_cut_by_the_end_of_its_connection_aborts_the_update(served: tuple[FakeHost, RosterHost]) -> None:
    host, address = served
    stream = greet(address)
    stream.send(encode(Stage(sequence=2, update="u", bucket=0))[:40], None, 5.0)
    stream.close()
    greet(address).close()
    assert host.receiver.state is State.IDLE


@pytest.mark.parametrize("kind", ["file", "unsealed"])
def test_only_sealed_segments_are_mapped(served: tuple[FakeHost, RosterHost], kind: str) -> None:
    host, address = served
    open_before = len(os.listdir("/proc/self/fd"))
    stream = greet(address)
    if kind == "file":
        descriptor = os.open("/dev/null", os.O_RDONLY)
    else:
        descriptor = os.memfd_create("unsealed", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(descriptor, 4096)
    stream.send(encode(Stage(sequence=2, update="u", bucket=0)), descriptor, 5.0)
    os.close(descriptor)
    reply = decode(stream.receive(5.0)[0])
    assert isinstance(reply, Refused)
    assert "a segment is" in reply.reason
    with pytest.raises(TransportError):
        stream.receive(5.0)
    stream.close()
    greet(address).close()  # the host has let go of the last connection, and of all that came with it
    assert host.receiver.state is State.IDLE
    assert len(os.listdir("/proc/self/fd")) <= open_before + 2


def test_a_living_host_keeps_its_socket(served: tuple[FakeHost, RosterHost]) -> None:
    host, address = served
    with pytest.raises(TransportError, match="a living host listens"):
        HostServer(host.receiver, address.address, tuple, deadline_s=1.0)


def test_a_connection_must_begin_with_a_greeting(served: tuple[FakeHost, RosterHost]) -> None:
    _, address = served
    stream = open_stream(address, 5.0)
    stream.send(encode(Stage(sequence=1, update="u", bucket=0)), None, 5.0)
    reply = decode(stream.receive(5.0)[0])
    assert isinstance(reply, Refused)
    assert "begins with Hello or Ask, got Stage" in reply.reason
    stream.close()


@contextmanager
def fleet_here(name: str, host: FakeHost) -> Iterator[RosterHost]:
    """A host in this process, behind a real socket and in a roster."""
    listed = RosterHost(id=host.receiver.host, address=socket_path(name, host.receiver.host))
    Roster(
        name=name,
        transport="shared_memory",
        hosts=(listed,),
        bucket_bytes=BUCKET_BYTES,
        deadline_s=PATIENCE_S,
        silence_s=2 * PATIENCE_S,
    ).write()
    with HostServer(host.receiver, listed.address, tuple, deadline_s=20.0, takeover_s=0.1):
        yield listed


def sibling_of(host: RosterHost) -> Publisher:
    """As a host makes one that shares the learner's update with another."""
    return Publisher(OneHost(host), run="learner", deadline_s=PATIENCE_S, bucket_bytes=BUCKET_BYTES, is_sibling=True)


def test_a_torn_host_is_healed_by_a_learner_that_gathers_for_longer_than_it_waits(directory: Path) -> None:
    host = FakeHost("slow", silence_s=1.0, clock=time.monotonic, torn=True)

    def slowly() -> Iterator[tuple[str, Tensor]]:
        ends_at = time.monotonic() + PATIENCE_S
        while (host.receiver.silence_left_s or 0.0) > -0.3:
            assert time.monotonic() < ends_at
            time.sleep(0.02)
        yield from learner_state(1).items()

    with fleet_here("slow", host), Publisher.connect("slow") as publisher:
        version = publisher.publish(slowly(), 1).version
    assert host.serving.serves == version
    assert host.holds(learner_state(1))


def test_a_torn_host_takes_a_siblings_weights_while_its_learner_is_well_and_quiet(directory: Path) -> None:
    host = FakeHost("torn", silence_s=PATIENCE_S, clock=time.monotonic)
    committed = host.serving.committed

    def failing(version: WeightVersion) -> None:
        raise RuntimeError("the engine did not take it")

    with fleet_here("torn", host) as listed, Publisher.connect("torn", run="learner") as learner:
        first = learner.publish(learner_state(1), 1).version
        host.serving.committed = failing  # type: ignore[method-assign]
        with pytest.raises(CommitIncomplete, match="the engine did not take it"):
            learner.publish(learner_state(2), 2)
        host.serving.committed = committed  # type: ignore[method-assign]
        assert host.receiver.state is State.TORN
        with sibling_of(listed) as sibling:
            assert sibling.publish(learner_state(1).items(), 1, digest=first.digest).version == first
        assert host.serving.serves == first
        assert host.holds(learner_state(1))
        learner.publish(learner_state(3), 3)
        assert host.holds(learner_state(3))


def test_a_learner_that_comes_while_a_sibling_shares_waits_for_it(directory: Path) -> None:
    host = FakeHost("shared", silence_s=PATIENCE_S, clock=time.monotonic, torn=True)
    shares, go = threading.Event(), threading.Event()

    def slowly() -> Iterator[tuple[str, Tensor]]:
        shares.set()
        assert go.wait(PATIENCE_S)
        yield from learner_state(1).items()

    def share(listed: RosterHost) -> None:
        with sibling_of(listed) as sibling:
            sibling.publish(slowly(), 1)

    with fleet_here("shared", host) as listed, ExitStack() as stack:
        sharing = threading.Thread(target=share, args=(listed,))
        sharing.start()
        stack.callback(sharing.join)
        stack.callback(go.set)
        assert shares.wait(PATIENCE_S)
        later = threading.Timer(0.5, go.set)  # long after a learner that does not wait is turned away
        later.start()
        stack.callback(later.join)
        with Publisher.connect("shared", run="learner") as learner:
            assert host.holds(learner_state(1))
            learner.publish(learner_state(2), 2)
    assert host.holds(learner_state(2))


def test_closing_a_server_waits_for_the_commit_under_way(directory: Path) -> None:
    host = FakeHost("last", clock=time.monotonic)
    Roster(
        name="closing",
        transport="shared_memory",
        hosts=(RosterHost(id="last", address=socket_path("closing", "last")),),
        bucket_bytes=BUCKET_BYTES,
        deadline_s=20.0,
        silence_s=40.0,
    ).write()
    host.serving.may_write.clear()
    server = HostServer(host.receiver, socket_path("closing", "last"), tuple, deadline_s=5.0)
    publisher = Publisher.connect("closing")

    def publish() -> None:
        with suppress(CommitIncomplete):  # the reply may or may not get out before the connection ends
            publisher.publish(learner_state(1), 1)

    learner = threading.Thread(target=publish)
    learner.start()
    assert host.serving.in_pause.wait(PATIENCE_S)
    closing = threading.Thread(target=server.close)
    closing.start()
    host.serving.may_write.set()
    closing.join()
    learner.join()
    publisher.close()
    assert host.holds(learner_state(1))
    assert host.receiver.version == host.serving.serves != host.initial


def test_a_server_that_cannot_close_in_time_says_what_it_waits_for(directory: Path) -> None:
    host = FakeHost("stuck", clock=time.monotonic)
    path = socket_path("stuck", "stuck")
    server = HostServer(host.receiver, path, tuple, deadline_s=PATIENCE_S)
    listed = RosterHost(id="stuck", address=path)
    Roster(name="stuck", transport="shared_memory", hosts=(listed,), bucket_bytes=BUCKET_BYTES).write()
    host.serving.may_write.clear()

    def publish() -> None:
        with Publisher.connect("stuck") as publisher, suppress(CommitIncomplete):
            publisher.publish(learner_state(1), 1)

    learner = threading.Thread(target=publish)
    learner.start()
    assert host.serving.in_pause.wait(PATIENCE_S)
    with pytest.raises(DeadlineExceeded, match=r"stuck \(update: \w+\) still runs.*weights of stuck, a peer"):
        server.close(0.05)
    assert not os.path.exists(path)
    host.serving.may_write.set()
    learner.join()


def test_a_host_that_has_no_room_for_a_connection_takes_it_later(
    served: tuple[FakeHost, RosterHost], caplog: pytest.LogCaptureFixture
) -> None:
    _, address = served
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    spare = [os.dup(connection.fileno())]
    highest = max(int(name) for name in os.listdir("/proc/self/fd"))
    while spare[-1] <= highest:
        spare.append(os.dup(connection.fileno()))  # no gap is left below the limit
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare[-1] + 1, limits[1]))
    try:
        connection.connect(address.address)
        ends_at = time.monotonic() + PATIENCE_S
        while "cannot take a connection, and tries again" not in caplog.text:
            assert time.monotonic() < ends_at
            time.sleep(0.01)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        for descriptor in spare:
            os.close(descriptor)
    stream = FrameStream(connection, "solo")
    stream.send(encode(Hello(sequence=1, protocol=PROTOCOL, publisher="test")), None, PATIENCE_S)
    assert isinstance(decode(stream.receive(PATIENCE_S)[0]), Welcome)
    stream.close()


def test_a_sibling_that_has_ended_is_told_from_one_that_does_not_answer(directory: Path) -> None:
    question = Ask(sequence=1, update="u", asker="a", intent=Intent.HOLD)
    dead = RosterHost(id="dead", address=socket_path("siblings", "dead"))
    with pytest.raises(PeerGone, match="cannot connect to dead"):
        SocketSibling(dead, 1.0).ask(question)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(dead.address)
    with pytest.raises(PeerGone):  # a socket that nobody listens on: its process was killed
        SocketSibling(dead, 1.0).ask(question)
    listener.listen(1)
    with pytest.raises(DeadlineExceeded):
        SocketSibling(dead, 0.05).ask(question)
    listener.close()


def test_a_segment_outlives_its_publisher_and_cannot_shrink() -> None:
    segment = SharedSegment(8192)
    segment.data[:3] = 7
    mapped = map_segment(os.dup(segment.descriptor))
    with pytest.raises(OSError):
        os.ftruncate(segment.descriptor, 1)
    segment.close()
    assert mapped[:4].tolist() == [7, 7, 7, 0]
    assert mapped.numel() == 8192


def test_a_peer_that_takes_nothing_hits_the_deadline() -> None:
    ours, theirs = socket.socketpair()
    stream = FrameStream(ours, "a sleeper")
    with pytest.raises(DeadlineExceeded, match="a sleeper did not take"):
        stream.send(bytes(8 << 20), None, 0.05)
    stream.close()
    theirs.close()


def test_large_frames_arrive_whole() -> None:
    ours, theirs = socket.socketpair()
    near, far = FrameStream(ours, "near"), FrameStream(theirs, "far")
    offer = offer_of(Manifest.of([]), update="u" * (5 << 20))
    sender = threading.Thread(target=near.send, args=(encode(offer), None, PATIENCE_S))
    sender.start()
    frame, descriptor = far.receive(PATIENCE_S)
    sender.join()
    assert (decode(frame), descriptor) == (offer, None)
    near.close()
    far.close()
