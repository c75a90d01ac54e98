"""How a host takes in what its learner sends: what the transport opens, and when a full second copy is kept."""

from typing import Any

import pytest
import torch

from rollout.arrivals import keeps_shadow, reach_of
from rollout.config import RolloutConfig
from rollout.errors import ConfigError
from rollout.introduction import Introduction
from rollout.terms import roster_of
from weights.errors import TransportError
from weights.lease import Memory, WireTerms
from weights.rendezvous import RosterHost

CPU = torch.device("cpu")
MEMORY = Memory("00" * 64, "0:1", 4096)


def config_of(hosts: int = 2, **weights: Any) -> RolloutConfig:
    return RolloutConfig.from_mapping({"name": "f", "model": "m", "hosts": hosts, "weights": weights})


@pytest.mark.parametrize(
    ("available", "kept"),
    [(1 << 40, True), (251, True), (250, False), (0, False)],
)
def test_a_second_copy_is_kept_where_every_host_s_fits_with_a_quarter_to_spare(available: int, kept: bool) -> None:
    assert keeps_shadow(config_of(transport="nccl"), 100, available) is kept


@pytest.mark.parametrize("shadow", [True, False])
def test_what_the_configuration_says_of_a_second_copy_holds(shadow: bool) -> None:
    assert keeps_shadow(config_of(transport="nccl", shadow=shadow), 100, 150) is shadow


def test_only_a_wire_has_shadows() -> None:
    assert not keeps_shadow(config_of(), 1, 1 << 40)
    with pytest.raises(ConfigError, match=r"weights\.shadow: got true with weights\.transport shared_memory"):
        config_of(shadow=True)


def test_a_host_without_a_gpu_refuses_to_read_device_memory() -> None:
    with pytest.raises(ConfigError, match="cuda_ipc reads device memory, and this host runs on a CPU"):
        reach_of(config_of(transport="cuda_ipc"), CPU)


@pytest.mark.parametrize("transport", ["shared_memory", "nccl"])
def test_a_host_opens_no_memory_that_its_transport_does_not_bring(transport: str) -> None:
    with pytest.raises(TransportError, match="opens no learner's memory"):
        reach_of(config_of(transport=transport), CPU).open(MEMORY)


def test_a_host_joins_no_wire_that_its_transport_does_not_have() -> None:
    terms = WireTerms("w", "127.0.0.1", 1, "gloo", ("host-0",), 4096)
    with pytest.raises(TransportError, match="joins no wire"):
        reach_of(config_of(), CPU).join(terms, "host-0")


def introduction(host_id: str, *, on_gpu: bool, shadow: bool) -> Introduction:
    return Introduction(
        host_id=host_id,
        config=config_of(transport="nccl"),
        version=None,
        address=f"/run/{host_id}",
        process=1,
        machine="m",
        on_gpu=on_gpu,
        shadow=shadow,
    )


@pytest.mark.parametrize(
    ("on_gpu", "shadows", "backend", "shadow"),
    [(True, (True, True), "nccl", True), (False, (True, False), "gloo", False), (False, (True, True), "gloo", True)],
)
def test_the_roster_tells_a_learner_how_to_reach_the_hosts(
    on_gpu: bool, shadows: tuple[bool, bool], backend: str, shadow: bool
) -> None:
    hosts = [introduction(f"host-{n}", on_gpu=on_gpu, shadow=each) for n, each in enumerate(shadows)]
    listed = tuple(RosterHost(id=host.host_id, address=str(host.address)) for host in hosts)
    roster = roster_of(config_of(transport="nccl"), listed, hosts)
    assert (roster.transport, roster.backend, roster.shadow) == ("nccl", backend, shadow)


def test_a_folder_of_steps_goes_to_the_hosts_through_shared_memory() -> None:
    assert roster_of(config_of(transport="disk", folder="steps"), ()).transport == "shared_memory"
