"""Supervisor: watches the hosts of a fleet from the process that launched it, and starts again those that are lost.

The way of a host:

    DOWN -> STARTING -> JOINING -> SERVING        a sibling shares its weights: the fleet's version, then a token
                          |  ^        |
                          v  |        v  died, frozen, failed, or torn for too long: out of roster and rotation, ended
                        HOLDING      DOWN, or LEFT_OUT when it was started again too often

HOLDING: no sibling has weights to share, so the host waits in the roster for the next full update.

Nothing here waits: each `tick` looks at what has been answered and acts on it. Ray is behind `Placing`.
"""

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from rollout.actor import Call, Outcome
from rollout.balance import Rotation
from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded
from rollout.host import CHECKPOINT_RUN, Introduction
from rollout.status import HostStatus, Incident
from weights.rendezvous import Roster, RosterHost
from weights.version import WeightVersion

WATCH_S = 0.2
"""Seconds between two looks at the hosts."""
STALL_S = 2.0
"""A gap between two looks beyond which this process itself stood still, and no host is blamed for its silence."""
RESTART_WINDOW_S = 3600.0
BACKOFF_S = 1.0
"""Before a host that failed to come back is started once more; doubles each time, up to BACKOFF_MAX_S."""
BACKOFF_MAX_S = 30.0
SHARE_AGAIN_S = 0.5
"""Before weights that could not be shared are shared once more."""
BEHIND_LOOKS = 8
"""Looks at which a host may serve another version than its siblings before it is brought to theirs: an update under
way passes them one by one."""

logger = logging.getLogger("rollout")


class Stage(StrEnum):
    """Where a host stands."""

    DOWN = "down"
    STARTING = "starting"
    JOINING = "joining"
    HOLDING = "holding"
    SERVING = "serving"
    LEFT_OUT = "left out"


class Placing(Protocol):
    """What the supervisor needs of Ray: `rollout.actor.Placement` gives it."""

    def place(self, host_id: str, incarnation: int, hold: bool) -> Any: ...
    def call(self, actor: Any, method: str, *args: Any) -> Call: ...
    def end(self, actor: Any, introduction: Introduction | None) -> None: ...


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
    watched_s: float = 0.0
    status: HostStatus | None = None
    """What it last said, in this life."""
    torn_since_s: float | None = None
    behind: int = 0
    starts_s: deque[float] = field(default_factory=deque)
    """When it was started again."""
    failures: int = 0
    """Lives in a row in which it never served."""
    not_before_s: float = 0.0
    why: str = ""

    @property
    def version(self) -> WeightVersion | None:
        return None if self.status is None else self.status.version


class Supervisor:
    """Keeps a fleet's hosts, its rotation and its roster in step.

    Args:
        config: the fleet's.
        placing: starts, calls and ends actors.
        rotation: who takes prompts; kept right.
        nobody_shares: told when a host has no sibling to take its weights from.
        clock: seconds.
    """

    def __init__(
        self,
        config: RolloutConfig,
        placing: Placing,
        rotation: Rotation,
        *,
        nobody_shares: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._placing = placing
        self._rotation = rotation
        self._nobody_shares = nobody_shares
        self._clock = clock
        self.members = {f"host-{index}": Member(f"host-{index}") for index in range(config.hosts)}
        self.incidents: deque[Incident] = deque(maxlen=1000)
        self._current: WeightVersion | None = None
        self._ticked_s = clock()
        self._written: tuple[RosterHost, ...] | None = None
        self._roster_fault = ""
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"supervisor of {config.name}", daemon=True)

    @property
    def current(self) -> WeightVersion | None:
        """The version that was last adopted by a serving host; None before any has started."""
        return self._current

    def start_all(self) -> None:
        """Places every host; each begins to load its checkpoint."""
        for member in self.members.values():
            self._start(member, hold=False)

    def await_all(self) -> None:
        """Waits until every host has loaded the checkpoint, and lets them serve.

        Raises:
            DeadlineExceeded: naming the hosts that did not report.
            Exception: what a host raised.
        """
        deadline_s = self._config.deadlines.start_s
        until = self._clock() + deadline_s
        waiting = dict(self.members)
        while waiting:
            for host_id, member in list(waiting.items()):
                assert member.work is not None
                outcome = member.work.outcome()
                if outcome is not None:
                    if outcome.raised is not None:
                        raise outcome.raised
                    member.introduction, member.work = outcome.value, None
                    del waiting[host_id]
            if waiting and self._clock() > until:
                raise DeadlineExceeded(f"hosts to load the checkpoint: {', '.join(waiting)}", deadline_s)
            if waiting:
                time.sleep(WATCH_S / 4)
        for member in self.members.values():
            assert member.introduction is not None
            self._current = member.introduction.version
            self._enter(member, Stage.SERVING)
        self._write_roster(must=True)
        for member in self.members.values():
            self._placing.call(member.actor, "admit")
            self._rotation.put(member.host_id, member.actor)

    def watch(self) -> None:
        """Begins to look after the hosts, in a thread."""
        self._ticked_s = self._clock()
        self._thread.start()

    def stop(self) -> None:
        """Looks after them no more."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(10.0)

    def absence(self) -> str:
        """Where the hosts are, in words."""
        return "; ".join(f"{m.host_id} is {m.stage}{f' ({m.why})' if m.why else ''}" for m in self.members.values())

    def tick(self) -> None:
        """One look at every host."""
        now = self._clock()
        if now - self._ticked_s > STALL_S:
            for member in self.members.values():
                member.watched_s += now - self._ticked_s
                member.since_s += now - self._ticked_s
        self._ticked_s = now
        for member in self.members.values():
            self._advance(member, now)
        self._write_roster()

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_S):
            try:
                self.tick()
            except Exception:  # the thread's edge: a look that failed must not be the last one
                logger.exception("fleet %s: could not look after the hosts", self._config.name)

    def _advance(self, member: Member, now: float) -> None:
        match member.stage:
            case Stage.DOWN if now >= member.not_before_s:
                member.starts_s.append(now)
                self._start(member, hold=self._must_hold())
            case Stage.STARTING:
                self._await_start(member, now)
            case Stage.JOINING | Stage.HOLDING | Stage.SERVING:
                if self._look(member, now):
                    self._ACTIONS[member.stage](self, member, now)

    def _start(self, member: Member, *, hold: bool) -> None:
        member.actor = self._placing.place(member.host_id, member.incarnation, hold)
        self._enter(member, Stage.STARTING)
        member.work = self._placing.call(member.actor, "start")

    def _must_hold(self) -> bool:
        """Whether the checkpoint is no longer what the fleet serves, or may not be."""
        return self._current is None or self._current.run != CHECKPOINT_RUN

    def _await_start(self, member: Member, now: float) -> None:
        assert member.work is not None
        outcome = member.work.outcome()
        start_s = self._config.deadlines.start_s
        if outcome is None:
            if now - member.since_s > start_s:
                self._lose(member, now, f"waited {start_s:g} s for it to load the checkpoint")
        elif outcome.error:
            self._lose(member, now, f"could not start: {outcome.error}")
        else:
            member.introduction, member.work = outcome.value, None
            self._enter(member, Stage.JOINING)

    def _look(self, member: Member, now: float) -> bool:
        """Asks the host how it is, one question at a time; False if it was lost, or has said nothing yet."""
        if member.watch is None:
            member.watch, member.watched_s = self._placing.call(member.actor, "status"), now
        outcome = member.watch.outcome()
        answer_s = self._config.deadlines.answer_s
        if outcome is None:
            if now - member.watched_s > answer_s:
                self._lose(member, now, f"waited {answer_s:g} s for it to say how it is")
                return False
            return member.status is not None
        member.watch = None
        if outcome.error:
            self._lose(member, now, outcome.error)
            return False
        status: HostStatus = outcome.value
        if status.state == "failed":
            self._lose(member, now, f"its engine stopped: {status.detail.strip().splitlines()[-1]}")
            return False
        adopted = status.version is not None and status.version != member.version
        member.status = status
        if member.stage is Stage.SERVING:
            if adopted:
                self._current = status.version
            member.behind = member.behind + 1 if status.version != self._current and status.state == "idle" else 0
        return True

    def _serve(self, member: Member, now: float) -> None:
        """A serving host: is it torn, or behind the others?"""
        assert member.status is not None
        torn_s = self._config.deadlines.torn_s
        if member.version is None:
            if member.torn_since_s is None:
                member.torn_since_s = now
                self._rotation.take_out(member.host_id)
                self._report(member, f"is torn and serves nothing: {member.status.detail}")
            elif now - member.torn_since_s > torn_s:
                self._lose(member, now, f"waited {torn_s:g} s for an update to heal it")
        elif member.torn_since_s is not None:
            member.torn_since_s = None
            self._rotation.put(member.host_id, member.actor)
            self._report(member, f"was healed by an update and serves {member.version}")
        elif member.behind > BEHIND_LOOKS and self._donor(member) is not None:
            self._rotation.take_out(member.host_id)
            self._report(member, f"serves {member.version}, the fleet {self._current}: is brought to it")
            self._enter(member, Stage.JOINING)

    def _join(self, member: Member, now: float) -> None:
        """A host on its way to the fleet's version."""
        start_s = self._config.deadlines.start_s
        outcome = None if member.work is None else member.work.outcome()
        if outcome is not None:
            member.work = None
            self._take_word(member, outcome, now)
        elif now - member.since_s > start_s:
            self._lose(member, now, f"waited {start_s:g} s for it to be brought to {self._current}; {member.why}")
        elif member.work is None and now >= member.not_before_s:
            donor = self._donor(member)
            whole = member.version is not None and member.version == self._current
            if donor is None:
                self._enter(member, Stage.SERVING if whole else Stage.HOLDING)
                self._write_roster()
                if whole:
                    self._admit(member)
                else:
                    self._report(member, "waits for the next full update: no other host has weights to share")
                    self._nobody_shares()
            elif whole:
                # In the roster first: an update that begins from here on reaches it too.
                member.confirming = True
                self._write_roster()
                member.work = self._placing.call(donor.actor, "status")
            else:
                assert member.introduction is not None
                address = member.introduction.address
                if address is None:
                    self._lose(
                        member, now, f"holds {member.version}, the fleet {self._current}: the checkpoint was changed"
                    )
                else:
                    member.work = self._placing.call(donor.actor, "share", member.host_id, address)

    def _take_word(self, member: Member, outcome: Outcome, now: float) -> None:
        """What a sibling answered: how sharing went, or, before the host is admitted, what it serves itself."""
        confirming, member.confirming = member.confirming, False
        if outcome.error:
            member.why, member.not_before_s = f"a sibling could not share: {outcome.error}", now + SHARE_AGAIN_S
        elif not confirming:
            member.watch = member.status = None  # asked before it had the weights
        elif outcome.value.version in (member.version, None):
            self._enter(member, Stage.SERVING)
            self._admit(member)
        else:
            self._current = outcome.value.version

    def _hold(self, member: Member, now: float) -> None:
        """A host in the roster that no sibling could help."""
        if member.version is not None:
            self._current = member.version
            self._enter(member, Stage.SERVING)
            self._admit(member)
        elif self._donor(member) is not None:
            self._enter(member, Stage.JOINING)

    _ACTIONS = {Stage.SERVING: _serve, Stage.JOINING: _join, Stage.HOLDING: _hold}  # noqa: RUF012

    def _admit(self, member: Member) -> None:
        member.failures, member.why = 0, ""
        self._placing.call(member.actor, "admit")
        self._rotation.put(member.host_id, member.actor)
        self._report(member, f"serves {member.version}")

    def _donor(self, member: Member) -> Member | None:
        """A sibling that serves the fleet's version."""
        others = (m for m in self.members.values() if m is not member and m.stage is Stage.SERVING)
        return next((m for m in others if m.version is not None and m.version == self._current), None)

    def _lose(self, member: Member, now: float, why: str) -> None:
        """Takes a host out and ends it; it is started again, unless that has happened too often."""
        self._rotation.take_out(member.host_id)
        member.failures = 0 if member.stage is Stage.SERVING else member.failures + 1
        while member.starts_s and now - member.starts_s[0] > RESTART_WINDOW_S:
            member.starts_s.popleft()
        spent = len(member.starts_s) >= self._config.restarts
        self._enter(member, Stage.LEFT_OUT if spent else Stage.DOWN)
        member.why = why
        self._write_roster()
        self._placing.end(member.actor, member.introduction)
        times = f"{len(member.starts_s)} times within an hour, of {self._config.restarts} (restarts)"
        self._report(member, f"{why}; {f'is left out: was started again {times}' if spent else 'is started again'}")
        backoff_s = min(BACKOFF_S * 2 ** (member.failures - 1), BACKOFF_MAX_S) if member.failures else 0.0
        member.not_before_s = now + backoff_s
        member.incarnation += 1
        member.actor = member.introduction = None

    def _enter(self, member: Member, stage: Stage) -> None:
        member.stage, member.since_s = stage, self._clock()
        member.work = member.watch = member.torn_since_s = None
        member.confirming, member.behind, member.not_before_s = False, 0, 0.0
        if stage in (Stage.DOWN, Stage.LEFT_OUT, Stage.STARTING):
            member.status = None

    def _report(self, member: Member, what: str) -> None:
        self.incidents.append(Incident(at_s=time.time(), host_id=member.host_id, what=what))
        logger.warning("fleet %s: %s %s", self._config.name, member.host_id, what)

    def _write_roster(self, *, must: bool = False) -> None:
        """Tells learners and siblings who is there, if that has changed. A disk that is full is tried again later."""
        listed = tuple(
            RosterHost(id=m.host_id, address=m.introduction.address)
            for m in self.members.values()
            if (m.stage in (Stage.SERVING, Stage.HOLDING) or m.confirming)
            and m.introduction is not None
            and m.introduction.address is not None
        )
        if self._config.weights.transport is None or listed == self._written:
            return
        try:
            roster_of(self._config, listed).write()
        except OSError as error:
            if must:
                raise
            if str(error) != self._roster_fault:
                logger.warning("fleet %s: the roster cannot be written: %s", self._config.name, error)
            self._roster_fault = str(error)
        else:
            self._written, self._roster_fault = listed, ""


def roster_of(config: RolloutConfig, hosts: tuple[RosterHost, ...]) -> Roster:
    """Where learners find the hosts, and on what terms. The payload of every transport goes through shared memory."""
    return Roster(
        name=config.name,
        transport="shared_memory",
        hosts=hosts,
        bucket_bytes=config.weights.bucket_mib << 20,
        deadline_s=config.deadlines.message_s,
        silence_s=config.deadlines.silence_s,
        launcher=os.getpid(),
    )
