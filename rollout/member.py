"""A host of a fleet as its supervisor knows it: where it stands, what it was asked, what it last said."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rollout.actor import Call
from rollout.introduction import Introduction
from rollout.restarts import Restarts
from rollout.status import HostStatus
from weights.version import WeightVersion


class Stage(StrEnum):
    """Where a host stands."""

    DOWN = "down"
    STARTING = "starting"
    JOINING = "joining"
    HOLDING = "holding"
    SERVING = "serving"
    LEFT_OUT = "left out"


@dataclass(slots=True, eq=False)
class Member:
    """A host as its supervisor knows it."""

    host_id: str
    stage: Stage = Stage.DOWN
    since_s: float = 0.0
    """When it came to this stage."""
    incarnation: int = 0
    actor: Any = None
    introduction: Introduction | None = None
    work: Call | None = None
    """Its start, or a sibling's sharing with it, or a sibling's last word before it is admitted."""
    confirming: bool = False
    watch: Call | None = None
    """The question how it is, and when it was asked."""
    watched_s: float = 0.0
    status: HostStatus | None = None
    """What it last said, in this life."""
    torn_since_s: float | None = None
    behind: int = 0
    restarts: Restarts = field(default_factory=Restarts)
    not_before_s: float = 0.0
    """When what comes next is begun, at the earliest."""
    why: str = ""
    """It does not serve; empty where it does."""

    @property
    def version(self) -> WeightVersion | None:
        return None if self.status is None else self.status.version

    @property
    def listed(self) -> bool:
        """Whether learners and siblings are to know of it."""
        return self.stage in (Stage.SERVING, Stage.HOLDING) or self.confirming

    def enter(self, stage: Stage, now: float) -> None:
        """Comes to a stage; what it was asked in the one before is forgotten."""
        self.stage, self.since_s = stage, now
        self.work = self.watch = self.torn_since_s = None
        self.confirming, self.behind, self.not_before_s = False, 0, 0.0
        if stage in (Stage.DOWN, Stage.LEFT_OUT, Stage.STARTING):
            self.status = None
