"""The in-process transport: a publisher and its hosts in one thread, with simulated time and faults to inject.

It carries the frames and the segments that the real one carries, decides nothing and never sleeps: waiting moves a
simulated clock.
"""

from collections import Counter
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from weights.cargo import Loader, Segment
from weights.catalogue import Catalogue
from weights.codec import encode
from weights.errors import DeadlineExceeded, MessageError, PeerGone, TransportError
from weights.messages import Answer, Ask, Offer, Reply, Request
from weights.receiver import Receiver
from weights.segment_loader import SegmentLoader
from weights.settlement import Settlement
from weights.transports.answer import answer, read_reply
from weights.transports.faults import Arrival, Fault, FaultKind, befall, damaged, mangled


class SimulatedClock:
    """Seconds that pass when somebody waits."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += max(seconds, 0.0)


class MemorySegment:
    """A segment in ordinary memory; hosts share it."""

    def __init__(self, size: int) -> None:
        self.data = torch.zeros(size, dtype=torch.uint8)

    def lock(self) -> None:
        """Nothing to do: no device writes into it faster for it."""

    def close(self) -> None:
        """Nothing to do: the last host that holds the tensor frees it."""


class MemoryTransport:
    """A fleet in this process, as its publisher and as siblings see it."""

    def __init__(
        self,
        receivers: Mapping[str, Receiver],
        clock: SimulatedClock,
        *,
        silence_s: float,
        deadline_s: float = 1.0,
        load: "Callable[[MemoryTransport, int], Loader] | None" = None,
    ) -> None:
        """silence_s: the receivers' own. deadline_s: what a host gives a sibling to answer. load: makes the loader of
        (this transport, bucket_bytes); left out, updates travel in segments.
        """
        self.clock = clock
        self.settlements: list[tuple[str, Settlement]] = []
        """(host, how it ended an update without its publisher), in order."""
        self._silence_s = silence_s
        self._deadline_s = deadline_s
        self._load = load
        self._wires = {host: _Wire(receiver) for host, receiver in receivers.items()}
        self._links: dict[str, MemoryLink] = {}
        self.unreachable: set[str] = set()
        """Hosts that live and serve, and that no sibling's question reaches."""
        self._gone: set[str] = set()

    def inject(self, fault: Fault) -> None:
        """Arms a fault; it strikes once."""
        wire = self._wires[fault.host]
        wire.faults.append(fault)
        wire.seen.clear()

    @property
    def armed(self) -> list[Fault]:
        """Faults that have not struck yet."""
        return [fault for wire in self._wires.values() for fault in wire.faults]

    def hosts(self) -> tuple[str, ...]:
        return tuple(host for host in self._wires if host not in self._gone)

    def connect(self, host: str, deadline_s: float) -> "MemoryLink":
        if host in self._links:
            raise TransportError(f"{host} has a publisher already")
        self._links[host] = MemoryLink(self, host)
        return self._links[host]

    def segment(self, size: int) -> MemorySegment:
        return MemorySegment(size)

    def loader(self, bucket_bytes: int) -> Loader:
        return SegmentLoader(self, bucket_bytes) if self._load is None else self._load(self, bucket_bytes)

    def siblings(self, host: str) -> "tuple[MemorySibling, ...]":
        """The others in the roster; a host that ended is in it still."""
        return tuple(MemorySibling(self, other, self._deadline_s) for other in self._wires if other != host)

    def fall_silent(self) -> None:
        """Time passes until every host with an update under way has heard nothing for too long: it ends the connection,
        and settles.
        """
        self.clock.advance(self._silence_s)
        for host in self.hosts():
            receiver = self._wires[host].receiver
            if receiver.silence_left_s is not None:
                self._links.pop(host, None)
                if receiver.lost():
                    self.settle(host)

    def lose_publisher(self) -> None:
        """The learner dies: every connection ends."""
        for link in list(self._links.values()):
            link.close()

    def end(self, host: str) -> None:
        """A host's process ends: it serves nothing, settles nothing, and is known to be gone."""
        self._gone.add(host)
        self._links.pop(host, None)

    def settle(self, host: str) -> None:
        settlement = self._wires[host].receiver.settle(lambda: self.siblings(host))
        if settlement is not None:
            self.settlements.append((host, settlement))

    def disconnected(self, host: str) -> None:
        """The host's side of a connection that ended."""
        if self._links.pop(host, None) is not None and self._wires[host].receiver.lost():
            self.settle(host)

    def carry(self, host: str, request: Request, segment: Tensor | None) -> list[bytes]:
        """Brings a request to a host and its replies back, faults permitting.

        TransportError if the connection ends under it.
        """
        wire = self._wires[host]
        kind = type(request).__name__
        fault = wire.strike(kind)
        if fault is FaultKind.DISCONNECT:
            self.disconnected(host)
            raise TransportError(f"{host} closed the connection")
        late, wire.late_requests = wire.late_requests, []
        if isinstance(request, Offer) and request.tensors is not None:
            wire.catalogue = request.tensors
        sent = encode(mangled(fault, request, wire.receiver.version, wire.catalogue)), damaged(fault, segment)
        arriving = befall(fault, sent, wire.late_requests)
        replies: list[bytes] = []
        for frame, data in [*arriving, *late]:
            reply, goes_on = answer(wire.receiver, frame, data)
            replies.append(reply)
            if not goes_on:
                self.disconnected(host)
        fault = wire.strike(kind, reply=True)
        if fault is FaultKind.DISCONNECT:
            self.disconnected(host)
            raise TransportError(f"{host} closed the connection")
        late, wire.late_replies = wire.late_replies, []
        returning = [arrival for reply in replies for arrival in befall(fault, (reply, None), wire.late_replies)]
        return [frame for frame, _ in [*returning, *late]]

    def ask(self, host: str, question: Ask) -> list[bytes]:
        """Brings a sibling's question to a host and the answer back, faults permitting.

        Each question is a connection of its own: nothing that happens to it touches the publisher's, and an answer
        that comes late finds nobody. TransportError if the connection ends, PeerGone if the host has.
        """
        if host in self._gone:
            raise PeerGone(f"cannot connect to {host}: its process has ended")
        if host in self.unreachable:
            return []
        wire = self._wires[host]
        fault = wire.strike("Ask")
        if fault is FaultKind.DISCONNECT:
            raise TransportError(f"{host} closed the connection")
        late, wire.late_questions = wire.late_questions, []
        arriving = befall(fault, (encode(question), None), wire.late_questions)
        answers = [answer(wire.receiver, frame, None) for frame, _ in arriving]
        for frame, _ in late:
            answer(wire.receiver, frame, None)
        fault = wire.strike("Ask", reply=True)
        if fault is FaultKind.DISCONNECT or not all(understood for _, understood in answers):
            raise TransportError(f"{host} closed the connection")
        return [frame for reply, _ in answers for frame, _ in befall(fault, (reply, None), [])]

    def connected(self, link: "MemoryLink") -> bool:
        return self._links.get(link.host) is link


class MemoryLink:
    """A publisher's connection to one host in this process."""

    def __init__(self, transport: MemoryTransport, host: str) -> None:
        self._transport = transport
        self.host = host
        self._inbox: list[bytes] = []

    def send(self, request: Request, segment: Segment | None, deadline_s: float) -> None:
        if not self._transport.connected(self):
            raise TransportError(f"{self.host} closed the connection")
        self._inbox += self._transport.carry(self.host, request, None if segment is None else segment.data)

    def receive(self, sequence: int, deadline_s: float) -> Reply:
        while self._inbox:
            try:
                reply = read_reply(self._inbox.pop(0))
            except MessageError:
                self.close()
                raise
            if reply.sequence in (0, sequence):
                return reply
        if not self._transport.connected(self):
            raise TransportError(f"{self.host} closed the connection")
        self._transport.clock.advance(deadline_s)
        raise DeadlineExceeded(f"{self.host} did not answer request {sequence} within {deadline_s} s")

    def close(self) -> None:
        if self._transport.connected(self):
            self._transport.disconnected(self.host)


class MemorySibling:
    """Another host in this process."""

    def __init__(self, transport: MemoryTransport, host: str, deadline_s: float) -> None:
        self._transport = transport
        self.host = host
        self._deadline_s = deadline_s

    def ask(self, question: Ask) -> Answer:
        for frame in self._transport.ask(self.host, question):
            reply = read_reply(frame)
            if isinstance(reply, Answer):
                return reply
        self._transport.clock.advance(self._deadline_s)
        raise DeadlineExceeded(f"{self.host} did not answer within {self._deadline_s} s")


class _Wire:
    """What lies between one host and everybody else."""

    def __init__(self, receiver: Receiver) -> None:
        self.receiver = receiver
        self.faults: list[Fault] = []
        self.seen: Counter[str] = Counter()
        self.late_requests: list[Arrival] = []
        self.late_replies: list[Arrival] = []
        self.late_questions: list[Arrival] = []
        self.catalogue: Catalogue | None = None
        """The last one that was offered whole."""

    def strike(self, message: str, *, reply: bool = False) -> FaultKind | None:
        """The fault that befalls this request, or the reply to it."""
        if not reply:
            self.seen[message] += 1
        for fault in self.faults:
            if (fault.message, fault.occurrence, fault.reply) == (message, self.seen[message], reply):
                self.faults.remove(fault)
                return fault.kind
        return None
