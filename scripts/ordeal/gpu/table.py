"""The table of faults on GPUs: who meets which blow where, by delivery, and what the hosts may hold afterwards.

After every cell each host serves the old version bit for bit, or the new one bit for bit, or nothing; never one of them
the old while another serves the new. `others` and `struck` say which of the three it may be.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from weights.delivery import Delivery


class Held(StrEnum):
    """What a host serves when a fault is over."""

    OLD = "old"
    NEW = "new"
    SILENT = "nothing"


OLD, NEW, SILENT = (frozenset({held}) for held in Held)
NEW_OR_SILENT, OLD_OR_NEW, OLD_OR_SILENT, ANY = NEW | SILENT, OLD | NEW, OLD | SILENT, OLD | NEW | SILENT
"""Where more than one is allowed, it is decided by which of two processes is first; or, for a host that wakes, by what
it finds."""


class Kind(StrEnum):
    """How the bytes come, as a user chooses it."""

    LEASE = "cuda_ipc, leased"
    SLOTS = "cuda_ipc, through two buckets"
    STREAM = "nccl, in place"
    SHADOW = "nccl, with a shadow"

    @property
    def delivery(self) -> Delivery:
        return {
            Kind.LEASE: Delivery.LEASE,
            Kind.SLOTS: Delivery.STREAM,
            Kind.STREAM: Delivery.STREAM,
            Kind.SHADOW: Delivery.SHADOW,
        }[self]

    @property
    def transport(self) -> str:
        return self.value.split(",")[0]


KILL, FREEZE = "SIGKILL", "SIGSTOP"
FULL, CHANGED, FREED, SECOND = "device full", "source changed", "source freed", "a second learner"


@dataclass(frozen=True, kw_only=True, slots=True)
class Cell:
    """One fault."""

    kind: Kind
    victim: str
    """learner, or host: the last one."""
    blow: str
    phase: str
    others: frozenset[Held]
    """What the hosts may hold that are not struck; of a learner's fault, all."""
    struck: frozenset[Held] = SILENT
    """What the struck host may hold; a killed one is started again, and serves nothing before an update."""
    fresh: bool = False
    """It meets a learner's first update: nothing is joined, opened, or known."""
    released: bool = False
    """Hosts let go of a frozen learner by themselves: another one can publish while it is still there."""

    def __str__(self) -> str:
        return f"{self.kind}: {self.victim} {self.blow}, {self.phase}"

    def needs_two(self) -> bool:
        """Whether it can only be in a fleet of two hosts."""
        return "host 1" in self.phase


Row = tuple[str, frozenset[Held], str]
"""Phase, what may be held after it, and words: "fresh", "released", "kill" or "freeze" (else both)."""

BEFORE_BYTES: tuple[Row, ...] = (
    ("greeted", OLD, ""),
    ("loaded", OLD, "freeze"),
    ("Offer to host 0", OLD, "kill"),
    ("half of the Offer to host 1", OLD, "kill"),
)
LEARNER: dict[Kind, tuple[Row, ...]] = {
    Kind.LEASE: (
        *BEFORE_BYTES,
        ("Stage first to host 0", OLD, "kill fresh"),
        ("Stage first to host 1", OLD, ""),
        ("Stage first sent", OLD, "freeze released"),
        ("Stage first sent", OLD, "kill"),
        ("Vote to host 1", OLD, "kill"),
        ("Vote sent", OLD, "released"),
        ("Commit to host 0", OLD, "released"),
        ("Commit to host 1", ANY, "kill"),
        ("half of the Commit to host 1", ANY, "kill"),
        ("Commit to host 1", NEW_OR_SILENT, "freeze"),
        ("Commit sent", NEW_OR_SILENT, ""),
        ("published", NEW, "freeze"),
    ),
    Kind.SLOTS: (
        ("Join to host 1", OLD, "kill fresh"),
        ("Join sent", OLD, "freeze fresh"),
        ("Vote sent", OLD, "kill"),
        ("Commit to host 1", OLD, "kill"),
        ("Commit sent", OLD, "released"),
        ("Deliver first to host 0", OLD, "released"),
        ("Deliver first to host 1", OLD_OR_SILENT, "kill"),
        ("Deliver first to host 1", SILENT, "freeze released"),
        ("Deliver first sent", SILENT, "kill"),
        ("Deliver middle to host 0", SILENT, "kill"),
        ("Deliver middle sent", SILENT, "released"),
        ("half of the Deliver last to host 1", SILENT, "kill"),
        ("Deliver last sent", SILENT, ""),
        ("Finish to host 0", SILENT, "released"),
        ("Finish to host 1", NEW_OR_SILENT, "kill"),
        ("Finish sent", NEW, ""),
    ),
    Kind.STREAM: (
        *BEFORE_BYTES,
        ("Join to host 0", OLD, "kill fresh"),
        ("Join sent", OLD, "fresh"),
        ("Vote to host 0", OLD, "freeze released"),
        ("Vote sent", OLD, "kill"),
        ("Commit to host 0", OLD, "kill"),
        ("Commit sent", OLD, "released"),
        ("Deliver first to host 0", OLD, "released"),
        ("Deliver first to host 1", OLD_OR_SILENT, "kill"),
        ("Deliver first sent", OLD_OR_SILENT, ""),
        ("Deliver middle to host 0", SILENT, "released"),
        ("Deliver middle sent", SILENT, ""),
        ("half of the Deliver last to host 0", SILENT, "kill"),
        ("Deliver last sent", SILENT, ""),
        ("Finish to host 0", SILENT, "released"),
        ("Finish to host 1", NEW_OR_SILENT, "kill"),
        ("Finish sent", NEW, ""),
    ),
    Kind.SHADOW: (
        ("Join sent", OLD, "kill fresh"),
        ("Stage first to host 0", OLD, "kill"),
        ("Stage first sent", OLD, ""),
        ("Stage middle sent", OLD, ""),
        ("Stage last sent", OLD, "kill"),
        ("Vote sent", OLD, "released"),
        ("Commit to host 0", OLD, ""),
        ("Commit to host 1", OLD_OR_NEW, "kill"),
        ("Commit sent", NEW, ""),
    ),
}
"""Where a learner stands, which messages it has sent to whom, when it is struck."""

HOST: dict[Kind, tuple[tuple[str, frozenset[Held], frozenset[Held], str], ...]] = {
    Kind.LEASE: (
        ("Hello arrives", OLD, OLD, ""),
        ("Offer arrives", OLD, OLD, "kill"),
        ("staging", OLD, OLD, ""),
        ("Stage first answered", OLD, OLD, "kill fresh"),
        ("Vote arrives", OLD, OLD, "kill"),
        ("Vote answered", OLD, OLD, ""),
        ("Commit arrives", NEW, NEW_OR_SILENT, ""),
        ("paused", NEW, NEW_OR_SILENT, "kill"),
        ("written", NEW, NEW_OR_SILENT, ""),
        ("verified", NEW, NEW_OR_SILENT, "kill"),
        ("Commit answered", NEW, NEW, "kill"),
    ),
    Kind.SLOTS: (
        ("Join arrives", OLD, OLD, "kill fresh"),
        ("joining", OLD, OLD, "freeze fresh"),
        ("Vote answered", OLD, OLD, "kill"),
        ("Commit arrives", OLD, OLD, "kill"),
        ("paused", OLD, OLD, ""),
        ("Deliver first arrives", SILENT, OLD_OR_SILENT, ""),
        ("Deliver middle answered", SILENT, SILENT, ""),
        ("Deliver last arrives", SILENT, SILENT, "kill"),
        ("Finish arrives", NEW, NEW_OR_SILENT, "kill"),
        ("written", NEW, NEW_OR_SILENT, "freeze"),
    ),
    Kind.STREAM: (
        ("Hello arrives", OLD, OLD, "kill"),
        ("Offer arrives", OLD, OLD, ""),
        ("Join arrives", OLD, OLD, "kill fresh"),
        ("joining", OLD, OLD, "freeze fresh"),
        ("Vote arrives", OLD, OLD, "kill"),
        ("Vote answered", OLD, OLD, ""),
        ("Commit arrives", OLD, OLD, "kill"),
        ("paused", OLD, OLD, ""),
        ("Deliver first arrives", SILENT, OLD_OR_SILENT, ""),
        ("Deliver middle arrives", SILENT, SILENT, ""),
        ("Deliver middle answered", SILENT, SILENT, "kill"),
        ("Deliver last arrives", SILENT, SILENT, ""),
        ("Finish arrives", NEW, NEW_OR_SILENT, ""),
        ("written", NEW, NEW_OR_SILENT, "kill"),
        ("verified", NEW, NEW_OR_SILENT, "kill"),
    ),
    Kind.SHADOW: (
        ("staging", OLD, OLD, ""),
        ("Stage middle arrives", OLD, OLD, ""),
        ("Stage last answered", OLD, OLD, "kill"),
        ("Commit arrives", NEW, NEW_OR_SILENT, ""),
        ("written", NEW, NEW_OR_SILENT, "kill"),
    ),
}
"""Where the last host stands when it is struck, what the others hold after it, and what it holds itself if it wakes."""

SPECIAL: tuple[Cell, ...] = (
    Cell(kind=Kind.LEASE, victim="learner", blow=CHANGED, phase="loaded", others=OLD),
    Cell(kind=Kind.LEASE, victim="learner", blow=CHANGED, phase="Stage first to host 0", others=OLD),
    Cell(kind=Kind.LEASE, victim="learner", blow=CHANGED, phase="Stage first to host 1", others=OLD, fresh=True),
    Cell(kind=Kind.LEASE, victim="learner", blow=CHANGED, phase="Commit to host 0", others=SILENT),
    Cell(kind=Kind.LEASE, victim="learner", blow=CHANGED, phase="Commit to host 1", others=NEW_OR_SILENT),
    Cell(kind=Kind.LEASE, victim="learner", blow=FREED, phase="Stage first to host 0", others=OLD_OR_NEW),
    Cell(kind=Kind.LEASE, victim="learner", blow=FREED, phase="Commit to host 0", others=NEW_OR_SILENT),
    Cell(kind=Kind.LEASE, victim="learner", blow=FREED, phase="between updates", others=NEW),
    Cell(kind=Kind.LEASE, victim="learner", blow=SECOND, phase="Vote to host 0", others=NEW),
    Cell(kind=Kind.LEASE, victim="host", blow=FULL, phase="planning", others=OLD, struck=OLD),
    Cell(kind=Kind.LEASE, victim="host", blow=FULL, phase="staging", others=OLD, struck=OLD, fresh=True),
    Cell(kind=Kind.LEASE, victim="host", blow=FULL, phase="writing", others=NEW, struck=NEW_OR_SILENT),
    Cell(kind=Kind.SLOTS, victim="learner", blow=CHANGED, phase="Commit to host 0", others=SILENT),
    Cell(kind=Kind.SLOTS, victim="learner", blow=SECOND, phase="Deliver middle to host 0", others=NEW),
    Cell(kind=Kind.STREAM, victim="learner", blow=CHANGED, phase="Commit to host 0", others=SILENT),
    Cell(kind=Kind.STREAM, victim="learner", blow=SECOND, phase="Deliver middle to host 0", others=NEW),
    Cell(kind=Kind.STREAM, victim="host", blow=FULL, phase="joining", others=OLD, struck=OLD, fresh=True),
    Cell(kind=Kind.SHADOW, victim="learner", blow=CHANGED, phase="Stage first to host 0", others=OLD),
    Cell(kind=Kind.SHADOW, victim="learner", blow=CHANGED, phase="Commit to host 0", others=NEW),
    Cell(kind=Kind.SHADOW, victim="host", blow=FULL, phase="staging", others=OLD, struck=OLD),
)


def _blows(words: str) -> tuple[str, ...]:
    named = set(words.split()) & {"kill", "freeze"}
    return tuple(blow for blow, word in ((KILL, "kill"), (FREEZE, "freeze")) if word in named or not named)


def _cells() -> Iterator[Cell]:
    for kind in Kind:
        for phase, others, words in LEARNER[kind]:
            for blow in _blows(words):
                yield Cell(
                    kind=kind,
                    victim="learner",
                    blow=blow,
                    phase=phase,
                    others=others,
                    fresh="fresh" in words,
                    released="released" in words,
                )
        for phase, others, struck, words in HOST[kind]:
            for blow in _blows(words):
                yield Cell(
                    kind=kind,
                    victim="host",
                    blow=blow,
                    phase=phase,
                    others=others,
                    struck=SILENT if blow == KILL else struck,
                    fresh="fresh" in words,
                )
        yield from (cell for cell in SPECIAL if cell.kind is kind)


CELLS: tuple[Cell, ...] = tuple(_cells())


def chosen(transport: str, hosts: int) -> list[Cell]:
    """The cells of a transport in a fleet of so many hosts, those that end a process between those that wait."""
    cells = [cell for cell in CELLS if cell.kind.transport == transport and (hosts > 1 or not cell.needs_two())]
    quick = [cell for cell in cells if cell.blow != FREEZE]
    slow = [cell for cell in cells if cell.blow == FREEZE]
    mixed: list[Cell] = []
    for index in range(max(len(quick), len(slow))):
        mixed += quick[index : index + 1] + slow[index : index + 1]
    return mixed
