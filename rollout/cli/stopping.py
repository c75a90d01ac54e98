"""Ctrl-C and SIGTERM, so that a command that started processes ends them before it goes."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopping:
    """Turns the first signal into KeyboardInterrupt; those after it no longer disturb what is being ended."""

    def rearm(self) -> None:
        """Takes the signals over (again: ray.init sets a handler of its own)."""
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup
                signal.signal(number, self._stop)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        for other in SIGNALS:
            signal.signal(other, signal.SIG_IGN)
        raise KeyboardInterrupt


@contextmanager
def stoppable() -> Iterator[Stopping]:
    """Inside, a signal ends the block by KeyboardInterrupt, once; afterwards everything is as before."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    stopping = Stopping()
    stopping.rearm()
    try:
        yield stopping
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
