"""Buckets over a wire that hosts keep before they vote: a full second copy, which outlives the learner."""

import pytest
from fakes.weights_deliveries import (
    BUCKETS,
    NEW,
    OLD,
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
from fakes.weights_fleet import learner_state

from weights.errors import CommitIncomplete, UpdateAborted
from weights.messages import Stage, Staged
from weights.staged_payload import Shadow
from weights.state import Outcome
from weights.transports.faults import Fault, FaultKind

NORM = "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"


def shadowed(hosts: int = 2) -> WiredFleet:
    fleet = at_old("shadow", hosts)
    assert isinstance(fleet, WiredFleet)
    return fleet


@pytest.mark.parametrize("fault", every_fault("shadow"), ids=name_of)
def test_a_fault_leaves_no_host_between_two_versions(fault: Fault) -> None:
    strike("shadow", fault)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(
    ("message", "host", "left"),
    [
        (("Offer", 1), "b", "old"),
        (("Stage", 1), "b", "old"),
        (("Stage", BUCKETS), "b", "old"),
        (("Vote", 1), "b", "old"),
        (("Commit", 1), "a", "old"),
        (("Commit", 1), "b", "new"),
        (("Commit", 1), "c", "new"),
    ],
)
def test_a_learner_that_dies_leaves_one_version_everywhere(
    message: tuple[str, int], host: str, left: str, silent: bool
) -> None:
    fleet = shadowed(3)
    die(fleet, message, host, silent=silent)
    assert set(contents_of(fleet).values()) == {left}
    heal(fleet)


def test_a_host_that_voted_commits_from_its_own_copy_whatever_became_of_the_learner_s_tensors() -> None:
    fleet = shadowed()
    state = learner_state(2)

    def gone() -> None:
        for tensor in state.values():
            tensor.zero_()

    before(fleet, ("Commit", 1), "a", gone)
    fleet.publisher.publish(state, 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}


@pytest.mark.parametrize("message", [("Offer", 1), ("Stage", BUCKETS - 1)])
def test_a_source_that_changes_before_it_is_sent_is_refused_by_name(message: tuple[str, int]) -> None:
    fleet = shadowed()
    state = learner_state(2)
    before(fleet, message, "a", lambda: state[NORM].add_(1))  # it lies in the last bucket
    with pytest.raises(UpdateAborted, match=rf"{NORM}: the bytes that arrived have digest") as caught:
        fleet.publisher.publish(state, 2)
    assert set(caught.value.hosts) == {"a", "b"}
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    heal(fleet)


@pytest.mark.parametrize("host", ["a", "b"])
def test_bytes_that_arrive_wrong_at_one_host_are_never_voted_for(host: str) -> None:
    fleet = shadowed()
    fleet.wires.damaged.add(host)
    with pytest.raises(UpdateAborted, match=rf"{EMBEDDING}: the bytes that arrived") as caught:
        fleet.publisher.publish(NEW, 2)
    assert list(caught.value.hosts) == [host]
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    assert [each.serving.pauses for each in fleet.hosts.values()] == [1, 1]  # for OLD
    heal(fleet)


@pytest.mark.parametrize("occurrence", [1, 3, BUCKETS])
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_host_that_missed_a_bucket_never_votes_and_is_not_behind_for_ever(host: str, occurrence: int) -> None:
    fleet = shadowed()
    fleet.wires.eager = True  # the learner does not see it on the wire
    fleet.transport.inject(Fault(kind=FaultKind.DROP, host=host, message="Stage", occurrence=occurrence))
    with pytest.raises(UpdateAborted):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    heal(fleet)


def test_a_bucket_that_comes_twice_is_taken_once() -> None:
    fleet = shadowed()
    carry = fleet.transport.carry
    replies = []

    def twice(to, request, segment):
        found = carry(to, request, segment)
        if isinstance(request, Stage):
            replies.append(fleet.hosts[to].receiver.handle(request))
        return found

    fleet.transport.carry = twice  # type: ignore[method-assign]
    fleet.publisher.publish(NEW, 2)
    assert {type(reply) for reply in replies} == {Staged}
    assert len(replies) == 2 * BUCKETS
    assert contents_of(fleet) == {"a": "new", "b": "new"}


def test_a_host_that_cannot_reach_its_sibling_is_undecided_with_a_whole_copy_in_hand() -> None:
    fleet = shadowed()
    fleet.transport.unreachable.add("a")
    die(fleet, ("Commit", 1), "b", silent=False)
    assert contents_of(fleet) == {"a": "new", "b": "torn"}
    assert dict(fleet.transport.settlements)["b"].outcome is Outcome.UNDECIDED
    fleet.transport.unreachable.clear()
    heal(fleet)


def test_when_no_host_can_pause_the_update_is_off_everywhere() -> None:
    fleet = shadowed()
    for host in fleet.hosts.values():
        host.serving.busy = True
    with pytest.raises(UpdateAborted, match="could not pause"):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    for host in fleet.hosts.values():
        host.serving.busy = False
    heal(fleet)


def test_a_host_that_could_not_pause_follows_the_one_that_committed() -> None:
    fleet = shadowed()
    fleet.hosts["b"].serving.misses = 3
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}


def test_the_second_copy_is_kept_from_one_update_to_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[tuple[int, int]] = []
    take = Shadow.take

    def taking(shadow: Shadow, part: int):
        bucket = take(shadow, part)
        taken.append((part, bucket.data_ptr()))
        return bucket

    monkeypatch.setattr(Shadow, "take", taking)
    fleet = shadowed(1)
    for step in range(2, 6):
        fleet.publisher.publish(learner_state(step), step)
    assert len(taken) == 5 * BUCKETS
    assert len(set(taken)) == BUCKETS


def test_a_subset_is_written_over_the_content_that_it_names() -> None:
    fleet = shadowed()
    part = {name: NEW[name] for name in (NORM, "model.layers.0.mlp.gate.weight")}
    version = fleet.publisher.publish(part, 2, base=version_of(1, OLD).digest).version
    assert version == version_of(2, OLD | part)
    assert all(host.holds(OLD | part) for host in fleet.hosts.values())
    heal(fleet)


def test_tensors_that_come_one_by_one_are_copied_for_the_wire() -> None:
    fleet = shadowed()
    fleet.publisher.publish(iter(NEW.items()), 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}
