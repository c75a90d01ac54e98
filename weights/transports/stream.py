"""FrameStream: frames and descriptors over a unix-domain stream socket, each within a deadline."""

import array
import math
import os
import select
import socket
import time

from weights.codec import HEADER_BYTES, body_bytes
from weights.errors import DeadlineExceeded, MessageError, TransportError

_MAX_DESCRIPTORS = 1


class FrameStream:
    """One end of a connection. For one thread, apart from `shut`."""

    def __init__(self, connection: socket.socket, peer: str) -> None:
        self._socket = connection
        self._peer = peer
        connection.setblocking(False)

    def readable(self, within_s: float | None) -> bool:
        """Whether something, or the end, arrives within so many seconds; None waits until it does."""
        return self._ready(select.POLLIN, within_s)

    def ended(self) -> bool:
        """Whether the peer has closed its end, even if what it sent before is still to be read."""
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    def send(self, frame: bytes, descriptor: int | None, deadline_s: float) -> None:
        """TransportError if the peer is gone; DeadlineExceeded if it does not take the frame, after which the stream
        is of no use.
        """
        ends_at = time.monotonic() + deadline_s
        left = memoryview(frame)
        passed = [] if descriptor is None else [descriptor]
        while left:
            if not self._ready(select.POLLOUT, ends_at - time.monotonic()):
                raise DeadlineExceeded(f"{self._peer} did not take {len(frame)} bytes within {deadline_s} s")
            try:
                sent = socket.send_fds(self._socket, [left[: 1 << 20]], passed, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                continue
            except OSError as error:
                raise TransportError(f"{self._peer} closed the connection: {error}") from error
            left, passed = left[sent:], []

    def receive(self, deadline_s: float) -> tuple[bytes, int | None]:
        """A frame, and the descriptor that came with it, which is the caller's to close.

        TransportError at the end of the stream, DeadlineExceeded, or MessageError if no frame of ours begins here.
        """
        ends_at = time.monotonic() + deadline_s
        descriptors: list[int] = []
        try:
            header = self._read(HEADER_BYTES, ends_at, deadline_s, descriptors)
            frame = header + self._read(body_bytes(header), ends_at, deadline_s, descriptors)
            return frame, descriptors.pop() if descriptors else None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def shut(self) -> None:
        """Ends the stream for both sides at once; a thread that waits on it wakes."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the peer was first

    def close(self) -> None:
        self._socket.close()

    def _ready(self, event: int, within_s: float | None) -> bool:
        poll = select.poll()  # not select(), which knows no descriptor past 1023
        poll.register(self._socket, event)
        return bool(poll.poll(None if within_s is None else math.ceil(max(within_s, 0.0) * 1000)))

    def _read(self, count: int, ends_at: float, deadline_s: float, descriptors: list[int]) -> bytes:
        parts = bytearray()
        while len(parts) < count:
            if not self.readable(ends_at - time.monotonic()):
                raise DeadlineExceeded(
                    f"{self._peer} sent {len(parts)} of {count} bytes of a frame within {deadline_s} s"
                )
            try:
                part = self._receive_some(min(count - len(parts), 1 << 20), descriptors)
            except BlockingIOError:
                continue
            except OSError as error:
                raise TransportError(f"{self._peer} closed the connection: {error}") from error
            if not part:
                if parts:
                    raise MessageError(
                        f"{self._peer} closed the connection after {len(parts)} of {count} bytes of a frame"
                    )
                raise TransportError(f"{self._peer} closed the connection")
            parts += part
        return bytes(parts)

    def _receive_some(self, count: int, descriptors: list[int]) -> bytes:
        room = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        part, extras, _, _ = self._socket.recvmsg(count, room, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in extras:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                received = array.array("i")
                received.frombytes(data[: len(data) - len(data) % received.itemsize])
                descriptors.extend(received)
        return part
