"""What a publish tells its caller."""

from collections.abc import Mapping
from dataclasses import dataclass

from weights.version import WeightVersion


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTimes:
    """How one host committed, in seconds."""

    pause_s: float
    """No engine step could run."""
    copy_s: float
    verify_s: float
    """Hashing the live parameters; inside the pause, like the copy."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishReport:
    """An update that every host committed."""

    version: WeightVersion
    bytes: int
    """On the wire, to each host."""
    seconds: float
    """Wall clock of the whole publish; the phases add up to it."""
    phases: Mapping[str, float]
    """Seconds of gather, offer, stage, vote and commit."""
    hosts: Mapping[str, HostTimes]
