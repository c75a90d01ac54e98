"""A fleet on GPUs (or CPUs), learners, and the judgement after each fault."""

import signal
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from ordeal.gpu.pool import LOOK_S, Actor, Pool
from ordeal.gpu.table import FREED, FREEZE, KILL, OLD, SECOND, Cell, Held, Kind
from ordeal.gpu.terms import SIBLING_S, Terms

SLACK_S = 1.0
BUSY = {"offered", "staged", "committing"}
PATIENT_S = 20.0
"""Deadline of updates that are to succeed: they are no measure of a fleet's speed, on whatever machine."""

Label = tuple[str, int]
"""Of a version: run and step."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was found after a cell."""

    cell: Cell
    after: str
    """What each host held when the fault was over."""
    seconds: float
    """From the blow until the learner was told (a host's), and every host at rest."""
    limit_s: float
    """What the deadlines allow for that."""


class Arena:
    """Takes cells one after the other; every one begins with all hosts at the same version and ends so."""

    def __init__(self, terms: Terms, pool: Pool) -> None:
        """Processes are the pool's; those that it takes end with the arena."""
        self.terms = terms
        self.steps = 0
        """That hosts made and that were judged."""
        self._pool = pool
        self._step = 0
        self._label: Label = ("", 0)
        self._kind: Kind | None = None
        self._hosts: dict[str, Actor] = {}
        self._because: dict[str, str] = {}
        """Why each host serves nothing; "" for those that do."""
        self._learners: list[Actor] = []
        """The one that publishes, and any that came before or beside it."""
        try:
            self._hosts = {host: self._host(host) for host in terms.hosts}
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for actor in (*self._hosts.values(), *self._learners):
            actor.end()
        self._hosts, self._learners = {}, []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, cell: Cell) -> Verdict:
        """AssertionError where a promise was broken, TimeoutError where something hangs."""
        if self._kind is not cell.kind or not self._learners:
            self._kind = cell.kind
            self.terms.roster(cell.kind.delivery).write()
            self.good_update()
        if cell.victim == "host":
            verdict = self._strike_host(cell)
        elif cell.blow in (KILL, FREEZE):
            verdict = self._strike_learner(cell)
        else:
            verdict = self._disturb(cell)
        self.good_update()
        return verdict

    def good_update(self) -> dict[str, Any]:
        """Reaches every host, and nothing is wrong there."""
        self._begin(self._learner())
        return self._succeed()

    def publish_for(self, kind: Kind) -> dict[str, Any]:
        """One more update over the same connections, without a look at what the hosts hold."""
        self._kind = kind
        self._begin(self._learner(), deadline_s=None)
        return self._learner().event("published")

    @property
    def actors(self) -> dict[str, Actor]:
        return {"learner": self._learner(), **self._hosts}

    def judge(self, new: Label, *, but: str = "") -> dict[str, Held]:
        """What each host holds, without `but`: AssertionError if it is none of old, new and nothing, or not whole."""
        found = {}
        for host, actor in self._hosts.items():
            if host == but:
                continue
            seen = actor.ask("described")
            assert not seen["wrong"], f"{host}: {seen['wrong']}"
            self.steps += seen["steps"]
            label = None if seen["serves"] is None else tuple(seen["serves"])
            held = {None: Held.SILENT, self._label: Held.OLD, new: Held.NEW}.get(label)
            assert held is not None, f"{host} serves {label}, neither {self._label} nor {new}"
            found[host] = held
            self._because[host] = seen["torn_because"]
        assert not {Held.OLD, Held.NEW} <= set(found.values()), f"old and new are served side by side: {found}"
        return found

    def _strike_learner(self, cell: Cell) -> Verdict:
        learner = self._learner()
        new = self._begin(learner, cell)
        learner.await_struck(cell.blow)
        began = time.monotonic()
        limit_s = SLACK_S + self.terms.message_s + (len(self._hosts) - 1) * SIBLING_S
        if cell.blow == FREEZE:
            limit_s += self.terms.silence_s
        try:
            self._await_rest(limit_s)
            seconds = time.monotonic() - began
            found = self.judge(new)
            self._check(cell, found)
            if cell.blow == FREEZE:
                self._wake(cell, learner, new, found)
        finally:
            if cell.blow == KILL:
                self._learners.remove(learner)
                learner.end()
        return Verdict(cell=cell, after=_words(found), seconds=seconds, limit_s=limit_s)

    def _wake(self, cell: Cell, learner: Actor, new: Label, found: dict[str, Held]) -> None:
        """A frozen learner goes on in a world that has gone on without it."""
        if cell.released:
            second = self._second()
            self._begin(second)
            self._succeed(second)
            second.ask("close")
            found = dict.fromkeys(self._hosts, Held.OLD)
        learner.signal(signal.SIGCONT)
        event = learner.event("published", "failed")
        assert event["event"] == "failed" or not cell.released, f"it published over another learner's update: {event}"
        self._await_rest(SLACK_S + self.terms.silence_s + self.terms.message_s)
        after = self.judge(new)
        if event["event"] == "published":
            assert set(after.values()) == {Held.NEW}, f"it was told that all hosts have it, and found {after}"
            self._label = new
        elif cell.released:
            assert after == found, f"an update that had failed left {after}, found {found}"
        elif event["error"] == "UpdateAborted":
            assert Held.NEW not in after.values(), f"it was told that no host committed, and found {after}"

    def _strike_host(self, cell: Cell) -> Verdict:
        struck = self.terms.hosts[-1]
        host, learner = self._hosts[struck], self._learner()
        host.ask("arm", phase=cell.phase, blow=cell.blow)
        new = self._begin(learner, fresh=cell.fresh, deadline_s=None)
        if cell.blow in (KILL, FREEZE):
            host.await_struck(cell.blow)
        began = time.monotonic()
        limit_s = SLACK_S + 3 * self.terms.message_s
        event = learner.event("published", "failed", within_s=limit_s + PATIENT_S)
        told_s = time.monotonic() - began
        assert told_s <= limit_s, f"the learner was told after {told_s:.1f} s: {event}"
        if cell.blow == KILL:
            host.end()
            self._hosts[struck] = self._host(struck)
        elif cell.blow == FREEZE:
            host.signal(signal.SIGCONT)
        else:
            assert host.ask("told"), "the fault did not strike"
            host.ask("recover")
        limit_s += SLACK_S + self.terms.silence_s + self.terms.message_s
        if cell.blow == KILL:
            limit_s += PATIENT_S  # another process begins
        self._await_rest(limit_s - told_s)
        seconds = time.monotonic() - began
        found = self.judge(new)
        if event["event"] == "published":
            assert set(found.values()) == {Held.NEW}, f"it was told that all hosts have it, and found {found}"
        elif event["error"] == "UpdateAborted":
            assert Held.NEW not in found.values(), f"it was told that no host committed, and found {found}"
        self._check(cell, found, struck)
        return Verdict(cell=cell, after=_words(found), seconds=seconds, limit_s=limit_s)

    def _disturb(self, cell: Cell) -> Verdict:
        """The learner's memory changes or goes, or another learner comes."""
        learner = self._learner()
        new = self._begin(learner, cell)
        began = time.monotonic()
        if cell.blow == SECOND:
            second = self._second()
            learner.event("gate")
            self._begin(second)
            refused = second.event("failed", "published")
            learner.tell("go")
            second.ask("close")
            assert refused["event"] == "failed", refused
            assert "has a publisher already" in refused["text"], refused
        event = learner.event("published", "failed")
        limit_s = SLACK_S + 2 * self.terms.message_s + self.terms.silence_s
        self._await_rest(limit_s)
        seconds = time.monotonic() - began
        found = self.judge(new)
        self._check(cell, found)
        whole = set(found.values()) == {Held.NEW}
        assert (event["event"] == "published") == whole, f"it was told {event}, and found {found}"
        assert whole or cell.blow == FREED or cell.others == OLD or "digest" in event["text"], event["text"]
        if whole:
            self._label = new
        return Verdict(cell=cell, after=_words(found), seconds=seconds, limit_s=limit_s)

    def _begin(
        self,
        learner: Actor,
        cell: Cell | None = None,
        *,
        fresh: bool = False,
        deadline_s: float | None = PATIENT_S,
    ) -> Label:
        """Sends a learner off; the version that it is to publish. With a cell, to its stop; else with time enough."""
        assert self._kind is not None
        self._step += 1
        learner.tell(
            "publish",
            step=self._step,
            delivery=self._kind.delivery.value,
            streams=self._kind is Kind.SLOTS,
            phase=None if cell is None else cell.phase,
            blow="" if cell is None else {SECOND: "gate"}.get(cell.blow, cell.blow),
            fresh=fresh if cell is None else cell.fresh,
            deadline_s=deadline_s if cell is None else None,
        )
        return f"learner-{learner.process}", self._step

    def _succeed(self, learner: Actor | None = None) -> dict[str, Any]:
        learner = learner or self._learner()
        event = learner.event("published", "failed")
        assert event["event"] == "published", f"a good update failed: {event['text']}"
        new = (f"learner-{learner.process}", self._step)
        found = self.judge(new)
        assert set(found.values()) == {Held.NEW}, f"after a good update: {found}"
        self._label = new
        return event

    def _learner(self) -> Actor:
        if not self._learners:
            self._learners.append(self._pool.take(self.terms.learner_device).become("learner", self.terms))
        return self._learners[0]

    def _second(self) -> Actor:
        if len(self._learners) < 2:
            self._learners.append(self._pool.take(self.terms.learner_device).become("learner", self.terms))
        return self._learners[1]

    def _host(self, name: str) -> Actor:
        return self._pool.take(str(self.terms.device_of(name))).become("host", self.terms, name)

    def _check(self, cell: Cell, found: dict[str, Held], struck: str | None = None) -> None:
        for host, held in found.items():
            allowed = cell.struck if host == struck else cell.others
            assert held in allowed, (
                f"{host} holds {held}, expected {' or '.join(sorted(allowed))}; {self._because[host]}"
            )

    def _await_rest(self, within_s: float) -> None:
        """No host has an update under way."""
        ends_at = time.monotonic() + within_s
        while busy := {host: state for host, actor in self._hosts.items() if (state := actor.ask("state")) in BUSY}:
            if time.monotonic() > ends_at:
                raise TimeoutError(f"waited {within_s:.1f} s for the hosts to settle: {busy}")
            time.sleep(LOOK_S)


def _words(found: dict[str, Held]) -> str:
    return ", ".join(found.values())
