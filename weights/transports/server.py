"""HostServer: lets publishers and siblings reach a receiver through a unix socket."""

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import closing
from types import TracebackType
from typing import Self

from torch import Tensor

from weights.errors import MessageError, TransportError, WeightsError
from weights.messages import Ask, Hello, Refused, Reply, Request, encode
from weights.receiver import Receiver
from weights.serving import Sibling
from weights.transports.answer import read_request, unreadable
from weights.transports.segment import map_segment
from weights.transports.stream import FrameStream

_LOG = logging.getLogger(__name__)
_BACKLOG = 64


class HostServer:
    """Listens for one host. One publisher at a time; siblings may ask at any time."""

    def __init__(
        self,
        receiver: Receiver,
        path: str,
        siblings: Callable[[], Iterable[Sibling]],
        *,
        deadline_s: float,
        takeover_s: float = 1.0,
    ) -> None:
        """path: the socket to listen on; what a dead host left there is replaced. siblings: the rest of the fleet,
        asked for when needed.

        deadline_s: how long a peer may take over one frame. takeover_s: how long a second publisher waits for the
        first one's connection to end. TransportError if a living host listens on the path.
        """
        self._receiver = receiver
        self._path = path
        self._siblings = siblings
        self._deadline_s = deadline_s
        self._takeover_s = takeover_s
        self._streams: set[FrameStream] = set()
        self._threads: set[threading.Thread] = set()
        self._publisher: str | None = None
        self._changed = threading.Condition()
        self._closing = False
        self._listener = _listen(path)
        self._accepting = threading.Thread(target=self._accept, name=f"weights of {receiver.host}", daemon=True)
        self._accepting.start()

    def close(self) -> None:
        """Ends all connections and waits for what they were doing: a commit under way is finished."""
        with self._changed:
            self._closing = True
            for stream in self._streams:
                stream.shut()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._accepting.join()
        for thread in list(self._threads):
            thread.join()
        self._listener.close()
        if os.path.exists(self._path):
            os.unlink(self._path)

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
            except OSError:
                if self._closing:
                    return
                raise
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
                if not self._admit(request.publisher):
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
                self._reply(stream, self._receiver.handle(request, segment))
                del segment  # the receiver keeps what it needs: nothing here may hold a mapping until the next message
                if not stream.readable(self._receiver.silence_left_s):
                    _LOG.warning("%s: the publisher fell silent during an update", self._receiver.host)
                    return
                request, segment = self._next(stream)
        except MessageError as error:
            self._reply(stream, unreadable(self._receiver, error))
            raise
        finally:
            if self._receiver.lost():
                settlement = self._receiver.settle(self._known_siblings())
                _LOG.warning("%s: %s", self._receiver.host, settlement)

    def _known_siblings(self) -> tuple[Sibling, ...]:
        try:
            return tuple(self._siblings())
        except WeightsError as error:
            _LOG.warning("%s: settles alone, its siblings are not known: %s", self._receiver.host, error)
            return ()

    def _next(self, stream: FrameStream) -> tuple[Request, Tensor | None]:
        frame, descriptor = stream.receive(self._deadline_s)
        segment = None if descriptor is None else map_segment(descriptor)
        return read_request(frame), segment

    def _reply(self, stream: FrameStream, reply: Reply) -> None:
        stream.send(encode(reply), None, self._deadline_s)

    def _admit(self, publisher: str) -> bool:
        """Takes the publisher's place.

        A learner that was restarted may come before its old connection's end is noticed.
        """
        with self._changed:
            free = self._changed.wait_for(lambda: self._publisher is None, self._takeover_s)
            if free:
                self._publisher = publisher
            return free

    def _dismiss(self) -> None:
        with self._changed:
            self._publisher = None
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
