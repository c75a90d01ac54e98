"""Every fault at every message to one of two hosts: each then serves the old weights or the new, whole and labelled."""

from dataclasses import replace

import pytest
from fakes.weights_fleet import BUCKET_BYTES, TIED, FakeHost, MemoryFleet, learner_state
from torch import Tensor

from weights.errors import CommitIncomplete, TransportError, UpdateAborted
from weights.gather import SegmentPool, gather
from weights.messages import KINDS, Ask, Request
from weights.state import Intent, Outcome, State
from weights.transports.faults import CONNECTION_FAULTS, OFFER_FAULTS, SEGMENT_FAULTS, Fault, FaultKind
from weights.version import WeightVersion

OLD, NEW, NEXT = learner_state(1), learner_state(2), learner_state(3)
BUCKETS = 6
STAGES = (1, 3, BUCKETS)
"""The first, one in the midst of a tensor, and the last."""
MESSAGES = [("Hello", 1), ("Offer", 1), *(("Stage", n) for n in STAGES), ("Vote", 1), ("Commit", 1)]


def every_fault() -> list[Fault]:
    faults = [
        Fault(kind=kind, host=host, message=message, occurrence=occurrence, reply=reply)
        for host in "ab"
        for message, occurrence in MESSAGES
        for reply in (False, True)
        for kind in sorted(CONNECTION_FAULTS)
    ]
    faults += [Fault(kind=kind, host=host, message="Offer") for host in "ab" for kind in sorted(OFFER_FAULTS)]
    faults += [
        Fault(kind=kind, host=host, message="Stage", occurrence=occurrence)
        for host in "ab"
        for occurrence in STAGES
        for kind in sorted(SEGMENT_FAULTS)
    ]
    return faults


HARMLESS = {FaultKind.DUPLICATE}


def fleet_at_old() -> tuple[MemoryFleet, WeightVersion]:
    fleet = MemoryFleet()
    return fleet, fleet.publisher.publish(OLD, 1).version


def content_of(host: FakeHost, old: WeightVersion, new: WeightVersion) -> str:
    """old, new or torn: and the host's label, its receiver's and its content agree."""
    if host.serving.serves is None:
        assert host.receiver.state is State.TORN
        assert host.receiver.version is None
        return "torn"
    assert host.serving.serves == host.receiver.version
    if host.serving.serves == old:
        assert host.holds(OLD)
        return "old"
    assert host.serving.serves == new
    assert host.holds(NEW)
    return "new"


def version_of(fleet: MemoryFleet, step: int, state: dict[str, object]) -> WeightVersion:
    pool = SegmentPool(fleet.transport, BUCKET_BYTES)
    return WeightVersion(run="run", step=step, digest=gather(state, TIED, pool, BUCKET_BYTES).manifest.digest)


def test_the_update_has_the_messages_that_the_table_breaks() -> None:
    fleet, old = fleet_at_old()
    assert len(gather(NEW, TIED, SegmentPool(fleet.transport, BUCKET_BYTES), BUCKET_BYTES).segments) == BUCKETS
    assert {message for message, _ in MESSAGES} < set(KINDS)
    assert old == fleet.hosts["b"].serving.serves


@pytest.mark.parametrize(
    "fault",
    every_fault(),
    ids=lambda f: f"{f.host}-{f.message}{f.occurrence}{'-reply' if f.reply else ''}-{f.kind.replace(' ', '_')}",
)
def test_a_fault_leaves_no_host_between_two_versions(fault: Fault) -> None:
    fleet, old = fleet_at_old()
    new = version_of(fleet, 2, NEW)
    fleet.transport.inject(fault)
    failure: UpdateAborted | CommitIncomplete | None = None
    try:
        report = fleet.publisher.publish(NEW, 2)
    except (UpdateAborted, CommitIncomplete) as error:
        failure = error
    else:
        assert report.version == new
    assert fleet.transport.armed == []  # the fault struck

    if isinstance(failure, UpdateAborted):
        # A host that lost its publisher after its own vote tells the others to abort before they vote.
        told = {"a", "b"} if (fault.host, fault.message, fault.reply) == ("a", "Vote", True) else {fault.host}
        assert {fault.host} <= set(failure.hosts) <= told
        assert all(host in str(failure) for host in failure.hosts)
    elif isinstance(failure, CommitIncomplete):
        assert fault.message == "Commit"
        # A host that lost its publisher instead of hearing Commit holds the others, who then refuse theirs.
        assert fault.host in failure.unknown
        assert {*failure.unknown, *failure.committed} == {"a", "b"}
        assert failure.torn == {}
    else:
        assert fault.kind in HARMLESS or fault.message == "Hello"  # a greeting is tried once more, on a new connection

    fleet.transport.fall_silent()
    contents = {host: content_of(each, old, new) for host, each in fleet.hosts.items()}
    assert len(set(contents.values())) == 1  # one host's trouble never splits the fleet
    if failure is None or (isinstance(failure, CommitIncomplete) and failure.committed):
        assert contents["a"] == "new"
    elif isinstance(failure, UpdateAborted):
        assert contents["a"] == "old"

    report = fleet.publisher.publish(NEXT, 3)
    assert set(report.hosts) == {"a", "b"}
    for host in fleet.hosts.values():
        assert host.holds(NEXT)
        assert host.serving.serves == report.version


@pytest.mark.parametrize("kind", sorted(CONNECTION_FAULTS - HARMLESS))
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("message", [*(m for m in MESSAGES if m[0] in ("Offer", "Vote", "Commit")), ("Stage", 2)])
def test_both_hosts_in_trouble_are_both_named(message: tuple[str, int], reply: bool, kind: FaultKind) -> None:
    fleet, old = fleet_at_old()
    for host in "ab":
        fleet.transport.inject(Fault(kind=kind, host=host, message=message[0], occurrence=message[1], reply=reply))
    with pytest.raises((UpdateAborted, CommitIncomplete)) as caught:
        fleet.publisher.publish(NEW, 2)
    named = caught.value.hosts if isinstance(caught.value, UpdateAborted) else caught.value.unknown
    assert set(named) == {"a", "b"}
    fleet.transport.fall_silent()
    new = version_of(fleet, 2, NEW)
    assert len({content_of(host, old, new) for host in fleet.hosts.values()}) == 1
    assert (
        fleet.publisher.publish(NEXT, 3).version == fleet.hosts["a"].serving.serves == fleet.hosts["b"].serving.serves
    )


@pytest.mark.parametrize("kind", sorted(CONNECTION_FAULTS))
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize("during", ["Offer", "Stage", "Vote"])
def test_an_abort_that_is_lost_too_leaves_the_old_version(during: str, reply: bool, kind: FaultKind) -> None:
    fleet, old = fleet_at_old()
    fleet.transport.inject(Fault(kind=FaultKind.DROP, host="a", message=during))
    fleet.transport.inject(Fault(kind=kind, host="b", message="Abort", reply=reply))
    with pytest.raises(UpdateAborted) as caught:
        fleet.publisher.publish(NEW, 2)
    assert list(caught.value.hosts) == ["a"]
    fleet.transport.fall_silent()
    for host in fleet.hosts.values():
        assert host.serving.serves == old
        assert host.holds(OLD)
        assert host.receiver.state is State.IDLE
    fleet.publisher.publish(NEXT, 3)


def test_a_host_that_tears_is_named_and_the_others_commit() -> None:
    fleet, old = fleet_at_old()
    torn = fleet.hosts["b"]
    kept = torn.parameters["norm"]
    torn.parameters["norm"] = kept.new_zeros(3)  # its copy fails half-way
    with pytest.raises(CommitIncomplete, match="Torn, serving nothing: b") as caught:
        fleet.publisher.publish(NEW, 2)
    assert caught.value.committed == ("a",)
    assert list(caught.value.torn) == ["b"]
    assert caught.value.unknown == {}
    new = version_of(fleet, 2, NEW)
    assert content_of(fleet.hosts["a"], old, new) == "new"
    assert content_of(torn, old, new) == "torn"

    torn.parameters["norm"] = kept
    report = fleet.publisher.publish(NEW, 2)  # the same step again: it heals the one and changes nothing for the other
    assert report.version == new == torn.serving.serves
    assert torn.holds(NEW)


def test_hosts_that_all_tear_are_all_named() -> None:
    fleet, _ = fleet_at_old()
    for host in fleet.hosts.values():
        host.parameters["norm"] = host.parameters["norm"].new_zeros(3)
    with pytest.raises(CommitIncomplete) as caught:
        fleet.publisher.publish(NEW, 2)
    assert (caught.value.committed, set(caught.value.torn)) == ((), {"a", "b"})
    assert [host.serving.serves for host in fleet.hosts.values()] == [None, None]


def test_when_no_host_can_pause_the_update_is_off_everywhere() -> None:
    fleet, old = fleet_at_old()
    for host in fleet.hosts.values():
        host.serving.busy = True
    with pytest.raises(UpdateAborted, match="could not pause") as caught:
        fleet.publisher.publish(NEW, 2)
    assert set(caught.value.hosts) == {"a", "b"}
    for host in fleet.hosts.values():
        assert (host.receiver.state, host.serving.serves) == (State.IDLE, old)


def test_a_host_that_could_not_pause_follows_the_one_that_committed() -> None:
    fleet, old = fleet_at_old()
    fleet.hosts["b"].serving.misses = 3  # the learner's commit, and the host's own first tries
    with pytest.raises(CommitIncomplete) as caught:
        fleet.publisher.publish(NEW, 2)
    assert list(caught.value.unknown) == ["b"]
    new = version_of(fleet, 2, NEW)
    assert [content_of(host, old, new) for host in fleet.hosts.values()] == ["new", "new"]


def test_a_host_that_never_can_pause_is_silent_beside_the_one_that_committed() -> None:
    fleet, old = fleet_at_old()
    fleet.hosts["b"].serving.busy = True
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    new = version_of(fleet, 2, NEW)
    assert [content_of(host, old, new) for host in fleet.hosts.values()] == ["new", "torn"]
    assert fleet.hosts["b"].holds(OLD)  # nothing was written
    fleet.hosts["b"].serving.busy = False
    assert fleet.publisher.publish(NEW, 2).version == fleet.hosts["b"].serving.serves


@pytest.mark.parametrize("host", ["a", "b"])
@pytest.mark.parametrize("before", ["Offer", "Stage", "Vote"])
@pytest.mark.parametrize("silent", [False, True])
def test_a_learner_that_dies_before_the_commit_leaves_the_old_version(before: str, host: str, silent: bool) -> None:
    fleet, old = fleet_at_old()
    die(fleet, before, host, silent)
    for each in fleet.hosts.values():
        assert (each.receiver.state, each.serving.serves) == (State.IDLE, old)
        assert each.holds(OLD)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize("hosts", [2, 3])
def test_a_learner_that_dies_when_all_have_voted_leaves_the_old_version(hosts: int, silent: bool) -> None:
    fleet = MemoryFleet(hosts)
    old = fleet.publisher.publish(OLD, 1).version
    die(fleet, "Commit", "a", silent)
    assert {host.serving.serves for host in fleet.hosts.values()} == {old}
    assert {host.receiver.state for host in fleet.hosts.values()} == {State.IDLE}


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("hosts", "before"), [(2, "b"), (3, "b"), (3, "c")])
def test_a_learner_that_dies_while_it_commits_leaves_the_new_version_everywhere(
    hosts: int, before: str, silent: bool
) -> None:
    fleet = MemoryFleet(hosts)
    old = fleet.publisher.publish(OLD, 1).version
    die(fleet, "Commit", before, silent)
    new = version_of(fleet, 2, NEW)
    assert {content_of(host, old, new) for host in fleet.hosts.values()} == {"new"}
    assert {host for host, _ in fleet.transport.settlements} == {host for host in fleet.hosts if host >= before}


QUESTIONS = [
    # hosts, whose Commit the learner dies before, the host that is asked, and the how manieth question to it
    *[(2, "a", "b", 1), (2, "a", "b", 2), (2, "b", "a", 1)],
    *[(3, "a", "b", 1), (3, "a", "b", 2), (3, "a", "c", 1), (3, "a", "c", 2)],
    *[(3, "b", "a", 1), (3, "b", "a", 2), (3, "b", "b", 1), (3, "b", "c", 1)],
    *[(3, "c", "a", 1), (3, "c", "b", 1)],
]


@pytest.mark.parametrize("kind", sorted(CONNECTION_FAULTS))
@pytest.mark.parametrize("reply", [False, True])
@pytest.mark.parametrize(("hosts", "before", "asked", "occurrence"), QUESTIONS)
def test_a_question_that_is_lost_between_siblings_never_splits_the_fleet(
    hosts: int, before: str, asked: str, occurrence: int, reply: bool, kind: FaultKind
) -> None:
    fleet = MemoryFleet(hosts)
    old = fleet.publisher.publish(OLD, 1).version
    fleet.transport.inject(Fault(kind=kind, host=asked, message="Ask", occurrence=occurrence, reply=reply))
    die(fleet, "Commit", before, silent=False)
    assert fleet.transport.armed == []  # the fault struck
    new = version_of(fleet, 2, NEW)
    contents = {host: content_of(each, old, new) for host, each in fleet.hosts.items()}
    assert set(contents.values()) == {"old" if before == "a" else "new"}  # it was asked again
    heals(fleet)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(
    ("hosts", "before", "unreachable"),
    [(len(hosts), before, unreachable) for hosts in ("ab", "abc") for before in hosts for unreachable in hosts],
)
def test_hosts_that_cannot_reach_a_living_sibling_agree_with_it_or_are_silent(
    hosts: int, before: str, unreachable: str, silent: bool
) -> None:
    fleet = MemoryFleet(hosts)
    old = fleet.publisher.publish(OLD, 1).version
    fleet.transport.unreachable.add(unreachable)
    die(fleet, "Commit", before, silent)
    new = version_of(fleet, 2, NEW)
    contents = {host: content_of(each, old, new) for host, each in fleet.hosts.items()}
    assert len({*contents.values()} - {"torn"}) <= 1, contents
    assert "staged" not in {host.receiver.state for host in fleet.hosts.values()}
    fleet.transport.unreachable.clear()
    heals(fleet)


def test_a_host_that_cannot_reach_the_one_that_committed_says_that_it_is_undecided() -> None:
    fleet, old = fleet_at_old()
    fleet.transport.unreachable.add("a")
    die(fleet, "Commit", "b", silent=False)
    new = version_of(fleet, 2, NEW)
    assert [content_of(host, old, new) for host in fleet.hosts.values()] == ["new", "torn"]
    settlement = dict(fleet.transport.settlements)["b"]
    assert settlement.outcome is Outcome.UNDECIDED
    assert "a not reached: a did not answer" in settlement.reason
    assert fleet.hosts["b"].serving.torn_because == settlement.reason


def test_a_sibling_whose_process_ended_cannot_be_serving_what_it_committed() -> None:
    fleet, old = fleet_at_old()
    die(fleet, "Commit", "b", silent=False, ends="a")
    new = version_of(fleet, 2, NEW)
    assert content_of(fleet.hosts["a"], old, new) == "new"  # it had, before it ended
    assert content_of(fleet.hosts["b"], old, new) == "old"
    assert "a is gone" in dict(fleet.transport.settlements)["b"].reason


def test_a_damaged_question_leaves_the_publisher_s_connection_alone() -> None:
    fleet, old = fleet_at_old()
    fleet.transport.inject(Fault(kind=FaultKind.CORRUPT, host="a", message="Ask"))
    question = Ask(sequence=1, update="none", asker="b", intent=Intent.HOLD)
    with pytest.raises(TransportError, match="a closed the connection"):
        fleet.transport.siblings("b")[0].ask(question)
    assert fleet.transport.siblings("b")[0].ask(question).outcome is Outcome.UNKNOWN
    assert fleet.publisher.publish(NEW, 2).version != old
    assert fleet.transport.settlements == []


def heals(fleet: MemoryFleet) -> None:
    """The next good publish reaches every host, whatever the last one left."""
    report = fleet.publisher.publish(NEXT, 3)
    assert set(report.hosts) == set(fleet.transport.hosts())
    for host in report.hosts:
        assert fleet.hosts[host].holds(NEXT)
        assert fleet.hosts[host].serving.serves == fleet.hosts[host].receiver.version == report.version


def die(fleet: MemoryFleet, before: str, host: str, silent: bool, *, ends: str | None = None) -> None:
    """Publishes NEW, ends the learner as it is about to send its first message of kind `before` to `host` (and with
    it the process of the host `ends`), and lets the hosts act.
    """
    carry = fleet.transport.carry
    dead = False

    def until_death(to: str, request: Request, segment: Tensor | None) -> list[bytes]:
        nonlocal dead
        dead = dead or (type(request).__name__, to) == (before, host)
        if dead:
            fleet.transport.disconnected = lambda host: None  # type: ignore[method-assign] # the dead close nothing
            raise SystemExit
        return carry(to, request, segment)

    fleet.transport.carry = until_death  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        fleet.publisher.publish(NEW, 2)
    fleet.transport.carry = carry  # type: ignore[method-assign]
    vars(fleet.transport).pop("disconnected", None)
    if ends is not None:
        fleet.transport.end(ends)
    if silent:
        fleet.transport.fall_silent()
        fleet.transport._links.clear()  # as a server ends a connection that fell silent
    else:
        fleet.transport.lose_publisher()


def test_a_fault_that_cannot_befall_a_message_is_refused() -> None:
    good = Fault(kind=FaultKind.STALE_STEP, host="a", message="Offer")
    for change in ({"message": "Vote"}, {"reply": True}):
        with pytest.raises(ValueError, match="befalls the request"):
            replace(good, **change)
