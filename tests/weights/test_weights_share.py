"""A host's own parameters, read back as they came over the wire, bring another host to the same version."""

from dataclasses import replace

import pytest
import torch
from fakes.weights_fleet import BUCKET_BYTES, FakeHost, MemoryFleet, learner_state

from weights.digest import Digest
from weights.errors import UpdateAborted
from weights.publisher import Publisher
from weights.receiver import Receiver
from weights.state import State
from weights.transports.memory import MemoryTransport, SimulatedClock


def publisher_to(host: FakeHost, run: str) -> Publisher:
    clock = SimulatedClock()
    transport = MemoryTransport({host.receiver.host: host.receiver}, clock, silence_s=30.0)
    return Publisher(transport, run=run, deadline_s=5.0, bucket_bytes=BUCKET_BYTES, clock=clock)


def test_what_is_shared_has_the_run_step_and_digest_of_the_learners_update() -> None:
    fleet = MemoryFleet(1)
    version = fleet.publisher.publish(learner_state(1), 7).version  # bf16 over the wire, the gate hosted in fp32
    found, content = fleet.hosts["a"].receiver.content()
    other = FakeHost("other")
    report = publisher_to(other, found.run).publish(content, found.step, digest=found.digest)
    assert report.version == version == found == other.serving.serves
    assert other.holds(learner_state(1))
    assert other.receiver.live_digest() == version.digest


def test_a_nan_s_payload_is_shared_as_it_came() -> None:
    state = learner_state(1)
    gate = state["model.layers.0.mlp.gate.weight"].view(torch.int16)
    gate[0, :2] = torch.tensor([0x7FA5, 0x7F81])  # signaling ones, which a cast from the hosted fp32 would quiet
    fleet = MemoryFleet(1)
    version = fleet.publisher.publish(state, 1).version
    found, content = fleet.hosts["a"].receiver.content()
    other = FakeHost("other")
    assert publisher_to(other, found.run).publish(content, found.step, digest=found.digest).version == version
    assert other.holds(state)


def test_before_any_update_a_host_shares_its_checkpoints_version() -> None:
    fleet = MemoryFleet(1)
    version, content = fleet.hosts["a"].receiver.content()
    assert version == fleet.hosts["a"].initial
    other = FakeHost("other")
    assert publisher_to(other, version.run).publish(content, version.step).version == version


def test_content_that_changed_while_it_was_read_is_not_offered() -> None:
    fleet = MemoryFleet(1)
    fleet.publisher.publish(learner_state(1), 1)
    version, content = fleet.hosts["a"].receiver.content()
    fleet.publisher.publish(learner_state(2), 2)  # before the first tensor is taken
    other = FakeHost("other")
    with pytest.raises(UpdateAborted, match="it changed while it was read"):
        publisher_to(other, version.run).publish(content, version.step, digest=version.digest)
    assert other.serving.serves == other.initial


def test_the_live_digest_shows_a_single_flipped_bit() -> None:
    fleet = MemoryFleet(1)
    version = fleet.publisher.publish(learner_state(1), 1).version
    host = fleet.hosts["a"]
    host.parameters["norm"].view(dtype=host.parameters["norm"].dtype)[0] += 1
    assert host.receiver.live_digest() != version.digest


def test_a_holding_host_has_nothing_to_share_and_takes_any_version() -> None:
    host = FakeHost("holding")
    host.receiver = Receiver(
        host="holding",
        layout=host.receiver.layout,
        parameters=host.parameters,
        serving=host.serving,
        version=None,
        clock=SimulatedClock(),
    )
    assert (host.receiver.state, host.receiver.version) == (State.TORN, None)
    with pytest.raises(UpdateAborted, match="holding has no version to share"):
        host.receiver.content()
    version = publisher_to(host, "run").publish(learner_state(3), 0).version
    assert host.receiver.version == host.serving.serves == version


def test_a_fleet_without_hosts_takes_no_update() -> None:
    clock = SimulatedClock()
    publisher = Publisher(MemoryTransport({}, clock, silence_s=30.0), deadline_s=5.0, bucket_bytes=4096, clock=clock)
    with pytest.raises(UpdateAborted, match="the fleet has no host at the moment"):
        publisher.publish(learner_state(1), 1)


def test_a_wrong_expectation_names_both_digests() -> None:
    host = FakeHost("a")
    wrong = replace(host.initial, digest=Digest(1, 2))
    with pytest.raises(UpdateAborted, match=f"expected {wrong.digest}"):
        publisher_to(host, "run").publish(learner_state(1), 1, digest=wrong.digest)
