"""A learner that is interrupted and goes on, one that stands still, and a device that fails: hosts are neither held
nor paused for it, and take the next update.
"""

from collections.abc import Callable

import pytest
import torch
from fakes.weights_deliveries import FLEETS, NEW, SOME_BUCKETS, at_old, before, contents_of, heal
from fakes.weights_fleet import DELIVERY_S, SILENCE_S, MemoryFleet

from weights.errors import CommitIncomplete, UpdateAborted

STAGED = ["segments", "lease", "shadow"]
STREAMS = ["slots", "wire"]


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("delivery", "message", "left"),
    [
        *[(delivery, (message, 1), "old old") for delivery in FLEETS for message in ("Offer", "Vote")],
        *[(delivery, ("Stage", 1), "old old") for delivery in STAGED],
        ("segments", ("Commit", 1), "new new"),
        ("shadow", ("Commit", 1), "new new"),
        ("lease", ("Commit", 1), "new torn"),  # the learner may write to its memory from here on
        *[(stream, ("Commit", 1), "old old") for stream in STREAMS],
        *[(stream, ("Deliver", bucket), "torn torn") for stream in STREAMS for bucket in SOME_BUCKETS],
        *[(stream, ("Finish", 1), "new torn") for stream in STREAMS],
    ],
)
def test_a_learner_that_is_interrupted_and_goes_on_lets_go_of_its_hosts_at_once(
    delivery: str, message: tuple[str, int], left: str
) -> None:
    fleet = at_old(delivery)
    before(fleet, message, "b", interrupt)
    began = fleet.clock()
    with pytest.raises(KeyboardInterrupt):
        fleet.publisher.publish(NEW, 2)
    assert " ".join(contents_of(fleet).values()) == left
    assert fleet.clock() == began  # nobody waited for a silence
    heal(fleet)


@pytest.mark.parametrize("delivery", FLEETS)
@pytest.mark.parametrize("host", ["a", "b"])
def test_a_learner_that_is_interrupted_again_while_it_calls_its_update_off_lets_go_of_its_hosts_too(
    delivery: str, host: str
) -> None:
    fleet = at_old(delivery)
    before(fleet, ("Vote", 1), "b", interrupt)
    before(fleet, ("Abort", 1), host, interrupt)
    began = fleet.clock()
    with pytest.raises(KeyboardInterrupt):
        fleet.publisher.publish(NEW, 2)
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    assert fleet.clock() == began
    heal(fleet)


@pytest.mark.parametrize("stream", STREAMS)
def test_a_learner_that_stands_still_before_the_first_bucket_ends_the_pause_soon(stream: str) -> None:
    fleet = at_old(stream)
    patience: list[float | None] = []

    def look() -> None:
        patience.extend(host.receiver.silence_left_s for host in fleet.hosts.values())

    def stand_still() -> None:
        look()
        assert all(host.serving.is_paused for host in fleet.hosts.values())
        fleet.clock.advance(DELIVERY_S)
        look()
        fleet.transport.fall_silent()

    before(fleet, ("Vote", 1), "a", look)
    before(fleet, ("Deliver", 1), "a", stand_still)
    with pytest.raises(CommitIncomplete):
        fleet.publisher.publish(NEW, 2)
    assert patience == [SILENCE_S, SILENCE_S, DELIVERY_S, DELIVERY_S, 0.0, 0.0]
    assert DELIVERY_S < SILENCE_S
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    heal(fleet)


def failing(times: int) -> Callable[[torch.device], None]:
    """Waits for a device, which has failed so many times."""
    failures = iter(range(times))

    def settled(device: torch.device) -> None:
        if next(failures, None) is not None:
            raise RuntimeError("the device has failed")

    return settled


def refused_for_its_device(fleet: MemoryFleet) -> None:
    with pytest.raises((UpdateAborted, CommitIncomplete), match="the device failed, so nothing was written") as caught:
        fleet.publisher.publish(NEW, 2)
    assert getattr(caught.value, "torn", {}).keys() <= {"b"}


@pytest.mark.parametrize("delivery", FLEETS)
def test_a_device_that_fails_right_before_the_first_byte_leaves_the_old_version(
    delivery: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = at_old(delivery)
    monkeypatch.setattr("weights.hosted.settled", failing(2))
    refused_for_its_device(fleet)
    assert contents_of(fleet) == {"a": "old", "b": "old"}
    monkeypatch.undo()
    heal(fleet)


@pytest.mark.parametrize(
    ("delivery", "left"),
    [
        *[("segments", "new new"), ("shadow", "new new"), ("lease", "torn new")],
        *[("slots", "torn torn"), ("wire", "torn torn")],
    ],
)
def test_a_host_whose_device_failed_before_the_first_byte_ends_as_its_sibling_did_or_is_silent(
    delivery: str, left: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = at_old(delivery)
    monkeypatch.setattr("weights.hosted.settled", failing(1))  # a's, which is told first
    refused_for_its_device(fleet)
    assert " ".join(contents_of(fleet).values()) == left
    monkeypatch.undo()
    heal(fleet)
