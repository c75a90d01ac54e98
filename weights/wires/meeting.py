"""Where the ranks of a wire meet: a small key-value store that the learner serves.

It is PyTorch's TCPStore: plain bytes over TCP, nothing pickled, and no password. Whoever reaches the port can disturb a
wire that is being opened, so it belongs on the network on which the trainer's own ranks meet.
"""

import socket
import time
from contextlib import closing
from datetime import timedelta
from types import TracebackType
from typing import Self

from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

from weights.errors import DeadlineExceeded, TransportError

_POLL_S = 0.005


class StoreServer:
    """Serves a store until it is closed, on all interfaces."""

    def __init__(self, port: int = 0) -> None:
        """port: 0 takes a free one. TransportError if it is taken."""
        try:
            self._store: TCPStore | None = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        except RuntimeError as error:
            raise TransportError(f"cannot serve a store on port {port}: {error}") from error
        self.port = self._store.port

    def close(self) -> None:
        """Wires that are open live on."""
        self._store = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Meeting:
    """One rank's way into a store, and its wait for the others."""

    def __init__(self, host: str, port: int, *, rank: int, size: int, prefix: str, deadline_s: float) -> None:
        """Keeps the numbers; the rest is `arrive`'s. It may wait for ever where a store's process is stopped."""
        self._host = host
        self._port = port
        self._rank = rank
        self._size = size
        self._prefix = prefix
        self._deadline_s = deadline_s
        self._ends_at = time.monotonic() + deadline_s
        self.missing: tuple[int, ...] = tuple(peer for peer in range(size) if peer != rank)
        """Ranks that have not come yet."""
        self.connected = False

    @property
    def left_s(self) -> float:
        """Seconds until the deadline, never less than a millisecond."""
        return max(self._ends_at - time.monotonic(), 0.001)

    @property
    def over(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() >= self._ends_at

    def arrive(self) -> Store:
        """Connects, says that this rank is here and waits for the others; a store for what they have to agree on.

        DeadlineExceeded naming the ranks that did not come, TransportError if the store is gone, ValueError if this
        rank came to a meeting of that name before.
        """
        store = self._connect()
        self.connected = True
        try:
            if store.add(f"rank {self._rank}", 1) != 1:
                raise ValueError(
                    f"rank {self._rank} came to the meeting {self._prefix!r} before: each wire of a store has a prefix "
                    "of its own, also when it is opened again"
                )
            while self.missing:
                # Asked for rather than waited for: a wait that times out ends in the store's own, blocking words.
                self.missing = tuple(peer for peer in self.missing if not store.check([f"rank {peer}"]))
                if self.missing:
                    self.pause()
        except RuntimeError as error:
            raise TransportError(f"the store at {self._host}:{self._port} is gone: {error}") from error
        return store

    def read(self, store: Store, key: str) -> bytes:
        """The value of `key` once some rank has set it."""
        try:
            while not store.check([key]):
                self.pause()
            return store.get(key)
        except RuntimeError as error:
            raise TransportError(f"the store at {self._host}:{self._port} is gone: {error}") from error

    def pause(self) -> None:
        """Between two looks. DeadlineExceeded at the end."""
        if self.over:
            raise self.late()
        time.sleep(_POLL_S)

    def late(self) -> DeadlineExceeded:
        """What to raise at the deadline."""
        where = f"the store at {self._host}:{self._port}"
        if not self.connected:
            reason = f"{where} did not answer"
        elif self.missing:
            absent = ", ".join(str(peer) for peer in self.missing)
            reason = f"of its {self._size} ranks these did not come: {absent}"
        else:
            reason = "all of its ranks came, and one of them went or does not reach the others"
        return DeadlineExceeded(
            f"rank {self._rank} waited {self._deadline_s} s for the wire {self._prefix!r} to open: {reason}"
        )

    def own_address(self) -> str:
        """The address from which this machine reaches the store's: the one to listen on for peers."""
        family, _, _, _, place = socket.getaddrinfo(self._host, self._port, type=socket.SOCK_DGRAM)[0]
        with closing(socket.socket(family, socket.SOCK_DGRAM)) as probe:
            probe.connect(place)  # sends nothing
            return str(probe.getsockname()[0])

    def _connect(self) -> Store:
        try:
            store = TCPStore(
                self._host,
                self._port,
                is_master=False,
                wait_for_workers=False,
                timeout=timedelta(seconds=self.left_s),
            )
        except RuntimeError as error:
            if self.over:
                raise self.late() from error
            raise TransportError(f"the store at {self._host}:{self._port} cannot be reached: {error}") from error
        return PrefixStore(self._prefix, store)
