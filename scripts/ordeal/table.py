"""The table of faults: which victim meets which blow at which phase of an update, and what may be true afterwards.

Messages are lost and damaged in one process, in simulated time (transport memory); processes are killed and frozen for
real (transport shared_memory and disk). After each cell every host holds the old version bit for bit, or the new one
bit for bit, or is torn and silent; then a good update reaches all hosts.
"""

from dataclasses import dataclass
from enum import StrEnum

from weights.transports.faults import CONNECTION_FAULTS, OFFER_FAULTS, SEGMENT_FAULTS, FaultKind


class Victim(StrEnum):
    LEARNER = "learner"
    HOST = "host"
    DRIVER = "driver"
    DISK = "disk"


class Blow(StrEnum):
    KILL = "SIGKILL"
    FREEZE = "SIGSTOP"
    """For longer than every deadline."""
    HICCUP = "SIGSTOP, then SIGCONT"
    """For less than any deadline (a host), or for longer (a driver, whom nobody watches)."""
    REMOVE = "folder removed"
    FILL = "disk full"


class After(StrEnum):
    """What the hosts hold when the fault is over."""

    OLD = "old"
    NEW = "new"
    EITHER = "old or new"
    """The same on every host; which one is decided by who reads first."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fault of a process or of a disk."""

    victim: Victim
    blow: Blow
    phase: str
    """Where the learner stands: `PHASES` for updates, or in words."""
    after: After
    transport: str = "shared_memory"

    def __str__(self) -> str:
        return f"{self.victim} {self.blow}, {self.phase}"

    def allows(self, found: After) -> bool:
        """Whether the hosts may hold this when the fault is over."""
        return self.after in (found, After.EITHER)


@dataclass(frozen=True, kw_only=True, slots=True)
class MessageCell:
    """One fault of a message between a publisher and one of its hosts, in memory."""

    kind: FaultKind
    message: str
    reply: bool


PHASES: dict[str, After] = {
    "connected": After.OLD,
    "gathering": After.OLD,
    "Offer to host 0": After.OLD,
    "Offer to host 2": After.OLD,
    "Stage to host 0": After.OLD,
    "Stage to host 1": After.OLD,
    "Vote to host 0": After.OLD,
    "half of the Vote to host 1": After.OLD,
    "Vote to host 2": After.OLD,
    "Commit to host 0": After.OLD,
    "Commit to host 1": After.NEW,
    "half of the Commit to host 1": After.NEW,
    "Commit to host 2": After.NEW,
    "Commit sent": After.NEW,
    "published": After.NEW,
}
"""Where a learner may stand, and which version the hosts end at if it never goes on: about to send a message (the
hosts are counted in the order of the roster), half-way through its bytes, or between two steps of its own. From the
first Commit that a host has taken, the decision is to commit."""

RACES = ("Commit to host 1", "half of the Commit to host 1", "Commit to host 2")
"""A learner that is killed here leaves Commits on their way. Hosts that were sent none learn at once that it is gone,
and ask the others to hold: whoever is asked before it has read its Commit takes it no more."""

IN_AN_UPDATE = tuple(phase for phase in PHASES if phase not in ("connected", "gathering", "published"))

HOST_PHASES: dict[str, After] = {
    "connected": After.OLD,
    "Offer to host 0": After.OLD,
    "Stage to host 0": After.OLD,
    "Vote to host 0": After.OLD,
    "Commit to host 0": After.NEW,
    "Commit sent": After.NEW,
}
"""Where the learner stands when one host of three is struck, and what the two others end at: the learner goes on, is
refused up to the vote, and commits on the others after it."""

LEARNER_CELLS = tuple(
    Cell(
        victim=Victim.LEARNER,
        blow=blow,
        phase=phase,
        after=After.EITHER if blow is Blow.KILL and phase in RACES else after,
    )
    for blow in (Blow.KILL, Blow.FREEZE)
    for phase, after in PHASES.items()
)
HOST_CELLS = (
    *(
        Cell(victim=Victim.HOST, blow=blow, phase=phase, after=after)
        for blow in (Blow.KILL, Blow.FREEZE)
        for phase, after in HOST_PHASES.items()
    ),
    Cell(victim=Victim.HOST, blow=Blow.HICCUP, phase="Vote to host 0", after=After.NEW),
)
DRIVER_CELLS = (
    Cell(victim=Victim.DRIVER, blow=Blow.HICCUP, phase="connected", after=After.NEW),
    Cell(victim=Victim.DRIVER, blow=Blow.KILL, phase="Commit to host 0", after=After.OLD),
    Cell(victim=Victim.DRIVER, blow=Blow.KILL, phase="generating", after=After.OLD),
)
"""A driver's end is the end of its hosts: `after` is what the next launch serves."""
DISK_CELLS = (
    Cell(victim=Victim.DISK, blow=Blow.REMOVE, phase="the checkpoint, as a host starts again", after=After.OLD),
    Cell(victim=Victim.DISK, blow=Blow.REMOVE, phase="the watched folder", after=After.OLD, transport="disk"),
    Cell(victim=Victim.DISK, blow=Blow.FILL, phase="a step is written", after=After.OLD, transport="disk"),
)
PROCESS_CELLS = (*LEARNER_CELLS, *HOST_CELLS, *DISK_CELLS, *DRIVER_CELLS)

MESSAGES = ("Hello", "Offer", "Stage", "Vote", "Commit")
MESSAGE_CELLS = (
    *(
        MessageCell(kind=kind, message=message, reply=reply)
        for message in MESSAGES
        for reply in (False, True)
        for kind in sorted(CONNECTION_FAULTS)
    ),
    *(MessageCell(kind=kind, message="Offer", reply=False) for kind in sorted(OFFER_FAULTS)),
    *(MessageCell(kind=kind, message="Stage", reply=False) for kind in sorted(SEGMENT_FAULTS)),
)
