"""Receiver: the host's end of a weight update, as a state machine (`state.py` draws it) without any I/O.

The life of an update:

1. Offer: the whole manifest is planned against the hosted layout. Nothing is taken on faith and nothing is written.
2. Stage, bucket after bucket: its segment is kept and its blocks are hashed, while requests run.
3. Vote: the host says yes only when every byte is here and every digest is the manifest's.
4. Commit: requests pause, parameters are overwritten in place, and the *live* parameters are hashed. Only if they are
   the manifest's does the version flip. Anything else leaves the host torn: it serves nothing until a complete commit.

A publisher that dies or falls silent before the vote is forgotten. One that does so after the vote may have told a
sibling to commit, so the host settles with its siblings: `settlement.py` has the rule.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from weights.digest import Digest
from weights.errors import DeadlineExceeded, ManifestError
from weights.hosted import Hosted
from weights.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Answer,
    Ask,
    Commit,
    Committed,
    Hello,
    Offer,
    Offered,
    Refused,
    Reply,
    Request,
    Stage,
    Staged,
    Vote,
    Voted,
    Welcome,
)
from weights.naming import HostedLayout
from weights.outcomes import Outcomes
from weights.rendezvous import DEFAULT_SILENCE_S
from weights.serving import Serving
from weights.settlement import Settlement, Siblings, settle
from weights.staging import StagedUpdate
from weights.state import Intent, Outcome, State
from weights.version import WeightVersion


class Receiver:
    """One host's hosted parameters and the update under way on them. Safe to call from several threads."""

    def __init__(
        self,
        *,
        host: str,
        layout: HostedLayout,
        parameters: Mapping[str, Tensor],
        serving: Serving,
        version: WeightVersion | None,
        wire_dtypes: Mapping[str, torch.dtype] | None = None,
        silence_s: float = DEFAULT_SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """version: of what `parameters` hold now; None if that is not to be served: the host begins like a torn one.
        silence_s: how long an update may hear nothing from its publisher, and how long settling it may take then.

        ValueError if the parameters are not the layout's, or not contiguous.
        """
        self.host = host
        self.layout = layout
        self._hosted = Hosted(
            host=host,
            layout=layout,
            parameters=parameters,
            serving=serving,
            version=version,
            wire_dtypes=wire_dtypes,
            clock=clock,
        )
        self._silence_s = silence_s
        self._clock = clock
        self._wait = wait
        self._lock = threading.RLock()
        self._state = State.IDLE if version is not None else State.TORN
        self._update: StagedUpdate | None = None
        self._held = False
        self._heard_at = clock()
        self._outcomes = Outcomes()
        self._last_commit: Committed | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def version(self) -> WeightVersion | None:
        """What the parameters hold, whole; None when torn."""
        return self._hosted.version

    def content(self) -> tuple[WeightVersion, Iterator[tuple[str, Tensor]]]:
        """What the parameters hold, as it came over the wire: (wire name, tensor in its wire dtype), read as it is
        iterated.

        A commit meanwhile makes it a mixture, which shows in its digest. UpdateAborted if the host has no version.
        """
        with self._lock:
            return self._hosted.content()

    def live_digest(self) -> Digest:
        """Recomputed from the parameters as they are, no commit in between; equal to the version's digest if whole."""
        with self._lock:
            return self._hosted.digest()

    @property
    def silence_left_s(self) -> float | None:
        """Seconds until the update under way has heard nothing for too long; None without an update."""
        with self._lock:
            return None if self._update is None else self._heard_at + self._silence_s - self._clock()

    def handle(self, request: Request, segment: Tensor | None = None) -> Reply:
        """Answers one request. `segment`: flat uint8, the payload of a Stage.

        Whatever arrives twice, late or out of order is answered as before or refused, without harm.
        """
        with self._lock:
            if not isinstance(request, Ask):
                self._heard_at = self._clock()
            match request:
                case Hello():
                    return self._welcome(request)
                case Offer():
                    return self._offer(request)
                case Stage():
                    return self._stage(request, segment)
                case Vote():
                    return self._vote(request)
                case Commit():
                    return self._commit(request)
                case Abort():
                    return self._abort(request)
                case Ask():
                    return self._answer(request)

    def lost(self) -> bool:
        """The publisher's connection ended.

        An update without a vote is forgotten; returns whether one with a vote waits for `settle`.
        """
        with self._lock:
            if self._state is State.OFFERED:
                self._forget()
            return self._state is State.STAGED

    def settle(self, siblings: Siblings) -> Settlement | None:
        """Ends the update of a publisher that is gone or silent; None if there is none.

        Without a vote: aborted. With one: as `settlement.py` has it. It may take `silence_s`.
        """
        with self._lock:
            if self._update is None:
                return None
            update = self._update.offer.update
            if self._state is not State.STAGED:
                return self.call_off(update, "its publisher was lost before the vote")
            self._held = True  # a Commit that still comes is refused: siblings may be told to abort
        # Without the lock: two hosts that settle at once ask each other.
        return settle(self, update, siblings, within_s=self._silence_s, clock=self._clock, wait=self._wait)

    # What settling decides (settlement.Voter).

    def follow(self, update: str, reason: str) -> Settlement | str:
        """Commits because siblings did; a text says why it could not pause, and nothing was written."""
        with self._lock:
            if self._update is not None and self._update.offer.update == update:
                written = self._write(self._update)
                if isinstance(written, str):
                    if self._state is State.STAGED:
                        return written
                    reason = f"{reason}; {written}"
            return self._settled(update, reason)

    def call_off(self, update: str, reason: str) -> Settlement:
        """Aborts because no host has committed."""
        with self._lock:
            if self._update is not None and self._update.offer.update == update:
                self._forget()
            return self._settled(update, reason)

    def stop(self, update: str, outcome: Outcome, reason: str) -> Settlement:
        """Lets go of the update and serves nothing: a sibling may have committed, and this host did not."""
        with self._lock:
            if self._update is not None and self._update.offer.update == update:
                self._hosted.stop(reason)
                self._end(outcome)
            return self._settled(update, reason)

    def _welcome(self, hello: Hello) -> Reply:
        if hello.protocol != PROTOCOL:
            return self._refuse(
                hello, f"speaks protocol {PROTOCOL}, the publisher {hello.protocol}: run the same release"
            )
        return Welcome(
            sequence=hello.sequence,
            protocol=PROTOCOL,
            host=self.host,
            state=self._state,
            version=self._hosted.version,
            layout=self.layout.digest,
            tied=self.layout.tied,
        )

    def _offer(self, offer: Offer) -> Reply:
        ended = self._outcomes.get(offer.update)
        if ended is not None:
            return self._refuse(offer, f"update {offer.update} has ended here: {ended}")
        if self._update is not None:
            if replace(offer, sequence=self._update.offer.sequence) == self._update.offer:
                return Offered(sequence=offer.sequence, update=offer.update, buckets=len(self._update.buckets))
            return self._refuse(
                offer, f"update {self._update.offer.update} is under way; it ends, or is settled, first"
            )
        if offer.base is not None:
            return self._refuse(offer, f"takes full updates only, and this one builds on {offer.base}")
        try:
            update = StagedUpdate(offer, self.layout)
        except (ManifestError, ValueError) as error:
            return self._refuse(offer, str(error))
        served = self._hosted.version
        if served is not None and served.run == offer.run and offer.step <= served.step and update.version != served:
            # The very version that serves is welcome: publishing it again is how a fleet that disagrees is healed.
            return self._refuse(offer, f"serves {served}; step {offer.step} of the same run is stale")
        self._update, self._state = update, State.OFFERED
        return Offered(sequence=offer.sequence, update=offer.update, buckets=len(update.buckets))

    def _stage(self, stage: Stage, segment: Tensor | None) -> Reply:
        update = self._update
        if update is None or update.offer.update != stage.update:
            return self._refuse_absent(stage)
        if self._state is State.OFFERED:
            try:
                update.stage(stage.bucket, segment)
            except ManifestError as error:
                self._forget()
                return self._refuse(stage, str(error))
        elif stage.bucket >= len(update.buckets):
            return self._refuse(stage, f"bucket {stage.bucket} is none of the update's {len(update.buckets)}")
        return Staged(sequence=stage.sequence, update=stage.update, bucket=stage.bucket)

    def _vote(self, vote: Vote) -> Reply:
        update = self._update
        if update is None or update.offer.update != vote.update:
            return self._refuse_absent(vote)
        if self._state is State.OFFERED:
            faults = update.faults()
            if faults:
                self._forget()
                return self._refuse(vote, "\n  ".join(["cannot vote for this update:", *faults]))
            self._state = State.STAGED
        return Voted(sequence=vote.sequence, update=vote.update, digest=update.digest)

    def _commit(self, commit: Commit) -> Reply:
        if self._last_commit is not None and self._last_commit.update == commit.update:
            return replace(self._last_commit, sequence=commit.sequence)
        update = self._update
        if update is None or update.offer.update != commit.update:
            return self._refuse_absent(commit)
        if self._state is not State.STAGED:
            return self._refuse(commit, "has not voted for this update")
        if self._held:
            return self._refuse(commit, "is settling this update with its siblings: the commit comes too late")
        written = self._write(update)
        return self._refuse(commit, written) if isinstance(written, str) else replace(written, sequence=commit.sequence)

    def _abort(self, abort: Abort) -> Reply:
        if self._update is not None and self._update.offer.update == abort.update:
            self._forget()
        elif self._outcomes.get(abort.update) in (Outcome.COMMITTED, Outcome.TORN):
            return self._refuse_absent(abort)
        else:
            self._outcomes.keep(abort.update, Outcome.ABORTED)  # its offer may still be on its way
        return Aborted(sequence=abort.sequence, update=abort.update, state=self._state, version=self._hosted.version)

    def _answer(self, ask: Ask) -> Reply:
        outcome = self._outcomes.get(ask.update)
        if outcome is None:
            if self._update is None or self._update.offer.update != ask.update:
                outcome = Outcome.UNKNOWN
                self._outcomes.keep(ask.update, outcome)
            elif self._state is State.STAGED and ask.intent is Intent.HOLD:
                self._held = True
                outcome = Outcome.VOTED
            else:
                self._forget()  # told to, or without our vote nobody can have committed
                outcome = Outcome.ABORTED
        return Answer(sequence=ask.sequence, update=ask.update, host=self.host, outcome=outcome)

    def _write(self, update: StagedUpdate) -> Committed | str:
        """Overwrites the parameters.

        A text says why not: nothing was written if the state is STAGED still, else the host is torn.
        """

        def paused() -> None:
            self._state = State.COMMITTING

        try:
            written = self._hosted.write(update, paused)
        except DeadlineExceeded as error:
            if self._state is not State.STAGED:
                raise
            return f"could not pause, so nothing was written: {error}"
        finally:
            if self._state is State.COMMITTING:
                self._end(Outcome.TORN if self._hosted.version is None else Outcome.COMMITTED)
        if isinstance(written, str):
            return written
        self._last_commit = Committed(
            sequence=0,
            update=update.offer.update,
            version=update.version,
            pause_s=written.pause_s,
            copy_s=written.copy_s,
            verify_s=written.verify_s,
        )
        return self._last_commit

    def _refuse_absent(self, request: Stage | Vote | Commit | Abort) -> Refused:
        under_way = None if self._update is None else self._update.offer.update
        return self._refuse(request, self._outcomes.absence(request.update, under_way))

    def _refuse(self, request: Request, reason: str) -> Refused:
        update = "" if isinstance(request, Hello) else request.update
        return Refused(sequence=request.sequence, update=update, state=self._state, reason=reason)

    def _settled(self, update: str, reason: str) -> Settlement:
        return Settlement(update=update, outcome=self._outcomes[update], reason=reason)

    def _forget(self) -> None:
        self._end(Outcome.ABORTED)

    def _end(self, outcome: Outcome) -> None:
        """Lets go of the update and its segments."""
        assert self._update is not None
        self._outcomes.keep(self._update.offer.update, outcome)
        self._update, self._held = None, False
        self._state = State.TORN if self._hosted.version is None else State.IDLE
