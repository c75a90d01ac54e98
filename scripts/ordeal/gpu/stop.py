"""Stop: what happens to a process when it comes to a named point of an update."""

import signal
import threading
from collections.abc import Callable, Mapping


class Stop:
    """Armed with one point and one blow at a time, which falls once. Safe to call from several threads."""

    def __init__(self, blows: Mapping[str, Callable[[], None]]) -> None:
        """blows: what there is besides SIGKILL and SIGSTOP."""
        self._blows = blows
        self._phase: str | None = None
        self._blow = ""

    def arm(self, phase: str | None, blow: str) -> None:
        """phase: None for nowhere."""
        self._phase, self._blow = phase, blow

    @property
    def phase(self) -> str | None:
        """Where it is still to fall; None once it has."""
        return self._phase

    def at(self, phase: str) -> None:
        """The process has come to this point."""
        if phase != self._phase:
            return
        self._phase = None
        if self._blow in ("SIGKILL", "SIGSTOP"):
            # At this thread: were it sent to the process, another one might take it, and this one go on for a while.
            signal.pthread_kill(threading.get_ident(), getattr(signal, self._blow))
        else:
            self._blows[self._blow]()


def nth(part: int, count: int) -> str:
    """How a table of faults names one of an update's buckets; "" for those that it does not name."""
    return {count // 2: "middle", count - 1: "last", 0: "first"}.get(part, "")
