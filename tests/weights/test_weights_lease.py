"""Hosts read the learner's own memory: what a fault, a change or a wrong lease may leave, and what stays open."""

from dataclasses import replace

import pytest
import torch
from fakes.weights_deliveries import (
    NEW,
    NEXT,
    OLD,
    LeasingFleet,
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
from fakes.weights_fleet import (
    BUCKET_BYTES,
    TIED,
    FakeHost,
    MemoryFleet,
    hosted_from,
    learner_state,
    offer_of,
    same_bits,
)
from fakes.weights_reach import ProcessMemory
from torch import Tensor

from weights.delivery import Delivery
from weights.errors import CommitIncomplete, ManifestError, UpdateAborted
from weights.export import CudaExporter
from weights.held import Held
from weights.lease import Lease
from weights.lease_loader import LeaseLoader, lease_of
from weights.manifest import Manifest
from weights.messages import Commit, Committed, Offered, Refused, Reply, Request, Stage, Staged, Vote, Voted
from weights.publisher import Publisher
from weights.segment_loader import SegmentLoader
from weights.state import Outcome, State
from weights.transports.faults import Fault, FaultKind

NORM = "model.norm.weight"


def leasing(hosts: int = 2) -> LeasingFleet:
    fleet = at_old("lease", hosts)
    assert isinstance(fleet, LeasingFleet)
    return fleet


@pytest.mark.parametrize("fault", every_fault("lease"), ids=name_of)
def test_a_fault_leaves_no_host_between_two_versions(fault: Fault) -> None:
    strike("lease", fault)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(("message", "host"), [(m, h) for m in ("Offer", "Stage", "Vote") for h in "ab"])
def test_a_learner_that_dies_before_the_commit_leaves_the_old_version(message: str, host: str, silent: bool) -> None:
    fleet = leasing()
    die(fleet, (message, 1), host, silent=silent)
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    fleet.transport.lose_publisher()  # of those that had no update under way
    assert fleet.memory.opened == []
    heal(fleet)


@pytest.mark.parametrize("silent", [False, True])
@pytest.mark.parametrize(
    ("host", "left"),
    [
        ("a", {"a": "old", "b": "old", "c": "old"}),
        ("b", {"a": "new", "b": "torn", "c": "torn"}),
        ("c", {"a": "new", "b": "new", "c": "torn"}),
    ],
)
def test_a_learner_that_dies_while_it_commits_takes_the_bytes_with_it(
    host: str, left: dict[str, str], silent: bool
) -> None:
    fleet = leasing(3)
    die(fleet, ("Commit", 1), host, silent=silent)
    assert contents_of(fleet) == left
    for name, settlement in fleet.transport.settlements:
        if left[name] == "torn":
            assert settlement.outcome is Outcome.TORN
            assert "took the commit; the bytes of this update went with its learner" in settlement.reason
    fleet.transport.lose_publisher()
    assert fleet.memory.opened == []
    heal(fleet)


@pytest.mark.parametrize("silent", [False, True])
def test_a_host_that_voted_and_cannot_reach_its_sibling_is_undecided(silent: bool) -> None:
    fleet = leasing()
    fleet.transport.unreachable.add("a")
    die(fleet, ("Commit", 1), "b", silent=silent)
    assert contents_of(fleet) == {"a": "new", "b": "torn"}
    assert dict(fleet.transport.settlements)["b"].outcome is Outcome.UNDECIDED
    fleet.transport.unreachable.clear()
    heal(fleet)


@pytest.mark.parametrize("host", ["a", "b"])
def test_a_source_that_changes_before_it_is_read_is_refused_by_name(host: str) -> None:
    fleet = leasing()
    state = learner_state(2)
    before(fleet, ("Stage", 1), host, lambda: state[NORM].add_(1))
    with pytest.raises(UpdateAborted, match=rf"{host}: cannot vote .*\n +{NORM}: the bytes that arrived") as caught:
        fleet.publisher.publish(state, 2)
    assert set(caught.value.hosts) == {"a", "b"} if host == "a" else {"b"}
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    assert [each.serving.pauses for each in fleet.hosts.values()] == [1, 1]  # for OLD
    heal(fleet)


@pytest.mark.parametrize("when", ["Vote", "Commit"])
def test_a_source_that_changes_after_it_was_read_tears_the_hosts_that_copy_it(when: str) -> None:
    fleet = leasing()
    state = learner_state(2)
    before(fleet, (when, 1), "b", lambda: state[NORM].add_(1))
    with pytest.raises(CommitIncomplete, match=rf"{NORM}: norm has digest") as caught:
        fleet.publisher.publish(state, 2)
    if when == "Vote":
        assert (caught.value.committed, set(caught.value.torn)) == ((), {"a", "b"})
        assert contents_of(fleet) == {"a": "torn", "b": "torn"}
    else:
        assert (caught.value.committed, set(caught.value.torn)) == (("a",), {"b"})
        assert contents_of(fleet) == {"a": "new", "b": "torn"}
    assert caught.value.unknown == {}
    heal(fleet)


def test_no_byte_is_copied_at_the_learner_and_its_memory_is_opened_once() -> None:
    fleet = leasing()
    state = learner_state(1)
    fleet.publisher.publish(state, 2)
    opens, opened = fleet.memory.opens, sorted(fleet.memory.opened)
    distinct = {tensor.untyped_storage().data_ptr() for tensor in state.values()}
    assert len(opened) == 2 * len(distinct)
    for step in range(3, 8):
        for tensor in {tensor.data_ptr(): tensor for tensor in state.values()}.values():
            tensor.copy_(torch.roll(tensor, 1, 0))
        version = fleet.publisher.publish(state, step).version
        assert version == version_of(step, state)
        assert all(host.holds(state) for host in fleet.hosts.values())
    assert fleet.memory.opens == opens
    assert sorted(fleet.memory.opened) == opened
    fleet.publisher.close()
    assert fleet.memory.opened == []


def test_memory_in_another_place_is_opened_anew_and_the_old_is_let_go() -> None:
    fleet = leasing()
    for step in (2, 3, 4):
        state = learner_state(step)  # kept by the fake: no address comes twice
        fleet.publisher.publish(state, step)
        assert len(fleet.memory.opened) == 2 * len({tensor.data_ptr() for tensor in state.values()})
        assert all(host.holds(state) for host in fleet.hosts.values())


def test_a_host_that_comes_back_opens_what_its_sibling_has_open() -> None:
    fleet = leasing()
    state = learner_state(2)
    fleet.publisher.publish(state, 2)
    opens = fleet.memory.opens
    fleet.transport.disconnected("b")
    state[NORM].add_(1)
    fleet.publisher.publish(state, 3)
    assert all(host.holds(state) for host in fleet.hosts.values())
    assert fleet.memory.opens == opens + len(fleet.memory.opened) // 2  # b's; a's were open


def test_the_learner_s_own_tensors_are_neither_kept_nor_changed() -> None:
    fleet = leasing()
    state = learner_state(2)
    fleet.publisher.publish(state, 2)
    assert same_bits(hosted_from(state), hosted_from(learner_state(2)))
    for tensor in state.values():
        tensor.zero_()
    assert all(host.holds(NEW) for host in fleet.hosts.values())


def test_tensors_that_come_one_by_one_travel_in_segments_and_the_lease_stays() -> None:
    fleet = leasing()
    held = sorted(fleet.memory.opened)
    fleet.publisher.publish(iter(NEW.items()), 2)
    assert contents_of(fleet) == {"a": "new", "b": "new"}
    assert sorted(fleet.memory.opened) == held
    opens = fleet.memory.opens
    fleet.publisher.publish(OLD, 3)
    assert fleet.memory.opens == opens
    assert all(host.holds(OLD) for host in fleet.hosts.values())


def test_a_state_dict_on_a_cpu_travels_in_segments_and_needs_no_driver() -> None:
    fleet = MemoryFleet(load=lambda transport, size: LeaseLoader(CudaExporter(), SegmentLoader(transport, size), size))
    for step in (1, 2):
        fleet.publisher.publish(learner_state(step), step)
        assert all(host.holds(learner_state(step)) for host in fleet.hosts.values())


def test_memory_that_cannot_be_opened_is_said_and_leaves_the_old_version() -> None:
    fleet = leasing()
    fleet.memory.unreachable = True
    with pytest.raises(UpdateAborted, match="device is not visible here") as caught:
        fleet.publisher.publish(NEW, 2)
    assert set(caught.value.hosts) == {"a", "b"}
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    assert fleet.memory.opened == []
    fleet.memory.unreachable = False
    heal(fleet)


def test_memory_that_is_opened_half_way_is_let_go() -> None:
    fleet = leasing()
    fleet.memory.share(NEW)
    norm, _ = fleet.memory.around(NEW[NORM].data_ptr(), torch.device("cpu"))
    fleet.memory.short.add(norm.handle)
    with pytest.raises(UpdateAborted, match="the lease is of more memory than there is: memory") as caught:
        fleet.publisher.publish(NEW, 2)
    assert set(caught.value.hosts) == {"a", "b"}
    assert fleet.memory.opened == []
    assert contents_of(fleet) == {"a": "old", "b": "old"}


def test_a_second_learner_is_turned_away_until_the_first_has_left() -> None:
    fleet = leasing()
    second = Publisher(fleet.transport, run="second", deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=fleet.clock)
    with pytest.raises(UpdateAborted, match="has a publisher already"):
        second.publish(NEW, 1)
    fleet.publisher.publish(NEXT, 3)
    fleet.publisher.close()
    assert second.publish(NEW, 1).version == version_of(1, NEW, "second")
    assert all(host.holds(NEW) for host in fleet.hosts.values())


class LeasedDriver:
    """Speaks the protocol to one host, lease in hand."""

    def __init__(self) -> None:
        self.memory = ProcessMemory()
        self.host = FakeHost("a", reach=self.memory)
        self.manifest, self.lease = self.leased(learner_state(1))

    def leased(self, state: dict[str, Tensor]) -> tuple[Manifest, Lease]:
        self.memory.share(state)
        held = Held(state, TIED)
        around = {
            data.untyped_storage().data_ptr(): self.memory.around(data.untyped_storage().data_ptr(), held.device)
            for data in held.data
        }
        return Manifest(held.catalogue, held.digests()), lease_of(held, around)

    def say(self, request: Request) -> Reply:
        return self.host.receiver.handle(request)

    def offer(self, manifest: Manifest | None = None, update: str = "u", step: int = 1) -> Reply:
        offered = self.manifest if manifest is None else manifest
        return self.say(offer_of(offered, update=update, step=step, delivery=Delivery.LEASE))

    def stage(self, lease: Lease | None, *, named: str = "", update: str = "u", part: int = 0) -> Reply:
        terms = "" if lease is None else lease.id
        return self.say(Stage(sequence=3, update=update, bucket=part, lease=named or terms, terms=lease))

    def finish(self, update: str = "u") -> None:
        assert isinstance(self.say(Vote(sequence=4, update=update)), Voted)
        assert isinstance(self.say(Commit(sequence=5, update=update)), Committed)


def refused(driver: LeasedDriver, reply: Reply, reason: str) -> None:
    assert isinstance(reply, Refused)
    assert reason in reply.reason
    assert driver.host.receiver.state is State.IDLE
    assert driver.host.serving.serves == driver.host.initial


def test_a_lease_is_read_once_and_may_come_again() -> None:
    driver = LeasedDriver()
    assert isinstance(driver.offer(), Offered)
    assert isinstance(driver.stage(driver.lease), Staged)
    assert isinstance(driver.stage(driver.lease), Staged)
    driver.finish()
    assert driver.host.holds(learner_state(1))
    assert driver.memory.opens == len(driver.lease.memories)


def test_a_second_lease_neither_closes_nor_replaces_the_one_that_was_read() -> None:
    driver = LeasedDriver()
    _, other = driver.leased(learner_state(1))
    driver.offer()
    assert isinstance(driver.stage(driver.lease), Staged)
    assert isinstance(driver.stage(other), Staged)
    assert driver.memory.opened == [memory.handle for memory in driver.lease.memories]
    assert not set(driver.lease.memories) & set(other.memories)
    driver.finish()
    assert driver.host.holds(learner_state(1))


def test_a_lease_that_the_host_does_not_hold_needs_its_terms() -> None:
    driver = LeasedDriver()
    driver.offer()
    refused(driver, driver.stage(None, named="0" * 32), "holds no lease 00000000: send its terms")


def test_a_lease_under_another_name_is_refused() -> None:
    driver = LeasedDriver()
    driver.offer()
    refused(driver, driver.stage(driver.lease, named="0" * 32), f"the terms are of lease {driver.lease.id[:8]}")


@pytest.mark.parametrize("place", [(99, 0), (0, 1 << 40)])
def test_a_lease_that_leads_out_of_its_memory_is_refused(place: tuple[int, int]) -> None:
    driver = LeasedDriver()
    driver.offer()
    wrong = replace(driver.lease, places=(place, *driver.lease.places[1:]))
    refused(driver, driver.stage(wrong), f"leads out of its memory:\n  {driver.manifest.catalogue.tensors[0].name}")
    assert driver.memory.opens == 0


def test_a_lease_that_ends_a_byte_too_early_is_refused() -> None:
    driver = LeasedDriver()
    driver.offer()
    memories = tuple(replace(memory, bytes=memory.bytes - 1) for memory in driver.lease.memories)
    refused(driver, driver.stage(replace(driver.lease, memories=memories)), "leads out of its memory")


def test_a_lease_of_another_catalogue_is_refused() -> None:
    driver = LeasedDriver()
    driver.offer()
    refused(driver, driver.stage(replace(driver.lease, catalogue="0" * 32)), "catalogue 00000000, the update of")


def test_a_lease_that_is_open_does_not_serve_another_catalogue() -> None:
    driver = LeasedDriver()
    driver.offer()
    driver.stage(driver.lease)
    driver.finish()
    version = driver.host.receiver.version
    reordered = dict(reversed(learner_state(1).items()))
    manifest, _ = driver.leased(reordered)
    assert isinstance(driver.offer(manifest, "v", 2), Offered)
    reply = driver.stage(None, named=driver.lease.id, update="v")
    assert isinstance(reply, Refused)
    assert f"lease {driver.lease.id[:8]} is of catalogue {driver.lease.catalogue[:8]}" in reply.reason
    assert (driver.host.receiver.state, driver.host.receiver.version) == (State.IDLE, version)


def test_a_leased_update_has_one_part() -> None:
    driver = LeasedDriver()
    driver.offer()
    refused(driver, driver.stage(driver.lease, part=1), "part 1 is none of a leased update's 1")


def test_segments_do_not_stage_a_leased_update() -> None:
    driver = LeasedDriver()
    driver.offer()
    reply = driver.host.receiver.handle(Stage(sequence=3, update="u", bucket=0), torch.zeros(9, dtype=torch.uint8))
    refused(driver, reply, "holds no lease")


def test_a_vote_without_the_lease_is_refused() -> None:
    driver = LeasedDriver()
    driver.offer()
    refused(driver, driver.say(Vote(sequence=4, update="u")), "bucket 0: did not arrive")


def test_a_lease_crosses_the_wire_as_it_is() -> None:
    driver = LeasedDriver()
    again = Lease.from_plain(driver.lease.to_plain())
    assert (again, again.id) == (driver.lease, driver.lease.id)
    for change in ({"places": [[0]]}, {"places": [[-1, 0]]}, {"memories": [["h", "i", 0]]}, {"more": 1}):
        with pytest.raises(ManifestError):
            Lease.from_plain({**driver.lease.to_plain(), **change})


def test_a_lost_connection_to_one_host_tears_that_one_only() -> None:
    fleet = leasing()
    fleet.transport.inject(Fault(kind=FaultKind.DISCONNECT, host="b", message="Commit"))
    with pytest.raises(CommitIncomplete) as caught:
        fleet.publisher.publish(NEW, 2)
    assert caught.value.committed == ("a",)
    assert contents_of(fleet) == {"a": "new", "b": "torn"}
    heal(fleet)
