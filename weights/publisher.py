"""Publisher: the learner's end of a weight update. All hosts or none.

The life of a publish:

1. Greet every host of the roster; connect to those that are new.
2. Load: each tensor is hashed, where it is or in a segment to which it is copied. What the transport does here is its
   `Loader`'s; how the bytes come to the hosts is the cargo's `Delivery`.
3. Offer the manifest to all; each plans it whole.
4. Stage part after part with all; each opens it and hashes what it reads.
5. Vote: each says that it holds, or can read, the manifest's bytes. Any fault up to here aborts the update everywhere.
6. Commit on all. From here on the update may only end committed. Where bytes come only now, hosts pause first, and the
   first bucket is the point of no return.

Requests go to all hosts before the first reply is awaited, so that hosts work side by side.
"""

import os
import socket
import time
import uuid
from collections.abc import Callable
from itertools import pairwise
from types import TracebackType
from typing import Self

from weights.bucket import DEFAULT_BUCKET_BYTES, check_bucket_bytes
from weights.cargo import Cargo, Segment
from weights.delivery import Delivery
from weights.digest import ZERO, Digest
from weights.errors import CommitIncomplete, TransportError, UpdateAborted
from weights.lease import SlotTerms, WireTerms
from weights.links import Links, blame
from weights.messages import (
    SIBLING,
    Abort,
    Aborted,
    Begun,
    Commit,
    Committed,
    Deliver,
    Delivered,
    Finish,
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
from weights.publishing import Publishing
from weights.rendezvous import DEFAULT_DEADLINE_S, Roster
from weights.report import HostTimes, PublishReport
from weights.source import Source, declined_unless_read
from weights.state import State
from weights.transports.by_roster import transport_of
from weights.transports.seam import Transport
from weights.version import WeightVersion


class Publisher:
    """A learner's connection to a fleet. Not for several threads."""

    def __init__(
        self,
        transport: Transport,
        *,
        run: str | None = None,
        deadline_s: float = DEFAULT_DEADLINE_S,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        is_sibling: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nobody yet: `connect` and `publish` do.

        run: the trainer's run; left out, a new one that no other learner has. deadline_s: how long a host may take to
        answer a call. is_sibling: it is a host that shares what it serves; a learner that comes meanwhile waits for it.
        """
        check_bucket_bytes(bucket_bytes)
        if not deadline_s > 0:
            raise ValueError(f"a deadline is positive, got {deadline_s} s")
        self.run = f"run-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}" if run is None else run
        WeightVersion(run=self.run, step=0, digest=ZERO)  # refuses a run that no version may have
        self._clock = clock
        self._publishing: Publishing | None = None
        self._loader = transport.loader(bucket_bytes)
        self._links = Links(
            transport,
            publisher=f"{SIBLING if is_sibling else ''}{self.run} (process {os.getpid()} on {socket.gethostname()})",
            deadline_s=deadline_s,
        )

    @classmethod
    def connect(cls, name: str, *, run: str | None = None, deadline_s: float | None = None) -> "Publisher":
        """Finds the fleet `name` on this machine and connects to all of its hosts.

        RosterError if there is no such fleet, UpdateAborted naming every host that cannot be reached or has a
        publisher already.
        """
        roster = Roster.read(name)
        publisher = cls(
            transport_of(roster),
            run=run,
            deadline_s=roster.deadline_s if deadline_s is None else deadline_s,
            bucket_bytes=roster.bucket_bytes,
        )
        try:
            publisher._links.greet()
        except BaseException:
            publisher.close()  # the hosts that did welcome us wait for no one else
            raise
        return publisher

    def publish(
        self, source: Source, step: int, *, base: Digest | None = None, digest: Digest | None = None
    ) -> PublishReport:
        """Brings all hosts to `source` as `WeightVersion(run, step, digest of the content)`.

        base: `source` is a subset of the tensors, to be written over the content of this digest; every host must serve
        that. digest: what the whole content's must be, where `source` may change while it is read.

        UpdateAborted: nothing was committed anywhere; names every host at fault. CommitIncomplete: the commit was
        sent and not every host confirmed; names those that did, those torn, and those unknown. ValueError for a
        source that cannot be sent.
        """
        self._refuse_another()
        return self._publish(source, step, base, digest, lambda: None)

    def begin(
        self, source: Source, step: int, *, base: Digest | None = None, digest: Digest | None = None
    ) -> Publishing:
        """As `publish`, in a thread of its own while the learner computes on; nothing else may be asked of this
        publisher until it has ended. ValueError while another one is on its way.
        """
        self._refuse_another()
        self._publishing = Publishing(lambda is_read: self._publish(source, step, base, digest, is_read))
        return self._publishing

    def close(self) -> None:
        """Leaves the fleet: another publisher may connect. Segments that hosts still map live on with them.

        Waits for an update that `begin` began, however it ends.
        """
        if self._publishing is not None:
            self._publishing.end()
        self._links.close()
        self._loader.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _refuse_another(self) -> None:
        if self._publishing is not None and not self._publishing.done:
            raise ValueError("an update is on its way already: wait for its result first")

    def _publish(
        self,
        source: Source,
        step: int,
        base: Digest | None,
        digest: Digest | None,
        is_read: Callable[[], None],
    ) -> PublishReport:
        """is_read: called as soon as the source is read no more, if that is before the end."""
        with declined_unless_read(source) as reading:
            WeightVersion(run=self.run, step=step, digest=ZERO)  # refuses a step that no version may have
            reading.begins()
        complete = False
        try:
            report = self._bring(source, step, base, digest, is_read)
            complete = True
        finally:
            self._loader.unload(complete=complete)
        return report

    def _bring(
        self,
        source: Source,
        step: int,
        base: Digest | None,
        digest: Digest | None,
        is_read: Callable[[], None],
    ) -> PublishReport:
        marks = [self._clock()]
        with declined_unless_read(source) as reading:
            welcomes = self._links.greet()
            marks.append(self._clock())
            tied = {alias: name for welcome in welcomes.values() for alias, name in welcome.tied.items()}
            reading.begins()
        try:
            cargo = self._loader.load(source, tied)
        except TransportError as error:  # no memory for a bucket, say
            raise UpdateAborted(
                f"the update could not be loaded: {error}; every host keeps what it serves", {}
            ) from error
        if any(welcome.state is State.TORN for welcome in welcomes.values()):
            welcomes = self._links.greet()  # a torn host waits for nobody for long, and loading may have taken long
        if cargo.delivery is Delivery.SEGMENTS:
            is_read()
        marks.append(self._clock())
        update = uuid.uuid4().hex
        self._join(cargo, welcomes)
        agreed = False
        try:
            version = self._offer(update, step, base, digest, cargo, welcomes)
            marks.append(self._clock())
            self._stage(update, cargo, welcomes)
            if cargo.delivery is Delivery.SHADOW:
                is_read()
            marks.append(self._clock())
            self._vote(update, cargo.manifest.digest)
            marks.append(self._clock())
            agreed = True
        finally:
            if not agreed:
                self._call_off(update)
        committed = self._commit(update, version, cargo)
        marks.append(self._clock())
        greet_s, gather_s, offer_s, stage_s, vote_s, commit_s = (b - a for a, b in pairwise(marks))
        return PublishReport(
            version=version,
            bytes=cargo.manifest.bytes,
            seconds=marks[-1] - marks[0],
            phases={
                "gather": gather_s,
                "offer": greet_s + offer_s,
                "stage": stage_s,
                "vote": vote_s,
                "commit": commit_s,
            },
            hosts={
                host: HostTimes(pause_s=reply.pause_s, copy_s=reply.copy_s, verify_s=reply.verify_s)
                for host, reply in committed.items()
            },
        )

    def _join(self, cargo: Cargo, welcomes: dict[str, Welcome]) -> None:
        """Brings all hosts to where the cargo's buckets come, unless they are there."""
        way = cargo.way({host: welcome.way for host, welcome in welcomes.items()})
        if way is None or all(welcome.way == way.name for welcome in welcomes.values()):
            return
        self._agree(
            "prepared (joining the way of its buckets)",
            lambda sequence: Join(
                sequence=sequence,
                wire=way if isinstance(way, WireTerms) else None,
                slots=way if isinstance(way, SlotTerms) else None,
            ),
            lambda reply: isinstance(reply, Joined) and reply.way == way.name,
            meanwhile=cargo.meet,
        )

    def _offer(
        self,
        update: str,
        step: int,
        base: Digest | None,
        digest: Digest | None,
        cargo: Cargo,
        welcomes: dict[str, Welcome],
    ) -> WeightVersion:
        """The version that all hosts will serve: they say what they will hold, and must agree."""
        manifest = cargo.manifest
        is_known = all(welcome.catalogue == manifest.catalogue.id for welcome in welcomes.values())

        def offer(sequence: int) -> Request:
            return Offer(
                sequence=sequence,
                update=update,
                run=self.run,
                step=step,
                base=base,
                delivery=cargo.delivery,
                bucket_bytes=cargo.bucket_bytes,
                catalogue=manifest.catalogue.id,
                tensors=None if is_known else manifest.catalogue,
                digests=manifest.digests,
            )

        def fits(reply: Reply) -> bool:
            return (
                isinstance(reply, Offered)
                and reply.stages == cargo.stages
                and (base is not None or reply.content == manifest.digest)
            )

        replies = self._agree("offered", offer, fits)
        contents = {reply.content for reply in replies.values() if isinstance(reply, Offered)}
        if len(contents) != 1:
            raise UpdateAborted(f"the hosts would hold different contents: {', '.join(map(str, contents))}", {})
        content = contents.pop()
        if digest is not None and content != digest:
            raise UpdateAborted(f"the source has digest {content}, expected {digest}: it changed while it was read", {})
        return WeightVersion(run=self.run, step=step, digest=content)

    def _stage(self, update: str, cargo: Cargo, welcomes: dict[str, Welcome]) -> None:
        lease = cargo.lease
        is_held = lease is not None and all(welcome.lease == lease.id for welcome in welcomes.values())
        for part in range(cargo.stages):

            def stage(sequence: int, part: int = part) -> Request:
                return Stage(
                    sequence=sequence,
                    update=update,
                    bucket=part,
                    lease="" if lease is None else lease.id,
                    terms=None if is_held else lease,
                )

            def staged(reply: Reply, part: int = part) -> bool:
                return isinstance(reply, Staged) and reply.bucket == part

            def transmit(part: int = part) -> None:
                cargo.transmit(part)

            cargo.prepare(part)
            self._agree(f"staged (part {part} of {cargo.stages})", stage, staged, cargo.segment(part), transmit)

    def _vote(self, update: str, digest: Digest) -> None:
        self._agree(
            "voted for",
            lambda sequence: Vote(sequence=sequence, update=update),
            lambda reply: isinstance(reply, Voted) and reply.digest == digest,
        )

    def _agree(
        self,
        what: str,
        build: Callable[[int], Request],
        accepts: Callable[[Reply], bool],
        segment: Segment | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> dict[str, Reply]:
        """Calls every host; UpdateAborted unless each gives the reply that `accepts` wants."""
        replies, faults = self._links.call(build, segment, meanwhile)
        for host, reply in replies.items():
            if isinstance(reply, Refused):
                faults[host] = reply.reason
            elif not accepts(reply):
                faults[host] = f"answered {reply!r:.200}"
        if faults:
            text = f"the update could not be {what} on every host; all keep what they serve"
            raise UpdateAborted(blame(text, faults), faults)
        return replies

    def _call_off(self, update: str) -> None:
        """Tells every host that the update is off.

        One that does not confirm is parted from: it notices, and forgets or settles.
        """
        unsure = list(self._links.hosts)
        try:
            replies, faults = self._links.call(
                lambda sequence: Abort(sequence=sequence, update=update, reason="the publisher called the update off")
            )
            unsure = [*faults, *(host for host, reply in replies.items() if not isinstance(reply, Aborted))]
        finally:
            for host in unsure:
                self._links.part(host)
            if unsure:
                self._loader.doubt()

    def _commit(self, update: str, version: WeightVersion, cargo: Cargo) -> dict[str, Committed]:
        """Point of no return: an update that one host may have committed is never called off."""
        if cargo.delivery is Delivery.STREAM:
            begun = False
            try:
                cargo.prepare(0)
                self._agree(
                    "begun", lambda sequence: Commit(sequence=sequence, update=update), lambda r: isinstance(r, Begun)
                )
                begun = True
            finally:
                if not begun:
                    self._call_off(update)  # all are paused at most: nothing is written before the first bucket
            self._deliver(update, version, cargo)
            return self._end(version, lambda sequence: Finish(sequence=sequence, update=update), update)
        return self._end(version, lambda sequence: Commit(sequence=sequence, update=update), update, may_call_off=True)

    def _deliver(self, update: str, version: WeightVersion, cargo: Cargo) -> None:
        """Brings every bucket to every host. CommitIncomplete where one does not take it: those that have any are torn
        then, and the rest settle.
        """
        bucket = 0
        try:
            while bucket < cargo.buckets:
                faults, written = self._deliver_one(update, bucket, cargo)
                if faults:
                    whole = "the update ended half-way, at another host's fault"
                    reasons = {host: faults.get(host, whole) for host in self._links.hosts}
                    torn = {host: reason for host, reason in reasons.items() if bucket or host in written}
                    unknown = {host: reason for host, reason in reasons.items() if host not in torn}
                    text = (
                        f"the commit of {version} ended at bucket {bucket} of {cargo.buckets}. Torn, serving nothing: "
                        f"{', '.join(torn) or 'none'}. Unknown, settling with their siblings: "
                        f"{', '.join(unknown) or 'none'}. Publish again: a complete commit heals every host"
                    )
                    raise CommitIncomplete(blame(text, reasons), (), torn, unknown)
                bucket += 1
        finally:
            if bucket < cargo.buckets:
                for host in self._links.hosts:
                    self._links.part(host)  # each notices: it is torn, or settles if nothing is written there
                self._loader.doubt()

    def _deliver_one(self, update: str, bucket: int, cargo: Cargo) -> tuple[dict[str, str], set[str]]:
        """The hosts that did not take it, and why; and those that say that they have written some of the update."""

        def transmit() -> None:
            cargo.transmit(bucket)
            if bucket + 1 < cargo.buckets:
                cargo.prepare(bucket + 1)  # in another slot, while the hosts write this one

        replies, faults = self._links.call(
            lambda sequence: Deliver(sequence=sequence, update=update, bucket=bucket), meanwhile=transmit
        )
        written = set()
        for host, reply in replies.items():
            if isinstance(reply, Delivered) and reply.bucket == bucket:
                written.add(host)
            elif isinstance(reply, Refused):
                faults[host] = reply.reason
                if reply.state is State.TORN:
                    written.add(host)
            else:
                faults[host] = f"answered {reply!r:.200}"
        return faults, written

    def _end(
        self, version: WeightVersion, build: Callable[[int], Request], update: str, *, may_call_off: bool = False
    ) -> dict[str, Committed]:
        """The last request of a commit, to all."""
        committed: dict[str, Committed] = {}
        torn: dict[str, str] = {}
        refused: dict[str, str] = {}
        heard = called = False
        try:
            replies, unknown = self._links.call(build)
            called = True
            for host, reply in replies.items():
                if isinstance(reply, Committed) and reply.version == version:
                    committed[host] = reply
                elif isinstance(reply, Refused) and reply.state is State.TORN:
                    torn[host] = reply.reason
                elif isinstance(reply, Refused) and reply.sequence:
                    refused[host] = reply.reason
                else:
                    unknown[host] = f"answered {reply!r:.200}"
            heard = not unknown and not refused
        finally:
            if not heard:
                self._loader.doubt()  # hosts that settle by committing still read it
            if not called:
                for host in self._links.hosts:
                    self._links.part(host)  # interrupted: whoever has no commit must not wait for one
        if may_call_off and refused and not (committed or torn or unknown):
            self._call_off(update)
            raise UpdateAborted(blame("no host committed the update; all keep what they serve", refused), refused)
        for host in [*refused, *unknown, *torn]:
            # It notices, asks its siblings, and follows those that committed; a torn one may take their weights.
            self._links.part(host)
        unknown |= refused
        if torn or unknown:
            text = (
                f"the commit of {version} was sent and not confirmed by every host. Committed: "
                f"{', '.join(committed) or 'none'}. Torn, serving nothing: {', '.join(torn) or 'none'}. "
                f"Unknown, settling with their siblings: {', '.join(unknown) or 'none'}. "
                "Publish again: a complete commit heals every host"
            )
            raise CommitIncomplete(blame(text, torn | unknown), tuple(committed), torn, unknown)
        return committed
