"""Receiver: the host's end of a weight update, as a state machine (`state.py` draws it) without any I/O.

The life of an update:

1. Offer: the whole manifest is planned against the hosted layout. Nothing is taken on faith and nothing is written.
2. Stage, bucket after bucket: its segment is kept and its blocks are hashed, while requests run. 3. Vote: the host
says yes only when every byte is here and every digest is the manifest's. 4. Commit: requests pause, parameters are
overwritten in place, the *live* parameters are hashed, and only if they are the manifest's
   does the version flip. Anything else leaves the host torn: it serves nothing until a complete commit.

A publisher that dies or falls silent before the vote is forgotten. One that does so after the vote may have told a
sibling to commit, so the host asks: see `settle`.
"""

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from torch import Tensor

from weights.errors import DeadlineExceeded, ManifestError, WeightsError
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
from weights.rendezvous import DEFAULT_SILENCE_S
from weights.serving import Serving, Sibling
from weights.settlement import Settlement, ask_each
from weights.staging import StagedUpdate
from weights.state import Intent, Outcome, State
from weights.version import WeightVersion

_REMEMBERED_UPDATES = 256


class Receiver:
    """One host's hosted parameters and the update under way on them. Safe to call from several threads."""

    def __init__(
        self,
        *,
        host: str,
        layout: HostedLayout,
        parameters: Mapping[str, Tensor],
        serving: Serving,
        version: WeightVersion,
        silence_s: float = DEFAULT_SILENCE_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """version: of what `parameters` hold now. silence_s: how long an update may hear nothing from its publisher.

        ValueError if the parameters are not the layout's, or not contiguous.
        """
        faults = [
            f"{name}: {tuple(view.shape)} {view.dtype}, expected {layout[name].shape} {layout[name].dtype}"
            for name, view in layout.state_dict(parameters)
            if view.shape != layout[name].shape or view.dtype != layout[name].dtype
        ]
        faults += [f"{name}: not contiguous" for name, tensor in parameters.items() if not tensor.is_contiguous()]
        if faults:
            raise ValueError("these parameters are not the layout's:\n  " + "\n  ".join(faults))
        self.host = host
        self.layout = layout
        self._parameters = parameters
        self._serving = serving
        self._silence_s = silence_s
        self._clock = clock
        self._lock = threading.RLock()
        self._state = State.IDLE
        self._version: WeightVersion | None = version
        self._update: StagedUpdate | None = None
        self._held = False
        self._heard_at = clock()
        self._outcomes: OrderedDict[str, Outcome] = OrderedDict()
        self._last_commit: Committed | None = None

    @property
    def state(self) -> State:
        return self._state

    @property
    def version(self) -> WeightVersion | None:
        """What the parameters hold, whole; None when torn."""
        return self._version

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

    def settle(self, siblings: Iterable[Sibling]) -> Settlement | None:
        """Ends the update of a publisher that is gone or silent; None if there is none.

        Without a vote: aborted. With one, the siblings are asked to hold and say how it ended with them. If any
        committed, or tore in trying, the decision was to commit and this host commits too: its segments outlive the
        learner. If none did, it aborts, and tells those that it reached to do so. One that it cannot reach is taken
        not to have committed; if it has, the fleet disagrees, each host whole and rightly labelled, until the next
        update.
        """
        siblings = tuple(siblings)
        with self._lock:
            if self._update is None:
                return None
            update = self._update.offer.update
            if self._state is not State.STAGED:
                return self._forgotten("its publisher was lost before the vote")
            self._held = True  # a Commit that still comes is refused: siblings may be told to abort
        # Without the lock: two hosts that settle at once ask each other.
        answers, unreached = ask_each(siblings, Ask(sequence=1, update=update, asker=self.host, intent=Intent.HOLD))
        with self._lock:
            if self._update is None or self._update.offer.update != update:
                return Settlement(update=update, outcome=self._outcomes[update], reason="it was aborted meanwhile")
            decided = [host for host, outcome in answers.items() if outcome in (Outcome.COMMITTED, Outcome.TORN)]
            if decided:
                return self._follow(self._update, decided)
            settlement = self._forgotten(
                f"its publisher was lost after the vote; committed by none of: {', '.join(answers) or 'no siblings'}"
                + "".join(f"; {host} not reached: {why}" for host, why in unreached.items())
            )
        reached = [sibling for sibling in siblings if sibling.host in answers]
        ask_each(reached, Ask(sequence=1, update=update, asker=self.host, intent=Intent.ABORT))
        return settlement

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
            version=self._version,
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
        served = self._version
        if served is not None and served.run == offer.run and offer.step <= served.step and update.version != served:
            # The very version that serves is welcome: publishing it again is how a fleet that disagrees is healed.
            return self._refuse(offer, f"serves {served}; step {offer.step} of the same run is stale")
        self._update, self._state = update, State.OFFERED
        return Offered(sequence=offer.sequence, update=offer.update, buckets=len(update.buckets))

    def _stage(self, stage: Stage, segment: Tensor | None) -> Reply:
        update = self._update
        if update is None or update.offer.update != stage.update:
            return self._refuse(stage, self._absence(stage.update))
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
            return self._refuse(vote, self._absence(vote.update))
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
            return self._refuse(commit, self._absence(commit.update))
        if self._state is not State.STAGED:
            return self._refuse(commit, "has not voted for this update")
        if self._held:
            return self._refuse(commit, "is settling this update with its siblings: the commit comes too late")
        written = self._write(update)
        return self._refuse(commit, written) if isinstance(written, str) else replace(written, sequence=commit.sequence)

    def _abort(self, abort: Abort) -> Reply:
        if self._update is not None and self._update.offer.update == abort.update:
            self._forget()
        elif self._outcomes.get(abort.update, Outcome.ABORTED) is not Outcome.ABORTED:
            return self._refuse(abort, self._absence(abort.update))
        else:
            self._remember(abort.update, Outcome.ABORTED)  # its offer may still be on its way
        return Aborted(sequence=abort.sequence, update=abort.update, state=self._state, version=self._version)

    def _answer(self, ask: Ask) -> Reply:
        outcome = self._outcomes.get(ask.update)
        if outcome is None:
            if self._update is None or self._update.offer.update != ask.update:
                self._remember(ask.update, Outcome.ABORTED)
                outcome = Outcome.UNKNOWN
            elif self._state is State.STAGED and ask.intent is Intent.HOLD:
                self._held = True
                outcome = Outcome.VOTED
            else:
                self._forget()  # told to, or without our vote nobody can have committed
                outcome = Outcome.ABORTED
        return Answer(sequence=ask.sequence, update=ask.update, host=self.host, outcome=outcome)

    def _follow(self, update: StagedUpdate, decided: list[str]) -> Settlement:
        """Commits because siblings did."""
        written = self._write(update)
        reason = f"its publisher was lost after the vote, and {', '.join(decided)} took the commit"
        if isinstance(written, str) and self._state is State.STAGED:
            return self._forgotten(f"{reason}; {written}; the old version serves on until the next update")
        outcome = Outcome.TORN if isinstance(written, str) else Outcome.COMMITTED
        return Settlement(update=update.offer.update, outcome=outcome, reason=reason)

    def _write(self, update: StagedUpdate) -> Committed | str:
        """Pauses and overwrites.

        A text says why not: nothing was written if the state is STAGED still, else the host is torn.
        """
        try:
            with self._serving.paused():
                paused = self._clock()
                self._state = State.COMMITTING
                done = self._overwrite(update)
            resumed = self._clock()
        except DeadlineExceeded as error:
            if self._state is not State.STAGED:
                raise
            return f"could not pause, so nothing was written: {error}"
        if isinstance(done, str):
            return done
        self._last_commit = replace(done, pause_s=resumed - paused)
        return self._last_commit

    def _overwrite(self, update: StagedUpdate) -> Committed | str:
        """Copies and verifies, inside the pause; however it is left, the version is the content's or the host is
        torn.
        """
        reason = "the commit was interrupted"
        try:
            begun = self._clock()
            update.write(self._parameters)
            copied = self._clock()
            faults = list(update.live_faults(self._parameters))
            verified = self._clock()
            if faults:
                reason = "\n  ".join(["the parameters do not hold the update after its copy:", *faults])
            else:
                self._serving.committed(update.version)
                self._version = update.version
                self._end(Outcome.COMMITTED)
                return Committed(
                    sequence=0,
                    update=update.offer.update,
                    version=update.version,
                    pause_s=0.0,
                    copy_s=copied - begun,
                    verify_s=verified - copied,
                )
        except (RuntimeError, OSError, WeightsError) as error:
            reason = f"the commit failed: {error}"
        finally:
            if self._state is State.COMMITTING:
                self._version = None
                self._end(Outcome.TORN)
                self._serving.torn(reason)
        return reason

    def _absence(self, update: str) -> str:
        ended = self._outcomes.get(update)
        if ended is not None:
            return f"update {update} has ended here: {ended}"
        under_way = f"; {self._update.offer.update} is under way" if self._update is not None else ""
        return f"update {update} was never offered here{under_way}"

    def _refuse(self, request: Request, reason: str) -> Refused:
        update = "" if isinstance(request, Hello) else request.update
        return Refused(sequence=request.sequence, update=update, state=self._state, reason=reason)

    def _forgotten(self, reason: str) -> Settlement:
        assert self._update is not None
        update = self._update.offer.update
        self._forget()
        return Settlement(update=update, outcome=Outcome.ABORTED, reason=reason)

    def _forget(self) -> None:
        self._end(Outcome.ABORTED)

    def _end(self, outcome: Outcome) -> None:
        """Lets go of the update and its segments."""
        assert self._update is not None
        self._remember(self._update.offer.update, outcome)
        self._update, self._held = None, False
        self._state = State.TORN if self._version is None else State.IDLE

    def _remember(self, update: str, outcome: Outcome) -> None:
        self._outcomes[update] = outcome
        while len(self._outcomes) > _REMEMBERED_UPDATES:
            self._outcomes.popitem(last=False)
