"""Which host takes which prompt (balancing; routing is another word), and which hosts take any at the moment."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rollout.errors import DeadlineExceeded


def spread(loads: Mapping[str, int], weights: Sequence[int]) -> list[str]:
    """A host for each item, in order: the one with the least load so far, the first of them on a tie.

    Args:
        loads: what each host has to do already.
        weights: what each item adds, in the same unit.
    """
    if not loads:
        raise ValueError("no hosts to spread over")
    running = dict(loads)
    chosen = []
    for weight in weights:
        host = min(running, key=lambda name: running[name])
        running[host] += weight
        chosen.append(host)
    return chosen


class Rotation:
    """The hosts that take work now, each with its actor and its load. Safe to use from several threads."""

    def __init__(self) -> None:
        self._actors: dict[str, Any] = {}
        self._loads: dict[str, int] = {}
        self._changed = threading.Condition()

    def put(self, host_id: str, actor: Any) -> None:
        """The host takes work from now on; an actor of another start of it no longer does."""
        with self._changed:
            self._actors[host_id] = actor
            self._actors = dict(sorted(self._actors.items()))
            self._loads.setdefault(host_id, 0)
            self._changed.notify_all()

    def take_out(self, host_id: str, actor: Any = None) -> None:
        """The host takes no more work; with `actor`, only if it is still that one."""
        with self._changed:
            if actor is None or self._actors.get(host_id) is actor:
                self._actors.pop(host_id, None)

    def hosts(self) -> dict[str, Any]:
        """Host id -> actor, as it stands."""
        with self._changed:
            return dict(self._actors)

    def place(self, weights: Sequence[int], wait_s: float, absence: Callable[[], str]) -> list[tuple[str, Any]]:
        """A host and its actor for each item; adds the weights to their loads.

        Raises:
            DeadlineExceeded: no host takes work, and none came back in `wait_s`; says where they are (`absence`).
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._actors, wait_s):
                raise DeadlineExceeded(f"a host that takes work; {absence()}", wait_s)
            chosen = spread({host: self._loads[host] for host in self._actors}, weights)
            for host, weight in zip(chosen, weights, strict=True):
                self._loads[host] += weight
            return [(host, self._actors[host]) for host in chosen]

    def done(self, host_id: str, weight: int) -> None:
        """So much of what was placed on a host is no longer there."""
        with self._changed:
            self._loads[host_id] -= weight
