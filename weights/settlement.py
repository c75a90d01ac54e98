"""How a host that voted ends an update without its publisher: all hosts end it alike, or are silent.

The rule, on every host that voted and lost its publisher:

1. It asks its siblings to hold and to say how the update ended with them. Those out of reach are asked again, until a
   deadline; the roster is read anew for each round.
2. One has committed, or tore in trying: the decision was to commit, and this host commits too, since its segments
   outlive the learner. It tries to pause until the deadline; if it cannot, it stops serving.
3. One knows that the update was called off, or each sibling is accounted for and none has committed: it tells them to
   abort, hears that they did, and aborts. A sibling whose process has ended, or that has left the roster, serves
   nothing and counts as not committed.
4. One stays out of reach and may be alive: it may be serving the new version, so this host does not serve the old one.
   It is undecided and serves nothing until a complete commit.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

from weights.errors import PeerGone, WeightsError
from weights.messages import Ask
from weights.serving import Sibling
from weights.state import Intent, Outcome

RETRY_S = 0.5
"""Between two rounds of questions, and between two tries to pause."""

Siblings = Callable[[], Iterable[Sibling]]
"""The rest of the fleet as it stands now; WeightsError if that cannot be known."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """How it ended, and why."""

    update: str
    outcome: Outcome
    reason: str


class Voter(Protocol):
    """The host that settles. Whatever it is told of an update that has ended meanwhile changes nothing."""

    @property
    def host(self) -> str: ...

    def follow(self, update: str, reason: str) -> Settlement | str:
        """Commits; a text says why it could not pause, and nothing was written."""
        ...

    def call_off(self, update: str, reason: str) -> Settlement:
        """Aborts, and serves what it served."""
        ...

    def stop(self, update: str, outcome: Outcome, reason: str) -> Settlement:
        """Lets go of the update and serves nothing until a complete commit."""
        ...


@dataclass(slots=True)
class Poll:
    """One round of questions."""

    answers: dict[str, Outcome] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    """Siblings whose process has ended, and how that shows."""
    unreached: dict[str, str] = field(default_factory=dict)
    """Siblings that may be alive and did not answer, and why."""

    @property
    def committed(self) -> list[str]:
        return [host for host, outcome in self.answers.items() if outcome in (Outcome.COMMITTED, Outcome.TORN)]

    @property
    def called_off(self) -> bool:
        return Outcome.ABORTED in self.answers.values()

    def __str__(self) -> str:
        parts = [f"committed by none of: {', '.join(self.answers) or 'no siblings'}"]
        parts += [f"{host} is gone: {why}" for host, why in self.gone.items()]
        parts += [f"{host} not reached: {why}" for host, why in self.unreached.items()]
        return "; ".join(parts)


def settle(
    voter: Voter,
    update: str,
    siblings: Siblings,
    *,
    within_s: float,
    clock: Callable[[], float],
    wait: Callable[[float], None],
) -> Settlement:
    """Ends `update`, for which `voter` has voted and holds, by the rule above."""
    until = clock() + within_s
    lost = "its publisher was lost after the vote"

    def ask(intent: Intent, *, again: bool = True) -> Poll:
        question = Ask(sequence=1, update=update, asker=voter.host, intent=intent)
        while True:
            poll = ask_each(siblings, question)
            known = poll.committed or (intent is Intent.HOLD and poll.called_off)
            if known or not poll.unreached or not again or clock() >= until:
                return poll
            wait(RETRY_S)

    found = ask(Intent.HOLD)
    called_off = found.called_off
    if not found.committed and (called_off or not found.unreached):
        told = ask(Intent.ABORT, again=not called_off)
        if not told.committed and (called_off or not told.unreached):
            return voter.call_off(update, f"{lost}; {found}")
        found = told  # one that held has committed meanwhile, with one that is gone now; or may have
    if not found.committed:
        return voter.stop(
            update,
            Outcome.UNDECIDED,
            f"undecided: {lost}; {found}. Within {within_s:g} s it was not to be learned whether the update was "
            "committed, so this host serves nothing until a complete commit",
        )
    reason = f"{lost}, and {', '.join(found.committed)} took the commit"
    while isinstance(settlement := voter.follow(update, reason), str):
        if clock() >= until:
            return voter.stop(update, Outcome.TORN, f"{reason}; {settlement}, nor within {within_s:g} s")
        wait(RETRY_S)
    return settlement


def ask_each(siblings: Siblings, question: Ask) -> Poll:
    """What each sibling answers, and why those that do not cannot."""
    poll = Poll()
    try:
        listed = tuple(siblings())
    except WeightsError as error:
        poll.unreached["the roster"] = str(error)
        return poll
    for sibling in listed:
        try:
            poll.answers[sibling.host] = sibling.ask(question).outcome
        except PeerGone as error:
            poll.gone[sibling.host] = str(error)
        except WeightsError as error:
            poll.unreached[sibling.host] = str(error)
    return poll
