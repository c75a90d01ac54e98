"""Receiver: the host's end of a weight update, and what it answers to whom.

It is a state machine: `state.py` draws it, `course.py` holds where it stands. The life of an update:

1. Offer: the whole manifest is planned against the hosted layout. Nothing is taken on faith and nothing is written.
2. Stage, part after part: it is kept, or opened where the learner has it, and hashed, while requests run.
3. Vote: the host says yes only when every byte is here and every digest is the manifest's.
4. Commit: requests pause, parameters are overwritten in place, and the *live* parameters are hashed. Only if they are
   the manifest's does the version flip. Anything else leaves the host torn: it serves nothing until a complete commit.

A streamed update (`delivery.py`) stages nothing: its commit is Commit, which pauses, Deliver for each bucket, which
writes it, and Finish, which verifies.

A publisher that dies or falls silent before the vote is forgotten. One that does so after the vote may have told a
sibling to commit, so the host settles with its siblings: `settlement.py` has the rule.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from weights.course import Course
from weights.digest import Digest
from weights.errors import ManifestError, WeightsError
from weights.hosted import Hosted
from weights.known import Known
from weights.lease_payload import LeasePayload
from weights.manifest import Manifest
from weights.messages import (
    PROTOCOL,
    Abort,
    Aborted,
    Answer,
    Ask,
    Begun,
    Commit,
    Deliver,
    Delivered,
    Finish,
    Hello,
    Join,
    Joined,
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
from weights.reach import NoReach, Reach
from weights.rendezvous import DEFAULT_SILENCE_S
from weights.serving import Serving
from weights.settlement import Settlement, Siblings, settle
from weights.staging import StagedUpdate
from weights.state import Intent, Outcome, State
from weights.stream_payload import StreamPayload
from weights.version import WeightVersion

LOST_DELIVERING = "the publisher was lost while it delivered the update"


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
        reach: Reach | None = None,
        silence_s: float = DEFAULT_SILENCE_S,
        delivery_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        """version: of what `parameters` hold now; None if that is not to be served: the host begins like a torn one.
        reach: how it opens what a learner names; left out, it opens nothing.
        silence_s: how long an update may hear nothing from its publisher, and how long settling it may take then.
        delivery_s: the same while the host is paused for buckets that are still to come; left out, silence_s.

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
        self._delivery_s = silence_s if delivery_s is None else min(delivery_s, silence_s)
        self._clock = clock
        self._wait = wait
        self._lock = threading.RLock()
        self._course = Course(self._hosted)
        self._known = Known(host, layout, parameters, NoReach() if reach is None else reach)
        self._heard_at = clock()

    @property
    def state(self) -> State:
        return self._course.state

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
        """Seconds until the publisher has said nothing for too long, while an update is under way or the host is torn:
        a learner that is frozen must not keep the one away that would heal it. None otherwise.
        """
        with self._lock:
            if self._course.update is None and self._course.state is not State.TORN:
                return None
            silence_s = self._delivery_s if self._course.is_paused else self._silence_s
            return self._heard_at + silence_s - self._clock()

    def handle(self, request: Request, segment: Tensor | None = None) -> Reply:
        """Answers one request. `segment`: flat uint8, the payload of a Stage.

        Whatever arrives twice, late or out of order is answered as before or refused, without harm.
        """
        with self._lock:
            if not isinstance(request, Ask) and self._concerns_what_is_under_way(request):
                self._heard_at = self._clock()
            match request:
                case Hello():
                    return self._welcome(request)
                case Join():
                    return self._join(request)
                case Offer():
                    return self._offer(request)
                case Stage():
                    return self._stage(request, segment)
                case Vote():
                    return self._vote(request)
                case Commit():
                    return self._commit(request)
                case Deliver():
                    return self._deliver(request)
                case Finish():
                    return self._finish(request)
                case Abort():
                    return self._abort(request)
                case Ask():
                    return self._answer(request)

    def _concerns_what_is_under_way(self, request: Request) -> bool:
        """Whether it counts as a sign of the publisher: beside an update under way, only what names that update. A
        publisher that has forgotten an update must not keep it alive by whatever else it says."""
        under_way = self._course.update
        return under_way is None or getattr(request, "update", None) == under_way.offer.update

    def lost(self) -> bool:
        """The publisher's connection ended, or it fell silent.

        An update without a vote is forgotten, and one that was being delivered leaves the host torn; returns whether
        one with a vote waits for `settle`. Whatever was leased or joined is let go, apart from that one's.
        """
        with self._lock:
            self._course.interrupt(LOST_DELIVERING)
            if self._course.state is State.OFFERED:
                self._course.forget()
            waits = self._course.state is State.STAGED
            if not waits:
                self._known.forget_learner()
            return waits

    def settle(self, siblings: Siblings) -> Settlement | None:
        """Ends the update of a publisher that is gone or silent; None if there is none.

        Without a vote: aborted. With one: as `settlement.py` has it. It may take `silence_s`.
        """
        with self._lock:
            self._course.interrupt(LOST_DELIVERING)
            if self._course.update is None:
                self._known.forget_learner()  # a sibling may have ended it since `lost`
                return None
            update = self._course.update.offer.update
            if self._course.state is not State.STAGED:
                return self.call_off(update, "its publisher was lost before the vote")
            self._course.held = True  # a Commit that still comes is refused: siblings may be told to abort
        # Without the lock: two hosts that settle at once ask each other.
        settlement = settle(self, update, siblings, within_s=self._silence_s, clock=self._clock, wait=self._wait)
        with self._lock:
            self._known.forget_learner()
        return settlement

    # What settling decides (settlement.Voter).

    def follow(self, update: str, reason: str) -> Settlement | str:
        """Commits because siblings did; a text says why it could not pause, and nothing was written."""
        with self._lock:
            staged = self._course.find(update)
            if staged is not None and not staged.offer.delivery.outlives_the_learner:
                return self.stop(update, Outcome.TORN, f"{reason}; the bytes of this update went with its learner")
            if staged is not None:
                written = self._course.write(staged, sequence=0)
                if isinstance(written, str):
                    if self._course.state is State.STAGED:
                        return written
                    reason = f"{reason}; {written}"
            return self._settled(update, reason)

    def call_off(self, update: str, reason: str) -> Settlement:
        """Aborts because no host has committed."""
        with self._lock:
            if self._course.find(update) is not None:
                self._course.forget()
            return self._settled(update, reason)

    def stop(self, update: str, outcome: Outcome, reason: str) -> Settlement:
        """Lets go of the update and serves nothing: a sibling may have committed, and this host did not."""
        with self._lock:
            if self._course.find(update) is not None:
                self._hosted.stop(reason)
                self._course.end(outcome)
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
            state=self._course.state,
            version=self._hosted.version,
            layout=self.layout.digest,
            tied=self.layout.tied,
            catalogue=self._known.catalogue,
            lease=self._known.lease,
            way=self._known.way,
        )

    def _join(self, join: Join) -> Reply:
        if self._course.update is not None:
            return self._refuse(join, f"update {self._course.update.offer.update} is under way; it ends first")
        try:
            return Joined(sequence=join.sequence, way=self._known.join(join))
        except (WeightsError, ValueError, RuntimeError, OSError) as error:
            return self._refuse(join, f"cannot join the learner's way for buckets: {error}")

    def _offer(self, offer: Offer) -> Reply:
        ended, under_way = self._course.outcomes.get(offer.update), self._course.update
        if ended is not None:
            return self._refuse(offer, f"update {offer.update} has ended here: {ended}")
        if under_way is not None:
            if replace(offer, sequence=under_way.offer.sequence) == under_way.offer:
                return self._offered(offer, under_way)
            return self._refuse(offer, f"update {under_way.offer.update} is under way; it ends, or is settled, first")
        try:
            update = self._planned(offer)
        except (ManifestError, ValueError, RuntimeError) as error:
            return self._refuse(offer, str(error))
        served = self._hosted.version
        if served is not None and served.run == offer.run and offer.step <= served.step and update.version != served:
            # The very version that serves is welcome: publishing it again is how a fleet that disagrees is healed.
            return self._refuse(offer, f"serves {served}; step {offer.step} of the same run is stale")
        self._course.begin(update)
        return self._offered(offer, update)

    def _planned(self, offer: Offer) -> StagedUpdate:
        placement = self._known.placement(offer)
        manifest = Manifest(placement.catalogue, offer.digests)
        content = manifest if offer.base is None else self._hosted.after(manifest, offer.base)
        payload = self._known.payload(offer, placement)
        return StagedUpdate(offer, content=content, placement=placement, payload=payload)

    def _offered(self, offer: Offer, update: StagedUpdate) -> Offered:
        return Offered(
            sequence=offer.sequence,
            update=offer.update,
            stages=update.payload.stages,
            content=update.content.digest,
        )

    def _stage(self, stage: Stage, segment: Tensor | None) -> Reply:
        update = self._course.find(stage.update)
        if update is None:
            return self._refuse_absent(stage)
        if self._course.state is State.OFFERED:
            try:
                if isinstance(update.payload, LeasePayload):
                    if update.payload.missing():  # else a second lease would close the one that was read
                        update.payload.read(stage.bucket, self._known.opened(stage, update.placement))
                else:
                    update.payload.stage(stage.bucket, segment)
            except (WeightsError, ValueError, RuntimeError, OSError) as error:
                self._course.forget()
                return self._refuse(stage, str(error))
        elif stage.bucket >= update.payload.stages:
            return self._refuse(stage, f"bucket {stage.bucket} is none of the update's {update.payload.stages}")
        return Staged(sequence=stage.sequence, update=stage.update, bucket=stage.bucket)

    def _vote(self, vote: Vote) -> Reply:
        update = self._course.find(vote.update)
        if update is None:
            return self._refuse_absent(vote)
        if self._course.state is State.OFFERED:
            try:
                faults = update.faults()
                if not faults:
                    update.payload.ready()
                    update.placement.ready()
            except (WeightsError, ValueError, RuntimeError, OSError) as error:
                faults = [str(error)]
            if faults:
                self._course.forget()
                return self._refuse(vote, "\n  ".join(["cannot vote for this update:", *faults]))
            self._course.vote()
        return Voted(sequence=vote.sequence, update=vote.update, digest=update.offer.digests.total)

    def _commit(self, commit: Commit) -> Reply:
        committed = self._course.committed(commit.update, commit.sequence)
        if committed is not None:
            return committed
        update = self._course.find(commit.update)
        if update is None:
            return self._refuse_absent(commit)
        if self._course.state is not State.STAGED:
            return self._refuse(commit, "has not voted for this update")
        if self._course.held:
            return self._refuse(commit, "is settling this update with its siblings: the commit comes too late")
        if isinstance(update.payload, StreamPayload):
            refusal = self._course.begin_writing(update)
            if refusal is not None:
                return self._refuse(commit, refusal)
            return Begun(sequence=commit.sequence, update=commit.update)
        written = self._course.write(update, commit.sequence)
        return self._refuse(commit, written) if isinstance(written, str) else written

    def _deliver(self, deliver: Deliver) -> Reply:
        update = self._course.find(deliver.update)
        if update is None:
            return self._refuse_absent(deliver)
        payload = update.payload
        if not isinstance(payload, StreamPayload) or not self._course.is_paused:
            return self._refuse(deliver, "has not begun to take deliveries of this update")
        if self._course.held:
            return self._refuse(deliver, "is settling this update with its siblings: the delivery comes too late")
        if deliver.bucket > payload.delivered or deliver.bucket >= payload.buckets:
            return self._refuse(deliver, f"bucket {payload.delivered} of {payload.buckets} is next")
        if deliver.bucket == payload.delivered:
            refusal = self._course.deliver(update, deliver.bucket)
            if refusal is not None:
                return self._refuse(deliver, refusal)
        return Delivered(sequence=deliver.sequence, update=deliver.update, bucket=deliver.bucket)

    def _finish(self, finish: Finish) -> Reply:
        committed = self._course.committed(finish.update, finish.sequence)
        if committed is not None:
            return committed
        update = self._course.find(finish.update)
        if update is None:
            return self._refuse_absent(finish)
        payload = update.payload
        if not isinstance(payload, StreamPayload) or not self._course.is_paused or payload.missing_buckets:
            return self._refuse(finish, "has not taken every bucket of this update")
        if self._course.held:
            return self._refuse(finish, "is settling this update with its siblings: it comes too late")
        written = self._course.finish_writing(update, finish.sequence)
        return self._refuse(finish, written) if isinstance(written, str) else written

    def _abort(self, abort: Abort) -> Reply:
        if self._course.find(abort.update) is not None:
            if self._course.state is State.COMMITTING:
                self._course.interrupt(f"its publisher called the update off half-way: {abort.reason}")
                return self._refuse_absent(abort)
            self._course.forget()
        elif self._course.outcomes.get(abort.update) in (Outcome.COMMITTED, Outcome.TORN):
            return self._refuse_absent(abort)
        else:
            self._course.outcomes.keep(abort.update, Outcome.ABORTED)  # its offer may still be on its way
        return Aborted(
            sequence=abort.sequence, update=abort.update, state=self._course.state, version=self._hosted.version
        )

    def _answer(self, ask: Ask) -> Reply:
        outcome = self._course.outcomes.get(ask.update)
        if outcome is None:
            if self._course.find(ask.update) is None:
                outcome = Outcome.UNKNOWN
                self._course.outcomes.keep(ask.update, outcome)
            elif self._course.state is State.COMMITTING:
                outcome = Outcome.TORN  # it was told to commit, and some of it is written: whole, if at all, only later
            elif self._course.state is State.STAGED and ask.intent is Intent.HOLD:
                self._course.held = True
                outcome = Outcome.VOTED
            else:
                self._course.forget()  # told to, or without our vote nobody can have committed
                outcome = Outcome.ABORTED
        return Answer(sequence=ask.sequence, update=ask.update, host=self.host, outcome=outcome)

    def _refuse_absent(self, request: Stage | Vote | Commit | Deliver | Finish | Abort) -> Refused:
        return self._refuse(request, self._course.absence(request.update))

    def _refuse(self, request: Request, reason: str) -> Refused:
        update = "" if isinstance(request, Hello | Join) else request.update
        return Refused(sequence=request.sequence, update=update, state=self._course.state, reason=reason)

    def _settled(self, update: str, reason: str) -> Settlement:
        return Settlement(update=update, outcome=self._course.outcomes[update], reason=reason)
