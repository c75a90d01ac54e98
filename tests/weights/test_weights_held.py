"""A learner's tensors where they are: what they make of an update, how they are taken again, what cannot be sent."""

import gc
import weakref

import pytest
import torch
from fakes.weights_fleet import BUCKET_BYTES, TIED, learner_state
from fakes.weights_reach import ProcessMemory
from torch import Tensor

from weights.digest import tensor_digest, wire_bytes
from weights.held import Held
from weights.lease_loader import LeaseLoader, lease_of
from weights.naming import to_wire
from weights.segment_loader import SegmentLoader
from weights.transports.memory import MemoryTransport, SimulatedClock
from weights.wire_loader import copied

NORM = "model.norm.weight"


def wire_of(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in to_wire(state.items()) if name not in TIED}


def test_it_holds_what_to_wire_gives_without_a_copy() -> None:
    state = learner_state(1)
    held = Held(state, TIED)
    wire = wire_of(state)
    assert [spec.name for spec in held.catalogue.tensors] == list(wire)
    assert [data.data_ptr() for data in held.data] == [tensor.data_ptr() for tensor in wire.values()]
    assert [held.digests()[n] for n in range(len(wire))] == [tensor_digest(*pair) for pair in wire.items()]


def test_its_digests_are_of_what_the_tensors_hold_now() -> None:
    state = learner_state(1)
    held = Held(state, TIED)
    before = held.digests()
    state[NORM].add_(1)
    assert list(held.digests().differing(before)) == [held.catalogue.places[NORM]]


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state | {NORM: state[NORM].clone()},
        lambda state: state | {NORM: state[NORM].view(32, 1)},
        lambda state: state | {NORM: state[NORM].view(torch.float16)},
        lambda state: {name: tensor for name, tensor in state.items() if name != NORM},
        lambda state: state | {"more": torch.zeros(1)},
        lambda state: dict(reversed(state.items())),
    ],
    ids=["memory", "shape", "dtype", "one less", "one more", "order"],
)
def test_the_same_tensors_are_taken_again_and_others_are_not(change) -> None:
    state = learner_state(1)
    held = Held(state, TIED)
    assert held.take(dict(state))
    assert not held.take(change(state))


def test_between_updates_a_learner_may_free_its_tensors() -> None:
    state = learner_state(1)
    held = Held(state, TIED)
    norm = weakref.ref(state[NORM].untyped_storage())
    held.let_go()
    assert held.data == ()
    state.clear()
    gc.collect()
    assert norm() is None


def test_tensors_that_are_taken_again_have_their_bytes_again() -> None:
    state = learner_state(1)
    held = Held(state, TIED)
    places = [data.data_ptr() for data in held.data]
    held.let_go()
    assert held.take(state)
    assert [data.data_ptr() for data in held.data] == places
    slot = torch.zeros(BUCKET_BYTES, dtype=torch.uint8)
    held.fill(0, BUCKET_BYTES, slot)
    assert torch.equal(slot, held.data[0][:BUCKET_BYTES])


def around_all(memory: ProcessMemory, held: Held) -> dict[int, tuple]:
    starts = {data.untyped_storage().data_ptr() for data in held.data}
    return {start: memory.around(start, held.device) for start in starts}


def test_memory_that_was_made_anew_in_the_same_place_gets_a_whole_new_lease() -> None:
    state = learner_state(1)
    first, second = ProcessMemory(), ProcessMemory()
    second.buffer(1, torch.device("cpu"))  # so that its numbers are others
    for memory in (first, second):
        memory.share(state)
    held = Held(state, TIED)
    before = lease_of(held, around_all(first, held))
    held.let_go()
    assert held.take(state)
    after = lease_of(held, around_all(second, held))
    assert after.places == before.places
    assert after.id != before.id
    assert after.pieces(held.catalogue) == before.pieces(held.catalogue)


def test_tensors_in_one_storage_are_leased_as_one_memory() -> None:
    block = torch.zeros(300, dtype=torch.uint8)
    state = {"a": block[0:100], "b": block[100:100], "c": block[200:]}
    memory = ProcessMemory()
    memory.share(state)
    held = Held(state, {})
    lease = lease_of(held, around_all(memory, held))
    assert len(lease.memories) == 1
    assert lease.places == ((0, 0), (0, 0), (0, 200))


@pytest.mark.parametrize("bucket_bytes", [4096, 8192, 1 << 20])
def test_buckets_are_filled_with_the_tensors_bytes(bucket_bytes: int) -> None:
    state = learner_state(1)
    held = Held(state, TIED)
    gathered = {name: torch.zeros_like(wire_bytes(tensor)) for name, tensor in wire_of(state).items()}
    for index, bucket in enumerate(held.buckets(bucket_bytes)):
        slot = torch.full((bucket_bytes,), 7, dtype=torch.uint8)
        held.fill(index, bucket_bytes, slot)
        assert torch.all(slot[bucket.bytes :] == 7)
        for piece in bucket.pieces:
            part = slot[piece.bucket_offset : piece.bucket_offset + piece.bytes]
            name = held.catalogue.tensors[piece.tensor].name
            gathered[name][piece.tensor_offset : piece.tensor_offset + piece.bytes] = part
    for name, tensor in wire_of(state).items():
        assert torch.equal(gathered[name], wire_bytes(tensor))


def test_a_tied_tensor_of_its_own_is_compared_in_every_update() -> None:
    state = learner_state(1)
    state["lm_head.weight"] = state["lm_head.weight"].clone()
    held = Held(state, TIED)
    held.digests()
    state["lm_head.weight"][0, 0] += 1
    with pytest.raises(ValueError, match=r"lm_head\.weight = model\.embed_tokens\.weight"):
        held.digests()
    state["lm_head.weight"][0, 0] = state["model.embed_tokens.weight"][0, 0]
    held.digests()


def test_a_tied_tensor_without_the_one_that_it_is_tied_to_is_refused() -> None:
    with pytest.raises(ValueError, match=r"lm_head\.weight"):
        Held({name: t for name, t in learner_state(1).items() if name != TIED["lm_head.weight"]}, TIED).digests()


@pytest.mark.parametrize(
    ("state", "complaint"),
    [
        ({"a": torch.zeros(4, 6).t(), "b": torch.zeros(3)}, "a: not contiguous"),
        ({"a": torch.zeros(3), "b": torch.zeros(3, device="meta")}, "on .*meta"),
        ({}, "no device"),
    ],
)
def test_tensors_that_cannot_be_sent_from_where_they_are_are_named(state: dict[str, Tensor], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Held(state, {})


def test_a_name_that_comes_twice_is_not_copied_over_itself() -> None:
    pairs = [(NORM, torch.zeros(2)), (NORM, torch.ones(2))]
    with pytest.raises(ValueError, match=f"{NORM} comes twice"):
        copied(pairs)


def test_a_copy_does_not_follow_its_learner() -> None:
    state = {NORM: torch.zeros(4, 6).t()}
    held = copied(state)
    state[NORM].fill_(1)
    assert held[NORM].is_contiguous()
    assert torch.equal(held[NORM], torch.zeros(6, 4))


def test_a_loader_holds_on_to_nothing_between_updates() -> None:
    memory = ProcessMemory()
    transport = MemoryTransport({}, SimulatedClock(), silence_s=1.0)
    loader = LeaseLoader(memory, SegmentLoader(transport, BUCKET_BYTES), BUCKET_BYTES)
    memory.hidden = True
    state = learner_state(1)
    norm = weakref.ref(state[NORM].untyped_storage())
    cargo = loader.load(state, TIED)
    assert cargo.buckets == 6
    loader.unload(complete=True)
    del cargo
    state.clear()
    gc.collect()
    assert norm() is None
