"""Supervisor: watches the hosts of a fleet from the process that launched it, and starts again those that are lost.

The way of a host:

    DOWN -> STARTING -> JOINING -> SERVING        a sibling shares its weights: the fleet's version, then a token
                          |  ^        |
                          v  |        v  died, frozen, failed, or torn for too long: out of roster and rotation, ended
                        HOLDING      DOWN, or LEFT_OUT when it was started again too often

HOLDING: no sibling has weights to share, so the host waits in the roster for the next full update.

Once the fleet is up nothing here waits: each `tick` looks at what has been answered and acts on it. Ray is behind
`Placing`.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from rollout.actor import Outcome
from rollout.balance import Rotation
from rollout.config import RolloutConfig
from rollout.introduction import CHECKPOINT_RUN
from rollout.listing import Listing
from rollout.member import Member, Stage
from rollout.muster import muster
from rollout.placing import Placing
from rollout.status import HostStatus, Incident
from weights.version import WeightVersion

WATCH_S = 0.2
"""Seconds between two looks at the hosts."""
STALL_S = 2.0
"""A gap between two looks beyond which this process itself stood still, and no host is blamed for its silence."""
SHARE_AGAIN_S = 0.5
"""Before weights that could not be shared are shared once more."""
BEHIND_LOOKS = 8
"""Looks at which a host may serve another version than its siblings before it is brought to theirs: an update under
way passes them one by one."""

logger = logging.getLogger("rollout")


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
        self._listing = Listing(config, self.members.values())
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
        muster(self.members.values(), self._config.deadlines.start_s, self._clock)
        for member in self.members.values():
            assert member.introduction is not None
            self._current = member.introduction.version
            member.enter(Stage.SERVING, self._clock())
        self._listing.write(must=True)
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
        self._listing.write()

    def _run(self) -> None:
        while not self._stopping.wait(WATCH_S):
            try:
                self.tick()
            except Exception:  # the thread's edge: a look that failed must not be the last one
                logger.exception("fleet %s: could not look after the hosts", self._config.name)

    def _advance(self, member: Member, now: float) -> None:
        match member.stage:
            case Stage.DOWN if now >= member.not_before_s:
                member.restarts.begin(now)
                self._start(member, hold=self._must_hold())
            case Stage.STARTING:
                self._await_start(member, now)
            case Stage.JOINING | Stage.HOLDING | Stage.SERVING:
                if self._look(member, now):
                    self._ACTIONS[member.stage](self, member, now)

    def _start(self, member: Member, *, hold: bool) -> None:
        member.actor = self._placing.place(member.host_id, member.incarnation, hold)
        member.enter(Stage.STARTING, self._clock())
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
            member.enter(Stage.JOINING, self._clock())

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
            elif now - member.torn_since_s > torn_s and member.work is None:
                self._lose(member, now, f"waited {torn_s:g} s for a sibling or an update to heal it")
            else:
                self._heal(member, now)
        elif member.torn_since_s is not None:
            member.torn_since_s, member.work, member.why = None, None, ""
            self._rotation.put(member.host_id, member.actor)
            self._report(member, f"was healed and serves {member.version}")
        elif member.behind > BEHIND_LOOKS and self._donor(member) is not None:
            self._rotation.take_out(member.host_id)
            self._report(member, f"serves {member.version}, the fleet {self._current}: is brought to it")
            member.enter(Stage.JOINING, self._clock())

    def _heal(self, member: Member, now: float) -> None:
        """Asks a sibling for its weights. A torn host stays in the roster: an update of the learner may come first."""
        outcome = None if member.work is None else member.work.outcome()
        if outcome is not None:
            member.work, member.not_before_s = None, now + SHARE_AGAIN_S
            if outcome.error and outcome.error != member.why:
                member.why = outcome.error
                self._report(member, f"is torn still, a sibling could not share: {outcome.error}")
        donor = self._donor(member)
        if member.work is None and now >= member.not_before_s and donor is not None:
            assert member.introduction is not None
            assert member.introduction.address is not None
            member.work = self._placing.call(donor.actor, "share", member.host_id, member.introduction.address)

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
                member.enter(Stage.SERVING if whole else Stage.HOLDING, self._clock())
                self._listing.write()
                if whole:
                    self._admit(member)
                else:
                    self._report(member, "waits for the next full update: no other host has weights to share")
                    self._nobody_shares()
            elif whole:
                # In the roster first: an update that begins from here on reaches it too.
                member.confirming = True
                self._listing.write()
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
            member.enter(Stage.SERVING, self._clock())
            self._admit(member)
        else:
            self._current = outcome.value.version

    def _hold(self, member: Member, now: float) -> None:
        """A host in the roster that no sibling could help."""
        if member.version is not None:
            self._current = member.version
            member.enter(Stage.SERVING, self._clock())
            self._admit(member)
        elif self._donor(member) is not None:
            member.enter(Stage.JOINING, self._clock())

    _ACTIONS = {Stage.SERVING: _serve, Stage.JOINING: _join, Stage.HOLDING: _hold}  # noqa: RUF012

    def _admit(self, member: Member) -> None:
        member.restarts.serve()
        member.why = ""
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
        member.restarts.lose(now, serving=member.stage is Stage.SERVING)
        spent = member.restarts.count >= self._config.restarts
        member.enter(Stage.LEFT_OUT if spent else Stage.DOWN, self._clock())
        member.why = why
        self._listing.write()
        self._placing.end(member.actor, member.introduction)
        times = f"{member.restarts.count} times within an hour, of {self._config.restarts} (restarts)"
        self._report(member, f"{why}; {f'is left out: was started again {times}' if spent else 'is started again'}")
        member.not_before_s = now + member.restarts.rest_s
        member.incarnation += 1
        member.actor = member.introduction = None

    def _report(self, member: Member, what: str) -> None:
        self.incidents.append(Incident(at_s=time.time(), host_id=member.host_id, what=what))
        logger.warning("fleet %s: %s %s", self._config.name, member.host_id, what)
