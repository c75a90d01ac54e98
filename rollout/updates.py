"""The weight updates that a host has seen: how each went, phase by phase, on the host's own clock."""

import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor

from weights.messages import (
    Abort,
    Commit,
    Committed,
    Deliver,
    Finish,
    Offer,
    Offered,
    Refused,
    Reply,
    Request,
    Stage,
    Staged,
    Vote,
    Voted,
)
from weights.receiver import Receiver
from weights.state import State
from weights.version import WeightVersion

KEPT_RECORDS = 64
PHASES = ("offer", "stage", "vote", "commit")
"""offer: planning the manifest. stage: from there to the last bucket. vote: from there to the host's vote. commit: from
there to the new version, the wait for the other hosts' votes and for a running step included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateRecord:
    """An update that a host committed."""

    version: WeightVersion
    at_s: float
    """When, in seconds since the epoch."""
    phases: Mapping[str, float]
    """Seconds of each of PHASES; they add up to the whole of it, as this host saw it."""
    pause_s: float
    copy_s: float
    verify_s: float

    @property
    def plain(self) -> dict[str, object]:
        """For JSON."""
        seconds = {"pause_s": self.pause_s, "copy_s": self.copy_s, "verify_s": self.verify_s}
        return {"version": str(self.version), "at_s": self.at_s, "phases": dict(self.phases), **seconds}


class UpdateLog:
    """Takes the time of every message of a weight update. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._marks: dict[str, float] = {}
        self._update = ""
        self.records: deque[UpdateRecord] = deque(maxlen=KEPT_RECORDS)
        """The last ones that were committed, oldest first."""
        self.committed = 0
        """Updates so far."""
        self.refused = 0
        """Messages of updates that this host turned down: a manifest that does not fit, a bucket that is not whole."""
        self.called_off = 0
        """Updates that the publisher took back before the commit."""
        self.torn = 0
        """Commits that failed half-way."""

    @property
    def last(self) -> UpdateRecord | None:
        """The newest one that was committed."""
        return self.records[-1] if self.records else None

    def note(self, request: Request, reply: Reply, began_s: float, ended_s: float) -> None:
        """A message was answered; both times by one monotonic clock."""
        with self._lock:
            match request, reply:
                case Offer(), Offered() if request.update != self._update:
                    self._update, self._marks = request.update, {"began": began_s, "offer": ended_s, "stage": ended_s}
                case Stage(), Staged() if request.update == self._update:
                    self._marks["stage"] = ended_s
                case Vote(), Voted() if request.update == self._update:
                    self._marks.setdefault("vote", ended_s)
                case _, Committed() if reply.update == self._update and self._marks:
                    self._record(reply, ended_s)
                case Abort(), _ if request.update == self._update and self._marks:
                    self.called_off += 1
                    self._marks = {}
                case Commit() | Deliver() | Finish(), Refused() if reply.state is State.TORN:
                    self._marks = {}
                case _, Refused():
                    self.refused += 1

    def _record(self, reply: Committed, ended_s: float) -> None:
        marks = [self._marks[mark] for mark in ("began", "offer", "stage")]
        marks += [self._marks.get("vote", marks[-1]), ended_s]
        self._marks = {}
        self.committed += 1
        self.records.append(
            UpdateRecord(
                version=reply.version,
                at_s=time.time(),
                phases={phase: end - start for phase, (start, end) in zip(PHASES, pairwise(marks), strict=True)},
                pause_s=reply.pause_s,
                copy_s=reply.copy_s,
                verify_s=reply.verify_s,
            )
        )


class TimedReceiver(Receiver):
    """A receiver that writes down when it answered what."""

    def __init__(self, log: UpdateLog, **arguments: Any) -> None:
        super().__init__(**arguments)
        self._log = log

    def handle(self, request: Request, segment: Tensor | None = None) -> Reply:
        began_s = time.monotonic()
        reply = super().handle(request, segment)
        self._log.note(request, reply, began_s, time.monotonic())
        return reply
