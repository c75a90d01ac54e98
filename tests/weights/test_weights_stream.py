"""Buckets that are written as they come, through slots in the learner's memory or over a wire: nothing is staged, so a
learner that is lost on the way leaves torn hosts, and never a wrong one.
"""

from collections.abc import Iterator

import pytest
import torch
from fakes.weights_deliveries import (
    BUCKETS,
    NEW,
    NEXT,
    OLD,
    LeasingFleet,
    WiredFleet,
    at_old,
    before,
    contents_of,
    die,
    every_fault,
    heal,
    name_of,
    strike,
    version_of,
)
from fakes.weights_fleet import BUCKET_BYTES, MemoryFleet, learner_state
from torch import Tensor

from weights.bucket import pack
from weights.catalogue import Catalogue, TensorSpec
from weights.errors import CommitIncomplete, UpdateAborted
from weights.held import Held
from weights.lease import SlotTerms
from weights.messages import Ask, Deliver, Join, Refused
from weights.publisher import Publisher
from weights.state import Intent, Outcome, State
from weights.transports.faults import Fault, FaultKind

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
STREAMS = pytest.mark.parametrize("stream", ["slots", "wire"])


def slotted(hosts: int = 2) -> LeasingFleet:
    fleet = at_old("slots", hosts)
    assert isinstance(fleet, LeasingFleet)
    return fleet


def wired(hosts: int = 2) -> WiredFleet:
    fleet = at_old("wire", hosts)
    assert isinstance(fleet, WiredFleet)
    return fleet


@pytest.mark.parametrize("fault", every_fault("slots"), ids=name_of)
def test_a_fault_leaves_no_host_between_two_versions_of_slots(fault: Fault) -> None:
    strike("slots", fault)


@pytest.mark.parametrize("fault", every_fault("wire"), ids=name_of)
def test_a_fault_leaves_no_host_between_two_versions_of_a_wire(fault: Fault) -> None:
    strike("wire", fault)


def test_the_small_model_has_a_tensor_that_is_larger_than_a_bucket() -> None:
    specs = (TensorSpec(name=n, shape=tuple(t.shape), dtype=t.dtype) for n, t in OLD.items() if n != "lm_head.weight")
    buckets = pack(Catalogue(specs), BUCKET_BYTES)
    assert len({n for n, bucket in enumerate(buckets) for piece in bucket.pieces if piece.tensor == 0}) == 3


@STREAMS
@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(
    ("message", "host", "left"),
    [
        (("Offer", 1), "b", "old old"),
        (("Vote", 1), "b", "old old"),
        (("Commit", 1), "a", "old old"),
        (("Commit", 1), "b", "old old"),
        (("Deliver", 1), "a", "old old"),
        (("Deliver", 1), "b", "torn torn"),
        (("Deliver", 2), "a", "torn torn"),
        (("Deliver", BUCKETS), "b", "torn torn"),
        (("Finish", 1), "a", "torn torn"),
        (("Finish", 1), "b", "new torn"),
    ],
)
def test_a_learner_that_dies_leaves_the_old_version_until_the_first_bucket_was_sent(
    stream: str, message: tuple[str, int], host: str, left: str, silent: bool
) -> None:
    fleet = at_old(stream)
    die(fleet, message, host, silent=silent)
    assert " ".join(contents_of(fleet).values()) == left
    heal(fleet)


@STREAMS
def test_a_host_that_begun_follows_its_sibling_into_silence(stream: str) -> None:
    fleet = at_old(stream)
    die(fleet, ("Deliver", 1), "b", silent=False)
    settlement = dict(fleet.transport.settlements)["b"]
    assert settlement.outcome is Outcome.TORN
    assert "a took the commit; the bytes of this update went with its learner" in settlement.reason
    assert fleet.hosts["a"].serving.torn_because == "the publisher was lost while it delivered the update"


@STREAMS
def test_a_host_that_has_begun_and_cannot_reach_its_sibling_is_undecided(stream: str) -> None:
    fleet = at_old(stream)
    fleet.transport.unreachable.add("a")
    die(fleet, ("Deliver", 1), "b", silent=False)
    assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    assert dict(fleet.transport.settlements)["b"].outcome is Outcome.UNDECIDED
    fleet.transport.unreachable.clear()
    heal(fleet)


@STREAMS
def test_hosts_pause_before_the_first_bucket_and_once(stream: str) -> None:
    fleet = at_old(stream)
    paused: list[tuple[bool, ...]] = []

    def look() -> None:
        paused.append(tuple(host.serving.is_paused for host in fleet.hosts.values()))

    for message in (("Vote", 1), ("Deliver", 1), ("Deliver", BUCKETS), ("Finish", 1)):
        before(fleet, message, "a", look)
    fleet.publisher.publish(NEW, 2)
    assert paused == [(False, False), *[(True, True)] * 3]
    assert contents_of(fleet) == {"a": "new", "b": "new"}
    assert [host.serving.pauses for host in fleet.hosts.values()] == [2, 2]


@STREAMS
def test_a_host_that_cannot_pause_calls_the_update_off_for_all(stream: str) -> None:
    fleet = at_old(stream)
    fleet.hosts["b"].serving.busy = True
    with pytest.raises(UpdateAborted, match="b: could not pause, so nothing was written") as caught:
        fleet.publisher.publish(NEW, 2)
    assert list(caught.value.hosts) == ["b"]
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    fleet.hosts["b"].serving.busy = False
    heal(fleet)


@STREAMS
@pytest.mark.parametrize("message", [("Vote", 1), ("Commit", 1), ("Deliver", 2)])
def test_a_source_that_changes_on_the_way_is_found_in_the_parameters_by_name(
    stream: str, message: tuple[str, int]
) -> None:
    fleet = at_old(stream)
    state = learner_state(2)
    before(fleet, message, "a", lambda: state[NORM].add_(1))  # it lies in the last bucket
    with pytest.raises(CommitIncomplete, match=rf"{NORM}: norm has digest") as caught:
        fleet.publisher.publish(state, 2)
    assert (caught.value.committed, set(caught.value.torn)) == ((), {"a", "b"})
    assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    heal(fleet)


@STREAMS
def test_a_learner_that_fails_between_two_buckets_lets_go_of_its_hosts_at_once(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = at_old(stream)
    fill = Held.fill

    def failing(held: Held, index: int, bucket_bytes: int, slot: Tensor) -> None:
        if index == 2:
            raise RuntimeError("the device has failed")
        fill(held, index, bucket_bytes, slot)

    monkeypatch.setattr(Held, "fill", failing)
    began = fleet.clock()
    with pytest.raises(RuntimeError, match="the device has failed"):
        fleet.publisher.publish(NEW, 2)
    assert fleet.clock() == began  # nobody waited for a silence
    assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    monkeypatch.undo()
    heal(fleet)


@STREAMS
def test_a_learner_that_fails_before_the_first_bucket_calls_the_update_off(
    stream: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = at_old(stream)

    def failing(held: Held, index: int, bucket_bytes: int, slot: Tensor) -> None:
        raise RuntimeError("the device has failed")

    monkeypatch.setattr(Held, "fill", failing)
    with pytest.raises(RuntimeError, match="the device has failed"):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    monkeypatch.undo()
    heal(fleet)


@STREAMS
def test_the_report_of_a_stream_that_broke_off_knows_who_has_a_bucket(stream: str) -> None:
    fleet = at_old(stream)
    fleet.transport.inject(Fault(kind=FaultKind.DROP, host="b", message="Deliver"))
    with pytest.raises(CommitIncomplete, match=r"bucket 0 of 6\. Torn, serving nothing: a\. Unknown.*: b") as first:
        fleet.publisher.publish(NEW, 2)
    assert (list(first.value.torn), list(first.value.unknown)) == (["a"], ["b"])
    heal(fleet)
    fleet.transport.inject(Fault(kind=FaultKind.DROP, host="b", message="Deliver", occurrence=2))
    with pytest.raises(CommitIncomplete, match=r"bucket 1 of 6\. Torn, serving nothing: a, b") as second:
        fleet.publisher.publish(NEW, 4)
    assert (set(second.value.torn), second.value.unknown) == ({"a", "b"}, {})


@STREAMS
def test_a_first_bucket_that_nobody_heard_of_leaves_the_old_version(stream: str) -> None:
    fleet = at_old(stream)
    for host in "ab":
        fleet.transport.inject(Fault(kind=FaultKind.DROP, host=host, message="Deliver"))
    with pytest.raises(CommitIncomplete) as caught:
        fleet.publisher.publish(NEW, 2)
    assert (caught.value.committed, caught.value.torn, set(caught.value.unknown)) == ((), {}, {"a", "b"})
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    heal(fleet)


def test_a_first_bucket_that_never_came_leaves_the_old_version() -> None:
    fleet = wired()
    before(fleet, ("Deliver", 1), "a", fleet.wires.lose_learner)
    with pytest.raises(CommitIncomplete, match="nothing was written: nothing came to a") as caught:
        fleet.publisher.publish(NEW, 2)
    assert (caught.value.committed, caught.value.torn, set(caught.value.unknown)) == ((), {}, {"a", "b"})
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    assert {settlement.outcome for _, settlement in fleet.transport.settlements} == {Outcome.ABORTED}
    heal(fleet)


@pytest.mark.parametrize(("reached", "cut_off"), ["ab", "ba"])
def test_a_host_that_no_bucket_reached_follows_its_torn_sibling_into_silence(reached: str, cut_off: str) -> None:
    fleet = wired()
    before(fleet, ("Deliver", 1), "a", lambda: fleet.wires.cut(cut_off))
    with pytest.raises(CommitIncomplete, match="nothing was written: the wire has ended") as caught:
        fleet.publisher.publish(NEW, 2)
    assert (list(caught.value.torn), list(caught.value.unknown)) == ([reached], [cut_off])
    assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    settlement = dict(fleet.transport.settlements)[cut_off]
    assert settlement.outcome is Outcome.TORN
    assert f"{reached} took the commit; the bytes of this update went with its learner" in settlement.reason
    heal(fleet)


@STREAMS
def test_a_subset_streams_over_the_content_that_it_names(stream: str) -> None:
    fleet = at_old(stream)
    part = {name: NEW[name] for name in (NORM, "model.layers.0.mlp.gate.weight")}
    version = fleet.publisher.publish(part, 2, base=version_of(1, OLD).digest).version
    assert version == version_of(2, OLD | part)
    for host in fleet.hosts.values():
        assert host.holds(OLD | part)
        assert host.receiver.live_digest() == version.digest
    heal(fleet)


@STREAMS
def test_a_sibling_that_asks_a_delivering_host_hears_that_the_commit_was_taken(stream: str) -> None:
    fleet = at_old(stream)
    heard: list[Outcome] = []
    update = _listening(fleet)

    def ask() -> None:
        for intent in (Intent.HOLD, Intent.ABORT):
            question = Ask(sequence=1, update=update[-1], asker="b", intent=intent)
            heard.append(fleet.transport.siblings("b")[0].ask(question).outcome)

    before(fleet, ("Deliver", 3), "a", ask)
    fleet.publisher.publish(NEW, 2)
    assert heard == [Outcome.TORN, Outcome.TORN]
    assert contents_of(fleet) == {"a": "new", "b": "new"}


@STREAMS
@pytest.mark.parametrize(("intent", "said"), [(Intent.HOLD, Outcome.VOTED), (Intent.ABORT, Outcome.ABORTED)])
def test_a_sibling_that_asks_a_host_that_has_begun_stops_its_delivery(
    stream: str, intent: Intent, said: Outcome
) -> None:
    fleet = at_old(stream)
    heard: list[Outcome] = []
    update = _listening(fleet)

    def ask() -> None:
        question = Ask(sequence=1, update=update[-1], asker="b", intent=intent)
        heard.append(fleet.transport.siblings("b")[0].ask(question).outcome)
        assert fleet.hosts["a"].serving.is_paused == (intent is Intent.HOLD)

    before(fleet, ("Deliver", 1), "a", ask)
    with pytest.raises(CommitIncomplete) as caught:
        fleet.publisher.publish(NEW, 2)
    assert heard == [said]
    assert "a" in caught.value.unknown
    contents = contents_of(fleet)
    assert contents["b"] == "torn"
    assert contents["a"] == ("torn" if said is Outcome.VOTED else "old")
    heal(fleet)


def _listening(fleet: MemoryFleet) -> list[str]:
    """The names of updates, as they are offered to a."""
    names: list[str] = []
    carry = fleet.transport.carry

    def listening(to: str, request, segment):
        if type(request).__name__ == "Offer":
            names.append(request.update)
        return carry(to, request, segment)

    fleet.transport.carry = listening  # type: ignore[method-assign]
    return names


@STREAMS
def test_buckets_come_in_order_and_a_repeated_one_is_written_once(stream: str) -> None:
    fleet = at_old(stream)
    update = _listening(fleet)
    receiver = fleet.hosts["a"].receiver
    answers: dict[int, str] = {}

    def others() -> None:
        for bucket in (0, 1, 3, BUCKETS, 99):
            reply = receiver.handle(Deliver(sequence=1, update=update[-1], bucket=bucket))
            answers[bucket] = reply.reason if isinstance(reply, Refused) else type(reply).__name__

    before(fleet, ("Deliver", 3), "a", others)
    fleet.publisher.publish(NEW, 2)
    late = "bucket 2 of 6 is next"
    assert answers == {0: "Delivered", 1: "Delivered", 3: late, BUCKETS: late, 99: late}
    assert contents_of(fleet) == {"a": "new", "b": "new"}


@STREAMS
def test_hosts_that_fall_silent_while_they_are_delivered_to_are_torn(stream: str) -> None:
    fleet = at_old(stream)
    before(fleet, ("Deliver", 4), "a", fleet.transport.fall_silent)
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    heal(fleet)


@STREAMS
def test_hosts_that_fall_silent_before_the_first_bucket_keep_what_they_serve(stream: str) -> None:
    fleet = at_old(stream)
    before(fleet, ("Deliver", 1), "a", fleet.transport.fall_silent)
    with pytest.raises(CommitIncomplete) as caught:
        fleet.publisher.publish(NEW, 2)
    assert set(caught.value.unknown) == {"a", "b"}
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    heal(fleet)


@STREAMS
def test_settling_while_buckets_come_counts_as_losing_the_learner(stream: str) -> None:
    fleet = at_old(stream)
    receiver = fleet.hosts["a"].receiver
    update = _listening(fleet)
    before(fleet, ("Deliver", 3), "a", lambda: receiver.settle(lambda: ()))
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    reply = receiver.handle(Ask(sequence=1, update=update[-1], asker="b", intent=Intent.HOLD))
    assert reply.outcome is Outcome.TORN  # and not aborted: some of it is written


@STREAMS
def test_a_second_learner_is_turned_away_in_the_midst_of_a_stream(stream: str) -> None:
    fleet = at_old(stream)
    second = Publisher(fleet.transport, run="second", deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=fleet.clock)

    def intrude() -> None:
        with pytest.raises(UpdateAborted, match="has a publisher already"):
            second.publish(NEXT, 1)

    before(fleet, ("Deliver", 2), "b", intrude)
    fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}
    fleet.publisher.close()
    assert second.publish(NEXT, 1).version == version_of(1, NEXT, "second")


def test_two_slots_serve_all_buckets_of_all_updates() -> None:
    fleet = slotted()
    assert (fleet.memory.opens, len(set(fleet.memory.opened))) == (4, 2)
    for step in range(2, 6):
        state = learner_state(step)
        fleet.publisher.publish(state, step)
        assert all(host.holds(state) for host in fleet.hosts.values())
    assert fleet.memory.opens == 4
    fleet.publisher.close()
    assert fleet.memory.opened == []


def test_slots_that_a_host_may_still_read_are_never_filled_again() -> None:
    fleet = slotted()
    first = set(fleet.memory.opened)
    fleet.transport.inject(Fault(kind=FaultKind.DROP, host="b", message="Deliver", occurrence=2))
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    heal(fleet)
    assert len(set(fleet.memory.opened)) == 2
    assert not first & set(fleet.memory.opened)


def test_a_learner_streams_again_what_can_be_leased_no_more() -> None:
    fleet = at_old("lease")
    assert isinstance(fleet, LeasingFleet)
    fleet.memory.hidden = True
    fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}
    assert [host.serving.pauses for host in fleet.hosts.values()] == [2, 2]
    fleet.memory.hidden = False
    heal(fleet)


def test_slots_that_cannot_be_opened_are_let_go_and_leave_the_old_version() -> None:
    fleet = slotted()
    fleet.transport.lose_publisher()
    assert fleet.memory.opened == []
    fleet.memory.unreachable = True
    with pytest.raises(UpdateAborted, match="cannot join the learner's way for buckets: the learner's device"):
        fleet.publisher.publish(NEW, 2)
    assert fleet.memory.opened == []
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    fleet.memory.unreachable = False
    heal(fleet)


def test_a_slot_that_is_shorter_than_its_bucket_tears_nobody_silently() -> None:
    fleet = slotted()
    receiver = fleet.hosts["a"].receiver
    short = fleet.memory.buffer(100, torch.device("cpu")).memory
    fleet.transport.lose_publisher()
    before(
        fleet,
        ("Offer", 1),
        "a",
        lambda: receiver.handle(Join(sequence=1, wire=None, slots=SlotTerms("short", (short, short)))),
    )
    with pytest.raises((UpdateAborted, CommitIncomplete), match="bytes and its slot 100"):
        fleet.publisher.publish(NEW, 2)
    assert set(contents_of(fleet).values()) <= {"old", "torn"}
    heal(fleet)


def test_a_way_that_is_neither_a_wire_nor_slots_is_refused() -> None:
    fleet = slotted()
    reply = fleet.hosts["a"].receiver.handle(Join(sequence=1, wire=None, slots=None))
    assert isinstance(reply, Refused)
    assert "a way is a wire or slots, and neither came" in reply.reason


def test_no_way_is_joined_while_an_update_is_under_way() -> None:
    fleet = slotted()
    replies = []

    def join() -> None:
        replies.append(fleet.hosts["a"].receiver.handle(Join(sequence=1, wire=None, slots=None)))

    before(fleet, ("Deliver", 2), "a", join)
    fleet.publisher.publish(NEW, 2)
    assert [type(reply).__name__ for reply in replies] == ["Refused"]
    assert "it ends first" in replies[0].reason
    assert contents_of(fleet) == {"a": "new", "b": "new"}


def names_of_wires(fleet: WiredFleet) -> set[str]:
    return {host.receiver._known.way for host in fleet.hosts.values()}


def test_a_wire_is_joined_once_for_many_updates() -> None:
    fleet = wired()
    first = names_of_wires(fleet)
    for step in range(2, 6):
        state = learner_state(step)
        fleet.publisher.publish(state, step)
        assert all(host.holds(state) for host in fleet.hosts.values())
    assert names_of_wires(fleet) == first
    assert len(first) == 1


@pytest.mark.parametrize("host", ["a", "b"])
def test_a_host_that_left_the_wire_is_met_on_a_new_one(host: str) -> None:
    fleet = wired()
    first = names_of_wires(fleet)
    fleet.transport.disconnected(host)
    fleet.publisher.publish(NEW, 2)  # and not: on the old one, where its place is taken
    assert contents_of(fleet) == {"a": "new", "b": "new"}
    assert not names_of_wires(fleet) & first


def test_a_host_that_does_not_come_to_the_meeting_is_named_and_nothing_is_offered() -> None:
    fleet = wired()
    fleet.transport.lose_publisher()
    fleet.wires.absent.add("b")
    with pytest.raises(UpdateAborted, match="b: cannot join the learner's way") as caught:
        fleet.publisher.publish(NEW, 2)
    assert set(caught.value.hosts) == {"a", "b"}  # nobody is on a wire without the other
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    fleet.wires.absent.clear()
    heal(fleet)


@pytest.mark.parametrize("host", ["a", "b"])
def test_bytes_that_arrive_wrong_at_one_host_tear_that_one_by_name(host: str) -> None:
    fleet = wired()
    fleet.wires.damaged.add(host)
    with pytest.raises(CommitIncomplete, match=rf"{EMBEDDING}: embed has digest") as caught:
        fleet.publisher.publish(NEW, 2)
    assert (list(caught.value.torn), caught.value.unknown) == ([host], {})
    assert contents_of(fleet) == {"a": "new", "b": "new"} | {host: "torn"}
    heal(fleet)


@pytest.mark.parametrize("occurrence", [1, 2, BUCKETS])
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_host_that_misses_a_bucket_is_never_served_the_next_in_its_place(host: str, occurrence: int) -> None:
    fleet = wired()
    fleet.wires.eager = True  # the learner does not see it on the wire
    fleet.transport.inject(Fault(kind=FaultKind.DROP, host=host, message="Deliver", occurrence=occurrence))
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    assert set(contents_of(fleet).values()) == {"torn"}
    heal(fleet)


def test_a_fleet_that_grows_is_met_on_a_new_wire() -> None:
    fleet = WiredFleet(3)
    wires = fleet.transport._wires
    late = wires.pop("c")
    fleet.publisher.publish(OLD, 1)
    first = names_of_wires(fleet) - {""}
    wires["c"] = late
    fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "new", "b": "new", "c": "new"}
    assert not names_of_wires(fleet) & first
    assert fleet.hosts["c"].receiver.state is State.IDLE


def test_tensors_that_come_one_by_one_are_copied_for_the_wire() -> None:
    fleet = wired()
    buffer = torch.empty(1 << 20, dtype=torch.uint8)

    def one_by_one() -> Iterator[tuple[str, Tensor]]:
        for name, tensor in NEW.items():
            held = buffer[: tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            held.copy_(tensor)
            yield name, held

    fleet.publisher.publish(one_by_one(), 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}


def test_strided_tensors_are_copied_for_the_wire() -> None:
    fleet = wired()
    fleet.publisher.publish({n: t.t().contiguous().t() if t.dim() == 2 else t for n, t in NEW.items()}, 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}
