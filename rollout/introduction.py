"""What a host says of itself once it is up, to whoever placed it or looks for its fleet."""

from dataclasses import dataclass

from rollout.config import RolloutConfig
from rollout.statement import Row
from weights.version import WeightVersion

CHECKPOINT_RUN = "checkpoint"
"""The run of the version that a host has before a learner publishes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Introduction:
    """What a host says of itself once it is up."""

    host_id: str
    config: RolloutConfig
    version: WeightVersion | None
    """None where it holds back until a first commit."""
    address: str | None
    """Where learners and siblings reach its receiver; None where no learner will publish."""
    process: int
    """Its id on its machine."""
    machine: str
    """The machine's name."""
    bits: tuple[Row, ...] = ()
    """What it found about its router when it started."""
