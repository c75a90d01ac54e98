"""What a host and a fleet say of themselves."""

from dataclasses import dataclass
from typing import Self

from rollout.updates import UpdateRecord
from weights.version import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class HostStatus:
    """One host at one moment."""

    host_id: str
    state: str
    """idle, offered, staged, committing or torn (the receiver's state); starting or holding (until it is brought to
    the fleet's version) after it was started again; failed, dead or left out where the host is no more."""
    version: WeightVersion | None
    """What it serves; None where it serves nothing."""
    running: int
    waiting: int
    process: int
    """Its process id on its machine; 0 where it is dead."""
    blocks_free: int
    blocks: int
    detail: str = ""
    """Why it is torn, failed or dead."""
    last_update: UpdateRecord | None = None
    """The newest that it committed since it started."""

    @classmethod
    def absent(cls, host_id: str, state: str, why: str) -> Self:
        """Of a host that cannot speak for itself."""
        return cls(
            host_id=host_id,
            state=state,
            version=None,
            running=0,
            waiting=0,
            process=0,
            blocks_free=0,
            blocks=0,
            detail=why,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Incident:
    """Something that befell a host."""

    at_s: float
    """Seconds since the epoch."""
    host_id: str
    what: str


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetStatus:
    """All hosts of a fleet."""

    name: str
    hosts: tuple[HostStatus, ...]
    incidents: tuple[Incident, ...] = ()
    """Hosts lost, started again, healed, back: in order, the last thousand. Only the launcher knows them."""

    @property
    def version(self) -> WeightVersion | None:
        """The version that every host serves; None while they differ or one serves nothing."""
        versions = {host.version for host in self.hosts}
        return versions.pop() if len(versions) == 1 else None
