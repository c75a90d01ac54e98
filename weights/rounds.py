"""Rounds: what a publisher says to all hosts for one update, round by round, and what it does when one says no.

Everything up to the votes may be called off: `UpdateAborted`, and every host keeps what it has. From the commit on (of
a streamed update, from its first bucket on) an update may only end committed: `CommitIncomplete` says where it did not.
"""

from collections.abc import Callable

from weights.cargo import Cargo, Loader, Segment
from weights.delivery import Delivery
from weights.digest import Digest
from weights.errors import CommitIncomplete, UpdateAborted
from weights.lease import SlotTerms, WireTerms
from weights.links import Links, blame
from weights.messages import (
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
from weights.state import State
from weights.version import WeightVersion


class Rounds:
    """Of one publisher.

    Args:
        links: to the hosts.
        loader: whose memory a host may still read where a round did not end well.
        run: the trainer's.
    """

    def __init__(self, links: Links, loader: Loader, run: str) -> None:
        self._links = links
        self._loader = loader
        self._run = run

    def join(self, cargo: Cargo, welcomes: dict[str, Welcome]) -> None:
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

    def offer(
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
                run=self._run,
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
        return WeightVersion(run=self._run, step=step, digest=content)

    def stage(self, update: str, cargo: Cargo, welcomes: dict[str, Welcome]) -> None:
        """Part after part; each host opens it and hashes what it reads."""
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

    def vote(self, update: str, digest: Digest) -> None:
        """Each host says that it holds, or can read, the bytes of this digest."""
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

    def call_off(self, update: str) -> None:
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

    def commit(self, update: str, version: WeightVersion, cargo: Cargo) -> dict[str, Committed]:
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
                    self.call_off(update)  # all are paused at most: nothing is written before the first bucket
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
            self.call_off(update)
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
