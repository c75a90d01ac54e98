"""What a host and a fleet say of themselves."""

from dataclasses import dataclass

from weights.version import WeightVersion


@dataclass(frozen=True, kw_only=True, slots=True)
class HostStatus:
    """One host at one moment."""

    host_id: str
    state: str
    """idle, offered, staged, committing or torn (the receiver's state); failed or dead where the host is no more."""
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


@dataclass(frozen=True, kw_only=True, slots=True)
class FleetStatus:
    """All hosts of a fleet."""

    name: str
    hosts: tuple[HostStatus, ...]

    @property
    def version(self) -> WeightVersion | None:
        """The version that every host serves; None while they differ or one serves nothing."""
        versions = {host.version for host in self.hosts}
        return versions.pop() if len(versions) == 1 else None
