"""What a learner may publish, what it is told, and what stays behind."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fakes.weights_deliveries import FLEETS
from fakes.weights_fleet import BUCKET_BYTES, TIED, FakeHost, MemoryFleet, hosted_from, learner_state, same_bits
from torch import Tensor, nn

from weights.digest import Digest, tensor_digest
from weights.errors import DeadlineExceeded, UpdateAborted
from weights.gather import SegmentPool, gather
from weights.naming import HostedLayout, Whole, to_wire
from weights.publisher import Publisher
from weights.state import State
from weights.transports.faults import Fault, FaultKind
from weights.transports.memory import MemoryTransport, SimulatedClock
from weights.version import WeightVersion

DELIVERIES = pytest.mark.parametrize("delivery", FLEETS)


class Learner(nn.Module):
    """A module whose state dict is the small model's, tied as transformers ties it."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        tensors: dict[int, nn.Parameter] = {}
        for name, tensor in state.items():
            path, _, leaf = name.rpartition(".")
            at: nn.Module = self
            for part in path.split("."):
                if not hasattr(at, part):
                    at.add_module(part, nn.Module())
                at = getattr(at, part)
            at.register_parameter(leaf, tensors.setdefault(id(tensor), nn.Parameter(tensor)))


def one_buffer(state: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """As a learner gathers that has room for one tensor at a time."""
    buffer = torch.empty(1 << 20, dtype=torch.uint8)
    for name, tensor in state.items():
        size = tensor.numel() * tensor.itemsize
        held = buffer[:size].view(tensor.dtype).view(tensor.shape)
        held.copy_(tensor)
        yield name, held


STATE = learner_state(1)
SOURCES = {
    "state dict": lambda: STATE,
    "module": lambda: Learner(STATE),
    "pairs": lambda: iter(STATE.items()),
    "one by one in one buffer": lambda: one_buffer(STATE),
    "without the tied alias": lambda: {name: t for name, t in STATE.items() if name not in TIED},
    "tied by value": lambda: STATE | {"lm_head.weight": STATE["lm_head.weight"].clone()},
    "checkpoint names": lambda: dict(to_wire(STATE.items())),
    "strided": lambda: {name: t.t().contiguous().t() if t.dim() == 2 else t for name, t in STATE.items()},
    "another order": lambda: dict(reversed(STATE.items())),
}


@pytest.mark.parametrize("source", SOURCES)
@DELIVERIES
def test_every_way_to_hand_over_a_model_hosts_the_same_bits(source: str, delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    report = fleet.publisher.publish(SOURCES[source](), 7)
    wire = dict(to_wire(STATE.items()))
    assert report.version.digest == Digest.total(tensor_digest(name, tensor) for name, tensor in wire.items())
    assert (report.version.run, report.version.step) == ("run", 7)
    assert report.bytes == sum(tensor.numel() * tensor.itemsize for tensor in wire.values())
    for host in fleet.hosts.values():
        assert host.holds(STATE)
        assert host.serving.serves == report.version
        assert host.serving.pauses == 1


@pytest.mark.gpu
def test_a_learner_on_a_gpu_publishes_to_hosts_on_a_gpu() -> None:
    fleet = MemoryFleet(device="cuda")
    version = fleet.publisher.publish({name: tensor.cuda() for name, tensor in STATE.items()}, 1).version
    assert version == MemoryFleet().publisher.publish(STATE, 1).version
    for host in fleet.hosts.values():
        assert host.holds(STATE)
        assert host.serving.serves == version


def test_the_learner_s_own_tensors_are_neither_kept_nor_changed() -> None:
    fleet = MemoryFleet()
    state = learner_state(1)
    fleet.publisher.publish(state, 1)
    assert same_bits(hosted_from(state), hosted_from(learner_state(1)))
    for tensor in state.values():
        tensor.zero_()
    assert fleet.hosts["a"].holds(learner_state(1))


@DELIVERIES
def test_a_gate_that_the_learner_trains_in_fp32_arrives_in_fp32(delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    state = learner_state(1)
    name = "model.layers.0.mlp.gate.weight"
    state[name] = torch.randn(state[name].shape)
    fleet.publisher.publish(state, 1)
    assert torch.equal(fleet.hosts["a"].parameters["layers.0.gate"], state[name])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda state: state.pop("model.norm.weight"), "model.norm.weight: missing"),
        (lambda state: state.update({"model.extra": torch.zeros(2)}), "model.extra: unknown"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(3).bfloat16()}), r"shape \[3\], hosted \[32\]"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(32)}), "float32, hosted bfloat16"),
        (lambda state: state.update({"model.norm.weight": torch.zeros(32).half()}), "float16, hosted bfloat16"),
    ],
    ids=["missing", "unknown", "shape", "fp32 for a bf16 host", "fp16 for a bf16 host"],
)
@DELIVERIES
def test_a_model_that_does_not_fit_is_refused_before_anything_is_written(change, complaint: str, delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    state = learner_state(1)
    change(state)
    with pytest.raises(UpdateAborted, match=complaint) as caught:
        fleet.publisher.publish(state, 1)
    assert set(caught.value.hosts) == {"a", "b"}
    for host in fleet.hosts.values():
        assert (host.receiver.state, host.serving.serves, host.serving.pauses) == (State.IDLE, host.initial, 0)
    fleet.publisher.publish(learner_state(1), 1)


def test_a_name_that_comes_twice_is_refused() -> None:
    fleet = MemoryFleet()
    pairs = [*STATE.items(), ("model.norm.weight", STATE["model.norm.weight"].clone())]
    with pytest.raises(UpdateAborted, match=r"model.norm.weight: given 2 times"):
        fleet.publisher.publish(pairs, 1)


@DELIVERIES
def test_a_learner_that_untied_its_embedding_is_refused(delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    state = learner_state(1)
    state["lm_head.weight"] = state["lm_head.weight"] + 1
    with pytest.raises(ValueError, match=r"lm_head.weight = model.embed_tokens.weight"):
        fleet.publisher.publish(state, 1)
    fleet.publisher.publish(learner_state(1), 1)


@DELIVERIES
def test_a_tied_tensor_that_begins_where_its_host_does_and_is_another_is_refused(delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    state = learner_state(1)
    state["lm_head.weight"] = state["model.embed_tokens.weight"][:100]
    with pytest.raises(ValueError, match=r"lm_head.weight = model.embed_tokens.weight"):
        fleet.publisher.publish(state, 1)
    fleet.publisher.publish(learner_state(1), 1)


@DELIVERIES
def test_a_learner_that_fails_while_it_gathers_leaves_the_hosts_alone(delivery: str) -> None:
    fleet = FLEETS[delivery](2)

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield "model.norm.weight", torch.zeros(32)
        raise ConnectionError("the trainer's other rank is gone")

    with pytest.raises(ConnectionError):
        fleet.publisher.publish(failing(), 1)
    assert fleet.hosts["a"].receiver.state is State.IDLE
    fleet.publisher.publish(learner_state(1), 1)


@DELIVERIES
def test_a_stale_step_is_refused_and_a_restarted_learner_is_not(delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    fleet.publisher.publish(learner_state(1), 5)
    with pytest.raises(UpdateAborted, match="step 5 of the same run is stale"):
        fleet.publisher.publish(learner_state(2), 5)
    fleet.publisher.close()
    restarted = Publisher(fleet.transport, deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=fleet.clock)
    version = restarted.publish(learner_state(3), 1).version
    assert version.run != "run"
    assert fleet.hosts["a"].serving.serves == version


def test_a_publisher_without_a_run_makes_up_its_own() -> None:
    first, second = (Publisher(MemoryTransport({}, SimulatedClock(), silence_s=1.0)) for _ in range(2))
    assert first.run != second.run


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [({"run": "a b"}, "a run is named"), ({"deadline_s": 0}, "deadline"), ({"bucket_bytes": 5}, "multiple of 4096")],
)
def test_a_publisher_with_nonsense_is_refused(arguments: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        Publisher(MemoryTransport({}, SimulatedClock(), silence_s=1.0), **arguments)


def test_a_step_out_of_range_is_refused_before_anybody_is_asked() -> None:
    with pytest.raises(ValueError, match="a step is in"):
        MemoryFleet().publisher.publish(STATE, -1)


def some_of(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The router's gate and one expert's projection, named as the wire has them."""
    experts = state["model.layers.0.mlp.experts.down_proj"]
    return {
        "model.layers.0.mlp.gate.weight": state["model.layers.0.mlp.gate.weight"],
        "model.layers.0.mlp.experts.1.down_proj.weight": experts[1],
    }


def mixed(state: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """`state` with `some_of` the other in their places."""
    experts = state["model.layers.0.mlp.experts.down_proj"].clone()
    experts[1] = other["model.layers.0.mlp.experts.down_proj"][1]
    gate = other["model.layers.0.mlp.gate.weight"]
    return state | {"model.layers.0.mlp.gate.weight": gate, "model.layers.0.mlp.experts.down_proj": experts}


@DELIVERIES
def test_a_subset_is_written_over_the_content_that_it_names(delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    first = fleet.publisher.publish(STATE, 1)
    other = learner_state(2)
    second = fleet.publisher.publish(some_of(other), 2, base=first.version.digest)
    assert second.bytes == sum(tensor.nbytes for tensor in some_of(other).values())
    for host in fleet.hosts.values():
        assert host.holds(mixed(STATE, other))
        assert host.receiver.version == second.version
        assert host.receiver.live_digest() == second.version.digest
    whole = fleet.publisher.publish(mixed(STATE, other), 3)
    assert whole.version.digest == second.version.digest, "the digest is the content's, however it came"


def test_a_subset_may_build_on_a_subset_and_on_a_checkpoint() -> None:
    fleet = MemoryFleet()
    version = fleet.hosts["a"].initial
    for step in (1, 2, 3):
        version = fleet.publisher.publish(some_of(learner_state(step)), step, base=version.digest).version
    assert {host.receiver.live_digest() for host in fleet.hosts.values()} == {version.digest}


@DELIVERIES
def test_a_subset_of_another_base_changes_nothing_anywhere(delivery: str) -> None:
    fleet = FLEETS[delivery](2)
    first = fleet.publisher.publish(STATE, 1)
    second = fleet.publisher.publish(learner_state(2), 2)
    with pytest.raises(UpdateAborted, match=f"builds on content {first.version.digest}, and this host serves"):
        fleet.publisher.publish(some_of(learner_state(3)), 3, base=first.version.digest)
    assert all(host.holds(learner_state(2)) for host in fleet.hosts.values())
    assert {host.receiver.version for host in fleet.hosts.values()} == {second.version}


def test_a_torn_host_takes_no_subset() -> None:
    fleet = MemoryFleet(hosts=1)
    first = fleet.publisher.publish(STATE, 1)
    fleet.hosts["a"].receiver._hosted.stop("test")
    with pytest.raises(UpdateAborted, match="heals only by a full update"):
        fleet.publisher.publish(some_of(learner_state(2)), 2, base=first.version.digest)


class Counting(MemoryTransport):
    made = 0

    def segment(self, size: int):
        self.made += 1
        return super().segment(size)


def counting_fleet() -> tuple[Publisher, Counting]:
    clock = SimulatedClock()
    hosts = {name: FakeHost(name, clock=clock) for name in "ab"}
    transport = Counting({name: host.receiver for name, host in hosts.items()}, clock, silence_s=30.0)
    return Publisher(transport, run="run", deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=clock), transport


def test_segments_are_used_again_when_every_host_let_go() -> None:
    publisher, transport = counting_fleet()
    for step in range(4):
        publisher.publish(learner_state(step), step)
    assert transport.made == 6
    transport.inject(Fault(kind=FaultKind.CORRUPT_SEGMENT, host="a", message="Stage"))
    with pytest.raises(UpdateAborted):
        publisher.publish(learner_state(5), 5)  # refused and confirmed: nobody holds anything
    publisher.publish(learner_state(6), 6)
    assert transport.made == 6


def test_segments_that_a_host_may_still_read_are_never_written_again() -> None:
    publisher, transport = counting_fleet()
    publisher.publish(learner_state(1), 1)
    transport.inject(Fault(kind=FaultKind.DROP, host="a", message="Vote"))
    transport.inject(Fault(kind=FaultKind.DROP, host="a", message="Abort"))
    with pytest.raises(UpdateAborted):
        publisher.publish(learner_state(2), 2)
    publisher.publish(learner_state(3), 3)
    assert transport.made == 12


def test_a_segment_pool_gives_each_bucket_its_own() -> None:
    pool = SegmentPool(MemoryTransport({}, SimulatedClock(), silence_s=1.0), BUCKET_BYTES)
    first = gather(STATE, TIED, pool, BUCKET_BYTES)
    assert len({segment.data.data_ptr() for segment in first.segments}) == len(first.segments) == 6


def test_a_connected_fleet_turns_a_second_publisher_away() -> None:
    fleet = MemoryFleet()
    fleet.publisher.publish(STATE, 1)
    with pytest.raises(UpdateAborted, match="has a publisher already") as caught:
        Publisher(fleet.transport, deadline_s=5.0, bucket_bytes=BUCKET_BYTES).publish(STATE, 2)
    assert set(caught.value.hosts) == {"a", "b"}


def test_hosts_that_host_different_tensors_are_named_before_anything_is_offered() -> None:
    clock = SimulatedClock()
    hosts = {name: FakeHost(name, clock=clock) for name in "abc"}
    hosts["b"].receiver.layout = HostedLayout(
        [Whole(parameter="norm", name="model.norm.weight")], {"norm": torch.zeros(3)}
    )
    transport = MemoryTransport({name: host.receiver for name, host in hosts.items()}, clock, silence_s=30.0)
    publisher = Publisher(transport, run="run", deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=clock)
    with pytest.raises(UpdateAborted, match=r"b: hosts other tensors .* than a, c") as caught:
        publisher.publish(STATE, 1)
    assert list(caught.value.hosts) == ["b"]
    assert {host.receiver.state for host in hosts.values()} == {State.IDLE}


def test_an_update_goes_its_way_while_the_learner_computes_on() -> None:
    fleet = MemoryFleet()
    publishing = fleet.publisher.begin(STATE, 1)
    publishing.wait_for_source(30)
    report = publishing.result(30)
    assert publishing.done
    assert report.version.step == 1
    assert all(host.holds(STATE) for host in fleet.hosts.values())


def test_a_learner_may_write_to_its_weights_once_they_are_copied() -> None:
    fleet = MemoryFleet()
    gate = threading.Event()
    offer = fleet.publisher._rounds.offer

    def held_back(*arguments: Any) -> WeightVersion:
        assert gate.wait(30)
        return offer(*arguments)

    fleet.publisher._rounds.offer = held_back  # type: ignore[method-assign]
    state = learner_state(1)
    publishing = fleet.publisher.begin(state, 1)
    publishing.wait_for_source(30)
    assert not publishing.done
    with pytest.raises(ValueError, match="on its way already"):
        fleet.publisher.begin(state, 2)
    with pytest.raises(DeadlineExceeded, match="the update to end"):
        publishing.result(0.01)
    for tensor in state.values():
        tensor.zero_()
    gate.set()
    publishing.result(30)
    assert all(host.holds(learner_state(1)) for host in fleet.hosts.values())


def test_what_goes_wrong_on_its_way_is_raised_to_whoever_asks() -> None:
    fleet = MemoryFleet()
    publishing = fleet.publisher.begin({"model.norm.weight": torch.zeros(3)}, 1)
    with pytest.raises(UpdateAborted, match="missing"):
        publishing.result(30)
    publishing.wait_for_source(0)


def test_beside_an_update_on_its_way_nothing_is_published_and_closing_waits_for_its_end() -> None:
    fleet = MemoryFleet()
    host = fleet.hosts["a"]
    host.serving.may_write.clear()
    publishing = fleet.publisher.begin(STATE, 1)
    assert host.serving.in_pause.wait(30)
    with pytest.raises(ValueError, match="on its way already: wait for its result first"):
        fleet.publisher.publish(learner_state(2), 2)
    closing = threading.Thread(target=fleet.publisher.close)
    closing.start()
    closing.join(0.2)
    assert closing.is_alive()
    host.serving.may_write.set()
    closing.join(30)
    assert publishing.result(0).version == host.serving.serves
    assert all(host.holds(STATE) for host in fleet.hosts.values())


def test_closing_after_an_update_that_failed_on_its_way_raises_nothing() -> None:
    fleet = MemoryFleet()
    publishing = fleet.publisher.begin({"model.norm.weight": torch.zeros(3)}, 1)
    fleet.publisher.close()
    assert publishing.done
    restarted = Publisher(fleet.transport, deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=fleet.clock)
    restarted.publish(STATE, 1)
