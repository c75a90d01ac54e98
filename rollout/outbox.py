"""Finished completions on a host, kept per client until the client collects them."""

import threading

from rollout.errors import HostFailed
from rollout.request import Completion


class Outbox:
    """Filled by the engine's thread, emptied by clients. A client's box exists from `open` to `close`."""

    def __init__(self) -> None:
        self._boxes: dict[str, list[Completion]] = {}
        self._failure: str | None = None
        self._changed = threading.Condition()

    def open(self, client: str) -> None:
        """Begins to keep what finishes for `client`."""
        with self._changed:
            self._boxes.setdefault(client, [])

    def put(self, client: str, completion: Completion) -> None:
        """Keeps a completion; one for a client that has closed its box is dropped."""
        with self._changed:
            if client in self._boxes:
                self._boxes[client].append(completion)
                self._changed.notify_all()

    def collect(self, client: str, wait_s: float) -> list[Completion]:
        """Everything finished for `client`, waiting up to `wait_s` seconds for the first; may be empty.

        Raises:
            HostFailed: the host has stopped and nothing more will come.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._boxes.get(client), wait_s)
            collected = self._boxes.get(client, [])
            if not collected and self._failure:
                raise HostFailed(self._failure)
            if collected:
                self._boxes[client] = []
            return collected

    def close(self, client: str) -> None:
        """Drops the client's box and what is in it."""
        with self._changed:
            self._boxes.pop(client, None)

    def fail(self, reason: str) -> None:
        """Nothing more will come: every client that collects is told why."""
        with self._changed:
            self._failure = reason
            self._changed.notify_all()
