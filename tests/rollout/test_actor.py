"""The shell of a host, called in this process as Ray calls it in another."""

from pathlib import Path

import pytest

from rollout.actor import HostActor
from rollout.config import RolloutConfig
from rollout.model.checkpoint import CheckpointError


def test_a_host_is_starting_before_its_start_and_after_one_that_failed(tmp_path: Path) -> None:
    config = RolloutConfig.from_mapping({"name": "test", "model": str(tmp_path / "none"), "rl_mode": True})
    actor = HostActor(config, "host-0", hold=False)
    before = actor.status()
    assert (before.host_id, before.state, before.version) == ("host-0", "starting", None)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        actor.start()
    assert actor.status() == before
    actor.stop()
