"""The transport between processes of one machine: control over a unix socket per host, payload in memfds that both map.

The publisher's end, and a sibling's; `server.py` is the host's. A staged segment outlives the learner, since the
hosts hold it too.
"""

import errno
import os
import socket
from contextlib import closing

from weights.cargo import Loader, Segment
from weights.codec import encode
from weights.errors import DeadlineExceeded, MessageError, PeerGone, TransportError
from weights.messages import Answer, Ask, Reply, Request
from weights.rendezvous import Roster, RosterHost
from weights.segment_loader import SegmentLoader
from weights.transports.answer import read_reply
from weights.transports.segment import SharedSegment
from weights.transports.stream import FrameStream


class SharedMemoryTransport:
    """How a publisher reaches the fleet `name` on this machine: its roster is read anew for each update."""

    def __init__(self, name: str) -> None:
        self._name = name

    def hosts(self) -> tuple[str, ...]:
        return tuple(host.id for host in Roster.read(self._name).hosts)

    def connect(self, host: str, deadline_s: float) -> "SocketLink":
        for known in Roster.read(self._name).hosts:
            if known.id == host:
                return SocketLink(known, deadline_s)
        raise TransportError(f"{host} has left the fleet {self._name}")

    def segment(self, size: int) -> SharedSegment:
        return SharedSegment(size)

    def loader(self, bucket_bytes: int) -> Loader:
        return SegmentLoader(self, bucket_bytes)


class OneHost(SharedMemoryTransport):
    """The transport of a publisher that reaches one host only, in no roster yet: a sibling that was started again."""

    def __init__(self, host: RosterHost) -> None:
        self._host = host

    def hosts(self) -> tuple[str, ...]:
        return (self._host.id,)

    def connect(self, host: str, deadline_s: float) -> "SocketLink":
        assert host == self._host.id
        return SocketLink(self._host, deadline_s)


class SocketLink:
    """A publisher's connection to one host."""

    def __init__(self, host: RosterHost, deadline_s: float) -> None:
        self.host = host.id
        self._stream = open_stream(host, deadline_s)

    def send(self, request: Request, segment: Segment | None, deadline_s: float) -> None:
        assert segment is None or isinstance(segment, SharedSegment)
        self._stream.send(encode(request), None if segment is None else segment.descriptor, deadline_s)

    def receive(self, sequence: int, deadline_s: float) -> Reply:
        while True:
            reply = receive_reply(self._stream, deadline_s)
            if reply.sequence in (0, sequence):
                return reply

    def close(self) -> None:
        self._stream.close()


class SocketSibling:
    """Another host of the fleet; each question is a connection of its own."""

    def __init__(self, host: RosterHost, deadline_s: float) -> None:
        self.host = host.id
        self._address = host
        self._deadline_s = deadline_s

    def ask(self, question: Ask) -> Answer:
        with closing(open_stream(self._address, self._deadline_s)) as stream:
            stream.send(encode(question), None, self._deadline_s)
            reply = receive_reply(stream, self._deadline_s)
        if isinstance(reply, Answer) and reply.update == question.update:
            return reply
        raise TransportError(f"{self.host} answered {reply!r:.200} to a sibling's question")


def siblings(fleet: str, host: str, deadline_s: float) -> tuple[SocketSibling, ...]:
    """All other hosts in the fleet's roster as it stands now."""
    return tuple(SocketSibling(other, deadline_s) for other in Roster.read(fleet).hosts if other.id != host)


def open_stream(host: RosterHost, deadline_s: float) -> FrameStream:
    """Connects to a host.

    PeerGone if nobody listens there any more, else TransportError or DeadlineExceeded, naming it and its socket.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.settimeout(deadline_s)
        connection.connect(host.address)
    except TimeoutError as error:
        connection.close()
        raise DeadlineExceeded(
            f"{host.id} did not accept a connection on {host.address} within {deadline_s} s"
        ) from error
    except OSError as error:
        connection.close()
        # Refused by the kernel, or no socket: whoever listened has ended. A full backlog (EAGAIN) says nothing.
        gone = error.errno in (errno.ECONNREFUSED, errno.ENOENT)
        raise (PeerGone if gone else TransportError)(
            f"cannot connect to {host.id} on {host.address}: {error}; is the host running?"
        ) from error
    return FrameStream(connection, host.id)


def receive_reply(stream: FrameStream, deadline_s: float) -> Reply:
    frame, descriptor = stream.receive(deadline_s)
    if descriptor is not None:
        os.close(descriptor)
        raise MessageError("a reply came with a descriptor, and none has one")
    return read_reply(frame)
