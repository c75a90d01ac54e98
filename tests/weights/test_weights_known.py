"""What a host keeps of its learner between updates, and what it lets go."""

import gc
import weakref
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fakes.weights_deliveries import NEW, OLD, LeasingFleet, contents_of, heal, version_of
from fakes.weights_fleet import BUCKET_BYTES, MemoryFleet, layout, learner_state, offer_of, storage
from fakes.weights_reach import ProcessMemory

from weights.catalogue import Catalogue, TensorSpec
from weights.delivery import Delivery
from weights.digest import tensor_digest
from weights.errors import ManifestError, TransportError
from weights.known import KEPT_CATALOGUES, Known
from weights.lease import Lease, SlotTerms
from weights.manifest import Manifest
from weights.messages import PROTOCOL, Hello, Join, Offer, Stage, Welcome
from weights.naming import to_wire
from weights.reach import NoReach


def manifest_of(state: dict[str, torch.Tensor]) -> Manifest:
    return Manifest.of(
        (TensorSpec(name=name, shape=tuple(tensor.shape), dtype=tensor.dtype), tensor_digest(name, tensor))
        for name, tensor in to_wire(state.items())
    )


def unnamed(offer: Offer) -> Offer:
    """As a learner makes it to hosts that know its catalogue."""
    return replace(offer, tensors=None)


@pytest.fixture
def memory() -> ProcessMemory:
    return ProcessMemory()


@pytest.fixture
def known(memory: ProcessMemory) -> Known:
    parameters = storage()
    return Known("a", layout(parameters), parameters, memory)


def test_a_catalogue_is_placed_once(known: Known) -> None:
    offer = offer_of(manifest_of(OLD))
    placement = known.placement(offer)
    assert known.placement(offer) is placement
    assert known.placement(unnamed(offer)) is placement
    assert known.catalogue == offer.catalogue


def test_a_catalogue_that_is_not_known_has_to_be_given(known: Known) -> None:
    with pytest.raises(ManifestError, match=r"knows no catalogue .*: offer its tensors"):
        known.placement(unnamed(offer_of(manifest_of(OLD))))


def test_tensors_under_another_catalogue_s_name_are_refused(known: Known) -> None:
    offer = replace(offer_of(manifest_of(OLD)), catalogue="0" * 32)
    with pytest.raises(ManifestError, match="not 00000000"):
        known.placement(offer)


def test_a_full_update_s_catalogue_may_come_as_a_subset_and_back(known: Known) -> None:
    manifest = manifest_of(OLD)
    full, subset = offer_of(manifest), offer_of(manifest, base=manifest.digest)
    placement = known.placement(full)
    assert known.placement(unnamed(subset)).catalogue is placement.catalogue
    assert known.placement(unnamed(full)) is placement


def test_a_subset_s_catalogue_is_no_full_update_s(known: Known) -> None:
    part = Manifest.of([(manifest_of(OLD).catalogue.tensors[0], manifest_of(OLD).digests[0])])
    known.placement(offer_of(part, base=part.digest))
    with pytest.raises(ManifestError, match="missing"):
        known.placement(unnamed(offer_of(part)))


def test_a_learner_that_publishes_everything_as_a_subset_is_understood() -> None:
    fleet = MemoryFleet()
    fleet.publisher.publish(OLD, 1)
    fleet.publisher.publish(NEW, 2, base=version_of(1, OLD).digest)
    assert contents_of(fleet) == {"a": "new", "b": "new"}
    heal(fleet)


def test_few_catalogues_are_kept_and_the_oldest_goes_first(known: Known) -> None:
    tensors = manifest_of(OLD).catalogue.tensors
    offers = [
        offer_of(Manifest.of([(tensor, manifest_of(OLD).digests[0])]), base=manifest_of(OLD).digest)
        for tensor in tensors[: KEPT_CATALOGUES + 1]
    ]
    for offer in offers[:-1]:
        known.placement(offer)
    known.placement(unnamed(offers[0]))  # used again: it is the youngest now
    known.placement(offers[-1])
    assert known.placement(unnamed(offers[0])).catalogue.id == offers[0].catalogue
    with pytest.raises(ManifestError, match="knows no catalogue"):
        known.placement(unnamed(offers[1]))


def test_a_catalogue_that_does_not_fit_is_not_remembered(known: Known) -> None:
    wrong = Manifest.of([(TensorSpec(name="x", shape=(1,), dtype=torch.bfloat16), manifest_of(OLD).digests[0])])
    for offer in (offer_of(wrong), unnamed(offer_of(wrong))):
        with pytest.raises(ManifestError, match="unknown" if offer.tensors else "knows no catalogue"):
            known.placement(offer)
    assert known.catalogue == ""


def slots(memory: ProcessMemory, size: int = 4096) -> SlotTerms:
    memories = tuple(memory.buffer(size, torch.device("cpu")).memory for _ in range(2))
    return SlotTerms(" ".join(each.identity for each in memories), memories)


def test_a_way_that_is_joined_twice_is_opened_once(known: Known, memory: ProcessMemory) -> None:
    terms = slots(memory)
    for _ in range(2):
        assert known.join(Join(sequence=1, wire=None, slots=terms)) == known.way == terms.name
    assert memory.opens == len(memory.opened) == 2


def test_another_way_takes_the_place_of_the_first(known: Known, memory: ProcessMemory) -> None:
    first, second = slots(memory), slots(memory)
    known.join(Join(sequence=1, wire=None, slots=first))
    known.join(Join(sequence=2, wire=None, slots=second))
    assert known.way == second.name
    assert memory.opened == [each.handle for each in second.memories]


def test_slots_of_which_one_cannot_be_opened_are_both_closed(known: Known, memory: ProcessMemory) -> None:
    terms = slots(memory)
    wrong = replace(terms, memories=(terms.memories[0], replace(terms.memories[1], handle="gone")))
    with pytest.raises(TransportError, match="not visible"):
        known.join(Join(sequence=1, wire=None, slots=wrong))
    assert (known.way, memory.opened) == ("", [])


def test_a_way_without_a_name_or_terms_is_none(known: Known, memory: ProcessMemory) -> None:
    with pytest.raises(ManifestError, match="neither came"):
        known.join(Join(sequence=1, wire=None, slots=None))
    assert known.join(Join(sequence=1, wire=None, slots=replace(slots(memory), name=""))) == ""
    assert len(memory.opened) == 2


@pytest.mark.parametrize("delivery", [Delivery.STREAM, Delivery.SHADOW])
def test_buckets_without_a_way_are_refused(known: Known, delivery: Delivery) -> None:
    offer = offer_of(manifest_of(OLD), delivery=delivery)
    with pytest.raises(ManifestError, match="has joined no way for buckets that works: join first"):
        known.payload(offer, known.placement(offer))


def test_what_was_learned_of_a_learner_is_let_go_with_it(known: Known, memory: ProcessMemory) -> None:
    memory.share(OLD)
    offer = offer_of(manifest_of(OLD), delivery=Delivery.LEASE)
    placement = known.placement(offer)
    wire = dict(to_wire(OLD.items()))
    memories, places = [], []
    for name in (tensor.name for tensor in placement.catalogue.tensors):
        around, start = memory.around(wire[name].data_ptr(), torch.device("cpu"))
        if around not in memories:
            memories.append(around)
        places.append((memories.index(around), start))
    lease = Lease(offer.catalogue, tuple(memories), tuple(places))
    stage = Stage(sequence=1, update="u", bucket=0, lease=lease.id, terms=lease)
    opened = known.opened(stage, placement)
    assert known.opened(replace(stage, terms=None), placement) is opened
    known.join(Join(sequence=2, wire=None, slots=slots(memory)))
    assert known.lease == lease.id
    assert len(memory.opened) == len(memories) + 2
    known.forget_learner()
    assert (known.lease, known.way, known.catalogue, memory.opened) == ("", "", "", [])
    known.forget_learner()  # a second time does nothing
    assert known.placement(unnamed(offer)) is placement  # the layout has not changed


def test_a_slot_of_another_size_takes_the_place_of_the_last(known: Known, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device that needs one; there is none here, so its memory has a size and no bytes."""
    monkeypatch.setattr("weights.known.aside", lambda device: nullcontext())
    monkeypatch.setattr("weights.known.settled", lambda device: None)
    monkeypatch.setattr(known, "_device", torch.device("meta"))
    manifest = manifest_of(OLD)
    slots: list[weakref.ref[torch.Tensor]] = []
    for number in range(6):
        offer = offer_of(manifest, update=f"u{number}", bucket_bytes=BUCKET_BYTES * (1 + number % 2))
        known.payload(offer, known.placement(offer))
        slots += [weakref.ref(slot) for slot in known._slots]
    gc.collect()
    assert [slot() is None for slot in slots] == [True] * 5 + [False]
    known.forget_learner()
    gc.collect()
    assert slots[-1]() is None


def test_a_host_without_a_reach_says_so() -> None:
    memory = ProcessMemory()
    parameters = storage()
    alone = Known("a", layout(parameters), parameters, NoReach())
    with pytest.raises(TransportError, match="its transport is not cuda_ipc"):
        alone.join(Join(sequence=1, wire=None, slots=slots(memory)))


def test_a_host_says_what_it_holds_of_its_learner() -> None:
    fleet = LeasingFleet(1)
    receiver = fleet.hosts["a"].receiver

    def welcome() -> Welcome:
        reply = receiver.handle(Hello(sequence=1, protocol=PROTOCOL, publisher="p"))
        assert isinstance(reply, Welcome)
        return reply

    assert (welcome().catalogue, welcome().lease, welcome().way) == ("", "", "")
    fleet.publisher.publish(OLD, 1)
    assert len(welcome().lease) == 32
    assert (welcome().catalogue, welcome().way) == (Catalogue(manifest_of(OLD).catalogue.tensors).id, "")
    fleet.memory.hidden = True
    fleet.publisher.publish(NEW, 2)
    assert welcome().way
    fleet.transport.lose_publisher()
    assert (welcome().catalogue, welcome().lease, welcome().way) == ("", "", "")


def test_settling_lets_go_of_a_learner_whose_update_a_sibling_ended_first() -> None:
    fleet = LeasingFleet(1)
    fleet.publisher.publish(learner_state(1), 1)
    receiver = fleet.hosts["a"].receiver
    assert fleet.memory.opened != []
    assert receiver.settle(lambda: ()) is None
    assert fleet.memory.opened == []
