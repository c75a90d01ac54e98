"""Links: a publisher's connections to all hosts of a fleet, called side by side."""

import time
from collections import Counter
from collections.abc import Callable

from weights.cargo import Segment
from weights.errors import DeadlineExceeded, MessageError, TransportError, UpdateAborted
from weights.messages import PROTOCOL, Hello, Refused, Reply, Request, Welcome
from weights.transports.seam import Link, Transport

PARTING_S = 1.0
"""Seconds that a host which failed a call is given to answer a last one."""

AT_HAND_S = 1.0
"""Seconds to read a reply that has arrived, or is about to, when the time was spent waiting for another host."""


class Links:
    """One connection per host of the roster. A host that fails a call is in doubt until it answers another."""

    def __init__(self, transport: Transport, *, publisher: str, deadline_s: float) -> None:
        self._transport = transport
        self._publisher = publisher
        self._deadline_s = deadline_s
        self._links: dict[str, Link] = {}
        self._doubtful: set[str] = set()
        self._sequence = 0

    def greet(self) -> dict[str, Welcome]:
        """Says Hello to every host of the roster as it stands now, and connects to those that it has to.

        UpdateAborted naming every host that cannot be reached, is another's, speaks another protocol, or hosts other
        tensors than most.
        """
        hosts = self._transport.hosts()
        if not hosts:
            raise UpdateAborted(
                "the fleet has no host at the moment: they are being started again; try again later", {}
            )
        for host in set(self._links) - set(hosts):
            self.part(host)
        welcomes: dict[str, Welcome] = {}
        faults: dict[str, str] = {}
        for host in hosts:
            try:
                reply = self._hello(host)
            except (TransportError, MessageError) as error:
                faults[host] = str(error)
                self.part(host)
                continue
            if isinstance(reply, Welcome) and reply.host == host and reply.protocol == PROTOCOL:
                welcomes[host] = reply
            else:
                faults[host] = reply.reason if isinstance(reply, Refused) else f"answered Hello with {reply!r:.200}"
                self.part(host)
        if not faults:
            faults = _misfits(welcomes)
        if faults:
            raise UpdateAborted(blame("cannot greet every host", faults), faults)
        return welcomes

    def call(
        self,
        build: Callable[[int], Request],
        segment: Segment | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> tuple[dict[str, Reply], dict[str, str]]:
        """Sends every host the request that `build` makes of a sequence number, then collects replies.

        meanwhile: the learner's own share of it, once all requests are sent; if it fails with a TransportError, that
        is put down to every host. Returns the replies, and for the hosts that gave none the reason. It always hears
        all of them out.
        """
        self._sequence += 1
        request = build(self._sequence)
        replies: dict[str, Reply] = {}
        faults: dict[str, str] = {}
        for host, link in self._links.items():
            try:
                link.send(request, segment, self._patience_s(host))
            except (TransportError, MessageError) as error:
                faults[host] = str(error)
        broken = None
        if meanwhile is not None and not faults:
            try:
                meanwhile()
            except TransportError as error:
                broken = str(error)
        sent = time.monotonic()
        for host, link in self._links.items():
            if host in faults:
                continue
            try:
                # One deadline for all: hosts that are late together are not waited for in turn.
                left_s = max(self._patience_s(host) - (time.monotonic() - sent), AT_HAND_S)
                replies[host] = link.receive(request.sequence, left_s)
            except (TransportError, MessageError) as error:
                faults[host] = str(error)
        self._doubtful = set(faults)
        if broken is not None:
            faults |= {host: f"{broken}; it answers {_brief(reply)}" for host, reply in replies.items()}
        return replies, faults

    @property
    def hosts(self) -> tuple[str, ...]:
        """Those that are connected."""
        return tuple(self._links)

    def part(self, host: str) -> None:
        """Ends the connection to a host, if there is one; the host notices and settles."""
        self._doubtful.discard(host)
        link = self._links.pop(host, None)
        if link is not None:
            link.close()

    def close(self) -> None:
        for host in list(self._links):
            self.part(host)

    def _patience_s(self, host: str) -> float:
        return min(PARTING_S, self._deadline_s) if host in self._doubtful else self._deadline_s

    def _hello(self, host: str) -> Reply:
        known = self._links.get(host)
        if known is not None:
            try:
                return self._greeting(known)
            except DeadlineExceeded:
                raise
            except (TransportError, MessageError):
                self.part(host)  # it may have been restarted since: once more, on a connection of its own
        link = self._transport.connect(host, self._deadline_s)
        self._links[host] = link
        return self._greeting(link)

    def _greeting(self, link: Link) -> Reply:
        self._sequence += 1
        hello = Hello(sequence=self._sequence, protocol=PROTOCOL, publisher=self._publisher)
        link.send(hello, None, self._deadline_s)
        return link.receive(hello.sequence, self._deadline_s)


def _brief(reply: Reply) -> str:
    return reply.reason if isinstance(reply, Refused) else type(reply).__name__


def _misfits(welcomes: dict[str, Welcome]) -> dict[str, str]:
    """Hosts that host other tensors than most do: no update fits them all."""
    layouts = Counter(welcome.layout for welcome in welcomes.values())
    usual, _ = layouts.most_common(1)[0]
    alike = ", ".join(host for host, welcome in welcomes.items() if welcome.layout == usual)
    return {
        host: f"hosts other tensors (layout {welcome.layout:.8}) than {alike} (layout {usual:.8}): "
        "launch every host from the same checkpoint and configuration"
        for host, welcome in welcomes.items()
        if welcome.layout != usual
    }


def blame(what: str, faults: dict[str, str]) -> str:
    """One text that names every host at fault."""
    return "\n".join([f"{what}; at fault:", *(f"  {host}: {reason}" for host, reason in faults.items())])
