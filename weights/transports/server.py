"""HostServer: lets publishers and siblings reach a receiver through a unix socket."""

import logging
import os
import socket
import threading
import time
from contextlib import closing
from types import TracebackType
from typing import Protocol, Self

from torch import Tensor

from weights.codec import encode
from weights.errors import DeadlineExceeded, MessageError, TransportError
from weights.messages import SIBLING, Ask, Committed, Hello, Refused, Reply, Request
from weights.receiver import Receiver
from weights.settlement import Siblings
from weights.transports.answer import read_request, unreadable
from weights.transports.segment import map_segment
from weights.transports.stream import FrameStream

_LOG = logging.getLogger(__name__)
_BACKLOG = 64
CLOSING_S = 60.0
"""How long a server that closes waits for what its connections were doing."""
ACCEPT_AGAIN_S = 0.1
"""Before the next try, when the machine had no room for a connection."""


class Segments(Protocol):
    """Maps a publisher's segments, one publisher after the other."""

    def map(self, descriptor: int) -> Tensor:
        """Flat uint8. Takes the descriptor over. MessageError if it is no segment."""
        ...

    def sweep(self) -> None:
        """An update is at its end: lets go of segments that are used no more."""
        ...

    def drop(self) -> None:
        """The publisher is gone."""
        ...


class MappedSegments:
    """As ordinary memory, kept by whoever uses it."""

    def map(self, descriptor: int) -> Tensor:
        return map_segment(descriptor)

    def sweep(self) -> None:
        """It keeps none."""

    def drop(self) -> None:
        """It keeps none."""


class HostServer:
    """Listens for one host. One publisher at a time; siblings may ask at any time."""

    def __init__(
        self,
        receiver: Receiver,
        path: str,
        siblings: Siblings,
        *,
        deadline_s: float,
        takeover_s: float = 1.0,
        segments: Segments | None = None,
    ) -> None:
        """path: the socket to listen on; what a dead host left there is replaced. siblings: the rest of the fleet,
        asked for when needed.

        deadline_s: how long a peer may take over one frame. takeover_s: how long a second publisher waits for the
        first one's connection to end; longer, up to deadline_s, if that one is gone and its update is still being
        forgotten or settled. segments: how a publisher's are mapped; left out, as ordinary memory. TransportError if a
        living host listens on the path.
        """
        self._receiver = receiver
        self._path = path
        self._siblings = siblings
        self._deadline_s = deadline_s
        self._takeover_s = takeover_s
        self._segments = MappedSegments() if segments is None else segments
        self._streams: set[FrameStream] = set()
        self._threads: set[threading.Thread] = set()
        self._publisher: str | None = None
        self._talking: FrameStream | None = None
        """The publisher's connection."""
        self._ending = False
        """That connection is at its end, and what it had under way is being forgotten or settled."""
        self._changed = threading.Condition()
        self._closing = False
        self._listener = _listen(path)
        self._accepting = threading.Thread(target=self._accept, name=f"weights of {receiver.host}", daemon=True)
        self._accepting.start()

    def close(self, deadline_s: float = CLOSING_S) -> None:
        """Ends all connections and waits for what they were doing: a commit under way is finished.

        DeadlineExceeded, naming what goes on still, if that takes longer; the host cannot be reached then either.
        """
        ends_at = time.monotonic() + deadline_s
        with self._changed:
            self._closing = True
            for stream in self._streams:
                stream.shut()
            self._changed.notify_all()
        self._listener.shutdown(socket.SHUT_RDWR)
        with self._changed:
            busy = [self._accepting, *self._threads]
        for thread in busy:
            thread.join(max(ends_at - time.monotonic(), 0.0))
        self._listener.close()
        if os.path.exists(self._path):
            os.unlink(self._path)
        late = [thread.name for thread in busy if thread.is_alive()]
        if late:
            raise DeadlineExceeded(
                f"{self._receiver.host} (update: {self._receiver.state}) still runs, {deadline_s} s after its "
                f"connections were ended: {', '.join(late)}"
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if self._closing:
                    return
                # No descriptors or memory at the moment, or a peer that went before it was let in: none of it is a
                # reason to be out of reach for good.
                _LOG.warning("%s: cannot take a connection, and tries again: %s", self._receiver.host, error)
                with self._changed:
                    self._changed.wait_for(lambda: self._closing, ACCEPT_AGAIN_S)
                continue
            stream = FrameStream(connection, "the peer")
            thread = threading.Thread(
                target=self._serve, args=(stream,), name=f"weights of {self._receiver.host}, a peer", daemon=True
            )
            with self._changed:
                if self._closing:
                    stream.close()
                    return
                self._streams.add(stream)
                self._threads.add(thread)
                thread.start()

    def _serve(self, stream: FrameStream) -> None:
        try:
            with closing(stream):
                self._converse(stream)
        finally:
            with self._changed:
                self._streams.discard(stream)
                self._threads.discard(threading.current_thread())

    def _converse(self, stream: FrameStream) -> None:
        """One connection, from its first message to its end."""
        try:
            request, _ = self._next(stream)
            if isinstance(request, Hello):
                if not self._admit(request.publisher, stream):
                    self._reply(stream, self._turned_away(request))
                    return
                try:
                    self._follow(stream, request)
                finally:
                    self._dismiss()
            elif isinstance(request, Ask):
                self._reply(stream, self._receiver.handle(request))
            else:
                reason = f"a connection begins with Hello or Ask, got {type(request).__name__}"
                self._reply(stream, unreadable(self._receiver, MessageError(reason)))
        except MessageError as error:
            _LOG.warning("%s: a peer's message was not understood: %s", self._receiver.host, error)
        except TransportError as error:
            _LOG.debug("%s: a connection ended: %s", self._receiver.host, error)

    def _follow(self, stream: FrameStream, request: Request) -> None:
        """A publisher's connection. However it ends, the update under way is forgotten or settled."""
        segment: Tensor | None = None
        try:
            while True:
                reply = self._receiver.handle(request, segment)
                if isinstance(reply, Committed):
                    self._segments.sweep()
                self._reply(stream, reply)
                del segment  # the receiver keeps what it needs: nothing here may hold a mapping until the next message
                if not stream.readable(self._receiver.silence_left_s):
                    _LOG.warning(
                        "%s: the publisher fell silent during an update, or beside a torn host", self._receiver.host
                    )
                    return
                request, segment = self._next(stream)
        except MessageError as error:
            self._reply(stream, unreadable(self._receiver, error))
            raise
        finally:
            with self._changed:
                self._ending = True  # whoever comes now need not be turned away: it will not take long
                self._changed.notify_all()
            if self._receiver.lost():
                with self._changed:
                    self._publisher = f"{self._publisher} (lost: its last update is being settled with the siblings)"
                settlement = self._receiver.settle(self._siblings)
                _LOG.warning("%s: %s", self._receiver.host, settlement)
            self._segments.drop()

    def _next(self, stream: FrameStream) -> tuple[Request, Tensor | None]:
        frame, descriptor = stream.receive(self._deadline_s)
        segment = None if descriptor is None else self._segments.map(descriptor)
        return read_request(frame), segment

    def _reply(self, stream: FrameStream, reply: Reply) -> None:
        stream.send(encode(reply), None, self._deadline_s)

    def _admit(self, publisher: str, stream: FrameStream) -> bool:
        """Takes the publisher's place.

        A learner that was restarted may come before its old connection's end is noticed.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: self._publisher is None, self._takeover_s)
            is_sibling = (self._publisher or "").startswith(SIBLING)  # it shares once, and goes
            is_leaving = self._ending or (self._talking is not None and self._talking.ended())
            if not free and (is_sibling or is_leaving):
                free = self._changed.wait_for(lambda: self._publisher is None, self._deadline_s / 2)
            if free:
                self._publisher, self._talking, self._ending = publisher, stream, False
            return free

    def _dismiss(self) -> None:
        with self._changed:
            self._publisher = self._talking = None
            self._changed.notify_all()

    def _turned_away(self, hello: Hello) -> Refused:
        reason = f"has a publisher already, {self._publisher}: close that one first"
        return Refused(sequence=hello.sequence, update="", state=self._receiver.state, reason=reason)


def _listen(path: str) -> socket.socket:
    """TransportError if somebody listens there; a socket that a dead host left is replaced."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if os.path.exists(path):
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
                if probe.connect_ex(path) == 0:
                    raise TransportError(f"a living host listens on {path}; stop it, or give this fleet another name")
            os.unlink(path)
        listener.bind(path)
        listener.listen(_BACKLOG)
    except BaseException:
        listener.close()
        raise
    return listener
