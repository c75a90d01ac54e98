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
    on_gpu: bool = False
    """Whether it runs on one."""
    shadow: bool = False
    """Whether its machine has room for a full second copy of an update, where that is used."""
    bits: tuple[Row, ...] = ()
    """What it found about its router when it started."""
