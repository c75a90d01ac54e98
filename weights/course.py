"""Course: the update that a host has under way, from its offer to its end, and how those before it ended."""

from dataclasses import replace

from weights.errors import DeadlineExceeded
from weights.hosted import Hosted
from weights.messages import Committed
from weights.outcomes import Outcomes
from weights.staging import StagedUpdate
from weights.state import Outcome, State


class Course:
    """Where a host stands in `state.py`'s drawing. One update at a time; not for several threads, apart from `state`.

    Args:
        hosted: what the host serves, and what a commit overwrites.
    """

    def __init__(self, hosted: Hosted) -> None:
        self._hosted = hosted
        self.state = State.TORN if hosted.version is None else State.IDLE
        self.update: StagedUpdate | None = None
        """Under way; None where the host is at rest."""
        self.held = False
        """It is being settled among siblings: a publisher's commit comes too late."""
        self.outcomes = Outcomes()
        self._last_commit: Committed | None = None

    def find(self, update: str) -> StagedUpdate | None:
        """The update under way, if it is this one."""
        return self.update if self.update is not None and self.update.offer.update == update else None

    def absence(self, update: str) -> str:
        """Why this update is not under way."""
        return self.outcomes.absence(update, None if self.update is None else self.update.offer.update)

    def begin(self, update: StagedUpdate) -> None:
        """Its offer was taken."""
        self.update, self.state = update, State.OFFERED

    def vote(self) -> None:
        """All of it is here and verified, and the host has said so."""
        self.state = State.STAGED

    def forget(self) -> None:
        """Ends the update under way; nothing of it was written, and nothing will be."""
        self.end(Outcome.ABORTED)

    def end(self, outcome: Outcome) -> None:
        """Lets go of the update under way and its segments."""
        assert self.update is not None
        self.outcomes.keep(self.update.offer.update, outcome)
        self.update, self.held = None, False
        self.state = State.TORN if self._hosted.version is None else State.IDLE

    def committed(self, update: str, sequence: int) -> Committed | None:
        """The answer to a commit of this update that comes again; None if the last commit was of another."""
        if self._last_commit is None or self._last_commit.update != update:
            return None
        return replace(self._last_commit, sequence=sequence)

    def write(self, update: StagedUpdate, sequence: int) -> Committed | str:
        """Overwrites the parameters with the update under way, and ends it.

        A text says why not: nothing was written if the state is STAGED still, else the host is torn.
        """

        def paused() -> None:
            self.state = State.COMMITTING

        try:
            written = self._hosted.write(update, paused)
        except DeadlineExceeded as error:
            if self.state is not State.STAGED:
                raise
            return f"could not pause, so nothing was written: {error}"
        finally:
            if self.state is State.COMMITTING:
                self.end(Outcome.TORN if self._hosted.version is None else Outcome.COMMITTED)
        if isinstance(written, str):
            return written
        self._last_commit = Committed(
            sequence=sequence,
            update=update.offer.update,
            version=update.version,
            pause_s=written.pause_s,
            copy_s=written.copy_s,
            verify_s=written.verify_s,
        )
        return self._last_commit
