"""Publisher: the learner's end of a weight update. All hosts or none.

The life of a publish:

1. Greet every host of the roster; connect to those that are new.
2. Gather: each tensor is copied once into a segment, as contiguous wire bytes, and hashed there.
3. Offer the manifest to all; each plans it whole.
4. Stage bucket after bucket with all; each maps it and hashes what it maps.
5. Vote: each says that it holds the manifest's bytes. Any fault up to here aborts the update everywhere.
6. Commit on all. From here on the update may only end committed.

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
from weights.digest import ZERO, Digest
from weights.errors import CommitIncomplete, UpdateAborted
from weights.gather import Gathered, SegmentPool, Source, gather
from weights.links import Links, blame
from weights.messages import (
    Abort,
    Aborted,
    Commit,
    Committed,
    Offer,
    Offered,
    Refused,
    Reply,
    Request,
    Stage,
    Staged,
    Vote,
    Voted,
)
from weights.rendezvous import DEFAULT_DEADLINE_S, Roster
from weights.report import HostTimes, PublishReport
from weights.state import State
from weights.transports.seam import Segment, Transport
from weights.transports.shared_memory import SharedMemoryTransport
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
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Connects to nobody yet: `connect` and `publish` do.

        run: the trainer's run; left out, a new one that no other learner has. deadline_s: how long a host may take to
        answer a call.
        """
        check_bucket_bytes(bucket_bytes)
        if not deadline_s > 0:
            raise ValueError(f"a deadline is positive, got {deadline_s} s")
        self.run = f"run-{time.strftime('%Y%m%dT%H%M%S')}-{uuid.uuid4().hex[:8]}" if run is None else run
        WeightVersion(run=self.run, step=0, digest=ZERO)  # refuses a run that no version may have
        self._bucket_bytes = bucket_bytes
        self._clock = clock
        self._pool = SegmentPool(transport, bucket_bytes)
        self._links = Links(
            transport, publisher=f"{self.run} (process {os.getpid()} on {socket.gethostname()})", deadline_s=deadline_s
        )

    @classmethod
    def connect(cls, name: str, *, run: str | None = None, deadline_s: float | None = None) -> "Publisher":
        """Finds the fleet `name` on this machine and connects to all of its hosts.

        RosterError if there is no such fleet, UpdateAborted naming every host that cannot be reached or has a
        publisher already.
        """
        roster = Roster.read(name)
        publisher = cls(
            SharedMemoryTransport(name),
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

        digest: what the content's must be, where `source` may change while it is read.

        UpdateAborted: nothing was committed anywhere; names every host at fault. CommitIncomplete: the commit was
        sent and not every host confirmed; names those that did, those torn, and those unknown. ValueError for a
        source that cannot be sent.
        """
        if base is not None:
            raise ValueError(f"subset updates (here on base {base}) are not supported yet; publish all tensors")
        WeightVersion(run=self.run, step=step, digest=ZERO)  # refuses a step that no version may have
        marks = [self._clock()]
        welcomes = self._links.greet()
        marks.append(self._clock())
        tied = {alias: name for welcome in welcomes.values() for alias, name in welcome.tied.items()}
        gathered = gather(source, tied, self._pool, self._bucket_bytes)
        marks.append(self._clock())
        version = WeightVersion(run=self.run, step=step, digest=gathered.manifest.digest)
        if digest is not None and version.digest != digest:
            raise UpdateAborted(
                f"the source has digest {version.digest}, expected {digest}: it changed while it was read", {}
            )
        update = uuid.uuid4().hex
        agreed = False
        try:
            self._offer(update, version, gathered)
            marks.append(self._clock())
            self._stage(update, gathered.segments)
            marks.append(self._clock())
            self._vote(update, version)
            marks.append(self._clock())
            agreed = True
        finally:
            if not agreed:
                self._call_off(update)
        committed = self._commit(update, version)
        marks.append(self._clock())
        greet_s, gather_s, offer_s, stage_s, vote_s, commit_s = (b - a for a, b in pairwise(marks))
        return PublishReport(
            version=version,
            bytes=gathered.manifest.bytes,
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

    def close(self) -> None:
        """Leaves the fleet: another publisher may connect. Segments that hosts still map live on with them."""
        self._links.close()
        self._pool.drop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _offer(self, update: str, version: WeightVersion, gathered: Gathered) -> None:
        def offer(sequence: int) -> Request:
            return Offer(
                sequence=sequence,
                update=update,
                run=version.run,
                step=version.step,
                base=None,
                bucket_bytes=self._bucket_bytes,
                manifest=gathered.manifest,
            )

        buckets = len(gathered.segments)
        self._agree("offered", offer, lambda reply: isinstance(reply, Offered) and reply.buckets == buckets)

    def _stage(self, update: str, segments: tuple[Segment, ...]) -> None:
        for bucket, segment in enumerate(segments):

            def stage(sequence: int, bucket: int = bucket) -> Request:
                return Stage(sequence=sequence, update=update, bucket=bucket)

            def staged(reply: Reply, bucket: int = bucket) -> bool:
                return isinstance(reply, Staged) and reply.bucket == bucket

            self._agree(f"staged (bucket {bucket} of {len(segments)})", stage, staged, segment)

    def _vote(self, update: str, version: WeightVersion) -> None:
        self._agree(
            "voted for",
            lambda sequence: Vote(sequence=sequence, update=update),
            lambda reply: isinstance(reply, Voted) and reply.digest == version.digest,
        )

    def _agree(
        self,
        what: str,
        build: Callable[[int], Request],
        accepts: Callable[[Reply], bool],
        segment: Segment | None = None,
    ) -> None:
        """Calls every host; UpdateAborted unless each gives the reply that `accepts` wants."""
        replies, faults = self._links.call(build, segment)
        for host, reply in replies.items():
            if isinstance(reply, Refused):
                faults[host] = reply.reason
            elif not accepts(reply):
                faults[host] = f"answered {reply!r:.200}"
        if faults:
            text = f"the update could not be {what} on every host; all keep what they serve"
            raise UpdateAborted(blame(text, faults), faults)

    def _call_off(self, update: str) -> None:
        """Tells every host that the update is off.

        One that does not confirm is parted from: it notices, and forgets or settles.
        """
        replies, faults = self._links.call(
            lambda sequence: Abort(sequence=sequence, update=update, reason="the publisher called the update off")
        )
        unsure = [*faults, *(host for host, reply in replies.items() if not isinstance(reply, Aborted))]
        for host in unsure:
            self._links.part(host)
        if unsure:
            self._pool.drop()

    def _commit(self, update: str, version: WeightVersion) -> dict[str, Committed]:
        """Point of no return: an update that one host may have committed is never called off."""
        committed: dict[str, Committed] = {}
        torn: dict[str, str] = {}
        refused: dict[str, str] = {}
        heard = False
        try:
            replies, unknown = self._links.call(lambda sequence: Commit(sequence=sequence, update=update))
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
                self._pool.drop()  # hosts that settle by committing still read them
        if refused and not (committed or torn or unknown):
            self._call_off(update)
            raise UpdateAborted(blame("no host committed the update; all keep what they serve", refused), refused)
        for host in [*refused, *unknown]:
            self._links.part(host)  # it notices, asks its siblings, and follows those that committed
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
