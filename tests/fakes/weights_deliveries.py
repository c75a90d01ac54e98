"""Fleets in memory for each way in which bytes come to a host, faults on every message of it, and what may be left."""

from collections.abc import Callable

import pytest
from fakes.weights_fleet import FakeHost, MemoryFleet, learner_state
from fakes.weights_reach import ProcessLeaseLoader, ProcessMemory, ProcessWireLoader, ProcessWires
from torch import Tensor

from weights.digest import Digest, tensor_digest
from weights.errors import CommitIncomplete, UpdateAborted
from weights.messages import Request
from weights.naming import to_wire
from weights.segment_loader import SegmentLoader
from weights.state import State
from weights.transports.faults import CONNECTION_FAULTS, OFFER_FAULTS, Fault, FaultKind
from weights.transports.memory import SimulatedClock
from weights.version import WeightVersion

OLD, NEW, NEXT = learner_state(1), learner_state(2), learner_state(3)
BUCKETS = 6
SOME_BUCKETS = (1, 3, BUCKETS)
"""The first, one in the midst of a tensor, and the last."""


class LeasingFleet(MemoryFleet):
    """Hosts that can read the learner's memory."""

    def __init__(self, hosts: int = 2, *, hidden: bool = False) -> None:
        """hidden: the learner's tensors lie in memory without handles, and pass through two slots that have them."""
        self.memory = ProcessMemory()
        self.memory.hidden = hidden
        super().__init__(
            hosts,
            reach=self.memory,
            load=lambda transport, size: ProcessLeaseLoader(self.memory, SegmentLoader(transport, size), size),
        )


class WiredFleet(MemoryFleet):
    """Hosts that are on a wire with the learner."""

    def __init__(self, hosts: int = 2, *, shadow: bool = False) -> None:
        """shadow: they keep a full second copy before they vote."""
        clock = SimulatedClock()
        self.wires = ProcessWires(clock)
        super().__init__(
            hosts,
            reach=self.wires,
            load=lambda _, size: ProcessWireLoader(self.wires, shadow=shadow, bucket_bytes=size),
            clock=clock,
        )


FLEETS: dict[str, Callable[[int], MemoryFleet]] = {
    "segments": MemoryFleet,
    "lease": LeasingFleet,
    "slots": lambda hosts: LeasingFleet(hosts, hidden=True),
    "wire": WiredFleet,
    "shadow": lambda hosts: WiredFleet(hosts, shadow=True),
}
STREAMED = [
    *[("Hello", 1), ("Join", 1), ("Offer", 1), ("Vote", 1), ("Commit", 1)],
    *(("Deliver", n) for n in SOME_BUCKETS),
    ("Finish", 1),
]
MESSAGES: dict[str, list[tuple[str, int]]] = {
    "lease": [("Hello", 1), ("Offer", 1), ("Stage", 1), ("Vote", 1), ("Commit", 1)],
    "slots": STREAMED,
    "wire": STREAMED,
    "shadow": [
        *[("Hello", 1), ("Join", 1), ("Offer", 1)],
        *(("Stage", n) for n in SOME_BUCKETS),
        *[("Vote", 1), ("Commit", 1)],
    ],
}
"""The requests of an update, each with which of its kind it is."""


def every_fault(delivery: str) -> list[Fault]:
    """Every kind at every request and reply to either of two hosts."""
    return [
        Fault(kind=kind, host=host, message=message, occurrence=occurrence, reply=reply)
        for host in "ab"
        for message, occurrence in MESSAGES[delivery]
        for reply in (False, True)
        for kind in sorted(CONNECTION_FAULTS)
    ] + [Fault(kind=kind, host=host, message="Offer") for host in "ab" for kind in sorted(OFFER_FAULTS)]


def name_of(fault: Fault) -> str:
    reply = "-reply" if fault.reply else ""
    return f"{fault.host}-{fault.message}{fault.occurrence}{reply}-{fault.kind.replace(' ', '_')}"


def version_of(step: int, state: dict[str, Tensor], run: str = "run") -> WeightVersion:
    """What a host serves once it holds `state`."""
    digest = Digest.total(tensor_digest(name, tensor) for name, tensor in to_wire(state.items()))
    return WeightVersion(run=run, step=step, digest=digest)


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


def contents_of(fleet: MemoryFleet) -> dict[str, str]:
    """Of every host, once nothing is under way there: no update, and no pause."""
    found = {}
    for name, host in fleet.hosts.items():
        assert host.receiver.state in (State.IDLE, State.TORN)
        assert not host.serving.is_paused
        found[name] = content_of(host, version_of(1, OLD), version_of(2, NEW))
    return found


def at_old(delivery: str, hosts: int = 2) -> MemoryFleet:
    """A fleet that serves OLD as step 1."""
    fleet = FLEETS[delivery](hosts)
    assert fleet.publisher.publish(OLD, 1).version == version_of(1, OLD)
    return fleet


def heal(fleet: MemoryFleet) -> None:
    """The next good publish reaches every host, whatever the last one left."""
    report = fleet.publisher.publish(NEXT, 3)
    assert set(report.hosts) == set(fleet.transport.hosts())
    for name in report.hosts:
        assert fleet.hosts[name].holds(NEXT)
        assert fleet.hosts[name].serving.serves == fleet.hosts[name].receiver.version == report.version
        assert not fleet.hosts[name].serving.is_paused


def strike(delivery: str, fault: Fault) -> None:
    """AssertionError where a fault on one message leaves a host between two versions, two hosts with different ones,
    something else than the publisher says, or a fleet that takes no further update.
    """
    fleet = at_old(delivery)
    if fault.message == "Join":
        fleet.transport.lose_publisher()  # a way is joined once: here the hosts have left it
    fleet.transport.inject(fault)
    failure: UpdateAborted | CommitIncomplete | None = None
    try:
        assert fleet.publisher.publish(NEW, 2).version == version_of(2, NEW)
    except (UpdateAborted, CommitIncomplete) as error:
        failure = error
    assert fleet.transport.armed == [], "the fault did not strike"
    fleet.transport.fall_silent()
    contents = contents_of(fleet)
    assert len({*contents.values()} - {"torn"}) <= 1
    match failure:
        case None:
            assert set(contents.values()) == {"new"}
            assert fault.kind is FaultKind.DUPLICATE or fault.message == "Hello"  # which is said again
        case UpdateAborted():
            assert set(contents.values()) == {"old"}
            assert fault.host in failure.hosts
            assert fault.message not in ("Deliver", "Finish")
        case CommitIncomplete():
            assert fault.host in (failure.unknown | failure.torn)
            assert all(contents[host] == "new" for host in failure.committed)
            assert all(contents[host] == "torn" for host in failure.torn)
            assert fault.message in ("Commit", "Deliver", "Finish")
    heal(fleet)


def before(fleet: MemoryFleet, message: tuple[str, int], host: str, act: Callable[[], None]) -> None:
    """Arms `act` for just before the n-th message of a kind to `host`, from now on."""
    carry = fleet.transport.carry
    seen = 0

    def acting(to: str, request: Request, segment: Tensor | None) -> list[bytes]:
        nonlocal seen
        if (type(request).__name__, to) == (message[0], host):
            seen += 1
            if seen == message[1]:
                act()
        return carry(to, request, segment)

    fleet.transport.carry = acting  # type: ignore[method-assign]


def die(fleet: MemoryFleet, before: tuple[str, int], host: str, *, silent: bool) -> None:
    """Publishes NEW, ends the learner as it is about to send its n-th message of a kind to `host`, and lets the hosts
    act: on its connection's end, or on its silence.
    """
    carry = fleet.transport.carry
    seen = 0
    dead = False

    def until_death(to: str, request: Request, segment: Tensor | None) -> list[bytes]:
        nonlocal dead, seen
        seen += (type(request).__name__, to) == (before[0], host)
        dead = dead or seen == before[1]
        if dead:
            raise SystemExit
        return carry(to, request, segment)

    fleet.transport.carry = until_death  # type: ignore[method-assign]
    with pytest.raises(SystemExit):
        fleet.publisher.publish(NEW, 2)
    fleet.transport.carry = carry  # type: ignore[method-assign]
    if silent:
        fleet.transport.fall_silent()
    else:
        fleet.transport.lose_publisher()
