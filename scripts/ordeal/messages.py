"""A message to one of two hosts is lost, doubled, delayed, cut or changed: in one process, in simulated time."""

from dataclasses import dataclass

from fakes.weights_fleet import BUCKET_BYTES, TIED, MemoryFleet, learner_state

from ordeal.table import After, MessageCell
from weights.errors import CommitIncomplete, UpdateAborted
from weights.gather import SegmentPool, gather
from weights.transports.faults import Fault
from weights.version import WeightVersion

OLD, NEW, NEXT = learner_state(1), learner_state(2), learner_state(3)


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageVerdict:
    cell: MessageCell
    after: After


def strike_message(cell: MessageCell) -> MessageVerdict:
    """AssertionError where a promise was broken."""
    fleet = MemoryFleet()
    old = fleet.publisher.publish(OLD, 1).version
    digest = gather(NEW, TIED, SegmentPool(fleet.transport, BUCKET_BYTES), BUCKET_BYTES).manifest.digest
    new = WeightVersion(run="run", step=2, digest=digest)
    fleet.transport.inject(Fault(kind=cell.kind, host="b", message=cell.message, reply=cell.reply))
    told = True
    try:
        fleet.publisher.publish(NEW, 2)
    except (UpdateAborted, CommitIncomplete):
        told = False
    assert fleet.transport.armed == [], "the fault did not strike"
    fleet.transport.fall_silent()
    (version,) = {host.serving.serves for host in fleet.hosts.values()}
    assert version in (old, new)
    assert version == new or not told, "an update was reported that did not happen"
    for host in fleet.hosts.values():
        assert host.holds(OLD if version == old else NEW), "a host holds something else than it says"
    report = fleet.publisher.publish(NEXT, 3)
    assert set(report.hosts) == {"a", "b"}
    assert all(host.holds(NEXT) for host in fleet.hosts.values())
    return MessageVerdict(cell=cell, after=After.OLD if version == old else After.NEW)
