"""Who may submit to a host: bounded in number, each sample under its own name."""

import threading
from collections.abc import Sequence

from rollout.errors import QueueFull

Key = tuple[str, str, int]
"""Client, prompt id, sample."""


class Admission:
    """The samples that a host has taken and not finished.

    Args:
        host_id: for its errors.
        limit: how many, at most.
    """

    def __init__(self, host_id: str, limit: int) -> None:
        self._host_id = host_id
        self._limit = limit
        self._unfinished: set[Key] = set()
        self._lock = threading.Lock()

    def take(self, keys: Sequence[Key]) -> None:
        """Admits all of these or none.

        Raises:
            ValueError: two share a name, or one has the name of a sample that is not finished.
            QueueFull: there would be too many.
        """
        with self._lock:
            twice = sorted({key[1] for key in keys if key in self._unfinished})
            if len(set(keys)) < len(keys) or twice:
                raise ValueError(
                    "prompt ids must differ among a client's unfinished prompts; "
                    f"these are not new to {self._host_id}: {', '.join(twice[:10]) or 'given twice in one call'}"
                )
            if len(self._unfinished) + len(keys) > self._limit:
                raise QueueFull(
                    f"{self._host_id} has {len(self._unfinished)} unfinished samples and cannot take {len(keys)} more "
                    f"(engine.max_running + engine.max_waiting = {self._limit}): "
                    "collect some first, submit fewer at once, or raise engine.max_waiting"
                )
            self._unfinished.update(keys)

    def finish(self, key: Key) -> None:
        """This sample is done."""
        with self._lock:
            self._unfinished.remove(key)
