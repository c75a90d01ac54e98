"""The roster of a fleet: where learners find its hosts, and on what terms."""

import os
from collections.abc import Collection

from rollout.config import RolloutConfig
from rollout.introduction import Introduction
from weights.rendezvous import Roster, RosterHost


def roster_of(
    config: RolloutConfig, hosts: tuple[RosterHost, ...], introduced: Collection[Introduction] = ()
) -> Roster:
    """Where learners find the hosts, and on what terms. What the launcher itself publishes from a folder of steps goes
    through shared memory."""
    transport = config.weights.transport
    return Roster(
        name=config.name,
        transport="shared_memory" if transport in (None, "disk") else transport,
        hosts=hosts,
        backend="nccl" if any(host.on_gpu for host in introduced) else "gloo",
        shadow=bool(introduced) and all(host.shadow for host in introduced),
        bucket_bytes=config.weights.bucket_mib << 20,
        deadline_s=config.deadlines.message_s,
        silence_s=config.deadlines.silence_s,
        launcher=os.getpid(),
    )
