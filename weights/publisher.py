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
from weights.delivery import Delivery
from weights.digest import ZERO, Digest
from weights.errors import TransportError, UpdateAborted
from weights.links import Links
from weights.messages import (
    SIBLING,
)
from weights.publishing import Publishing
from weights.rendezvous import DEFAULT_DEADLINE_S, Roster
from weights.report import HostTimes, PublishReport
from weights.rounds import Rounds
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
        self._rounds = Rounds(self._links, self._loader, self.run)

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
        publisher until it has ended. ValueError while another one is on its way: the other ranks of a sharded learner
        must not be in `take_part` for it then.
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
        self._rounds.join(cargo, welcomes)
        agreed = False
        try:
            version = self._rounds.offer(update, step, base, digest, cargo, welcomes)
            marks.append(self._clock())
            self._rounds.stage(update, cargo, welcomes)
            if cargo.delivery is Delivery.SHADOW:
                is_read()
            marks.append(self._clock())
            self._rounds.vote(update, cargo.manifest.digest)
            marks.append(self._clock())
            agreed = True
        finally:
            if not agreed:
                self._rounds.call_off(update)
        committed = self._rounds.commit(update, version, cargo)
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
