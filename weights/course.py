"""Course: the update that a host has under way, from its offer to its end, and how those before it ended."""

from dataclasses import replace

from weights.errors import DeadlineExceeded, WeightsError
from weights.hosted import Hosted, Overwriting
from weights.messages import Committed
from weights.outcomes import Outcomes
from weights.staging import StagedUpdate
from weights.state import Outcome, State
from weights.stream_payload import StreamPayload

INTERRUPTED = "the commit was interrupted"


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
        self._writing: Overwriting | None = None
        """The commit on its way, with its pause."""
        self._last_commit: Committed | None = None

    def find(self, update: str) -> StagedUpdate | None:
        """The update under way, if it is this one."""
        return self.update if self.update is not None and self.update.offer.update == update else None

    def absence(self, update: str) -> str:
        """Why this update is not under way."""
        return self.outcomes.absence(update, None if self.update is None else self.update.offer.update)

    def begin(self, update: StagedUpdate) -> None:
        """Its offer was taken."""
        assert self._writing is None
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
        self._leave()
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
        refusal = self.begin_writing(update)
        return self.finish_writing(update, sequence) if refusal is None else refusal

    def begin_writing(self, update: StagedUpdate) -> str | None:
        """Pauses for the commit of the update under way; nothing is written yet. A text says why it cannot."""
        if self._writing is None:
            writing = self._hosted.overwriting(update)
            try:
                writing.__enter__()
            except DeadlineExceeded as error:
                return f"could not pause, so nothing was written: {error}"
            self._writing = writing
        return None

    def deliver(self, update: StagedUpdate, bucket: int) -> str | None:
        """Writes the next bucket of a streamed update. A text says why the host is torn instead."""
        assert isinstance(update.payload, StreamPayload)
        writing = self._writing
        assert writing is not None
        writing.reason = INTERRUPTED
        is_well = False
        try:
            update.payload.arrive(bucket)  # before the first byte is written: until it is here, there is a way back
            unwritten = self._open(writing)
            if unwritten is not None:
                return unwritten
            update.payload.place(bucket)
            is_well = True
        except (RuntimeError, OSError, WeightsError) as error:
            writing.reason = f"the commit failed: {error}"
            if not writing.is_open:
                return f"nothing was written: {error}"
        finally:
            if not is_well:
                self.interrupt(writing.reason)
        return None if is_well else writing.reason

    def finish_writing(self, update: StagedUpdate, sequence: int) -> Committed | str:
        """Writes what is staged, verifies all of it, and ends the update; a text says why the host is torn instead."""
        writing = self._writing
        assert writing is not None
        writing.reason = INTERRUPTED
        try:
            unwritten = self._open(writing)
            if unwritten is not None:
                return unwritten
            writing.write()
        finally:
            self.interrupt(writing.reason)
        if writing.written is None:
            return writing.reason
        self._last_commit = Committed(
            sequence=sequence,
            update=update.offer.update,
            version=update.version,
            pause_s=writing.written.pause_s,
            copy_s=writing.written.copy_s,
            verify_s=writing.written.verify_s,
        )
        return self._last_commit

    def interrupt(self, reason: str) -> None:
        """Ends a commit on its way where it stands: the host has the update, or is torn if any of it was written; else
        only the pause ends."""
        if self._writing is not None:
            self._writing.reason = reason
            if self._writing.is_open:
                self._leave()
                self.end(Outcome.TORN if self._hosted.version is None else Outcome.COMMITTED)
            else:
                self._leave()

    @property
    def is_paused(self) -> bool:
        """A commit has begun and is not at its end."""
        return self._writing is not None

    def _open(self, writing: Overwriting) -> str | None:
        """Bytes follow. A text says why they must not: nothing is written then."""
        if not writing.is_open:
            try:
                writing.open()
            except (RuntimeError, OSError) as error:
                return f"the device failed, so nothing was written: {error}"
            self.state = State.COMMITTING
        return None

    def _leave(self) -> None:
        if self._writing is not None:
            writing, self._writing = self._writing, None
            writing.__exit__(None, None, None)
