"""How often a host was started again, and how long it rests before the next start."""

from collections import deque

WINDOW_S = 3600.0
"""Starts older than this no longer count."""
BACKOFF_S = 1.0
"""Before a host that failed to come back is started once more; doubles each time, up to BACKOFF_MAX_S."""
BACKOFF_MAX_S = 30.0


class Restarts:
    """The starts of one host after its first."""

    def __init__(self) -> None:
        self._began_s: deque[float] = deque()
        self._failures = 0
        """Lives in a row in which it never served."""

    @property
    def count(self) -> int:
        """Within WINDOW_S before it was last lost, and since."""
        return len(self._began_s)

    @property
    def rest_s(self) -> float:
        """Before it is started once more."""
        return min(BACKOFF_S * 2 ** (self._failures - 1), BACKOFF_MAX_S) if self._failures else 0.0

    def begin(self, now: float) -> None:
        """It is started again."""
        self._began_s.append(now)

    def serve(self) -> None:
        """It came back."""
        self._failures = 0

    def lose(self, now: float, *, serving: bool) -> None:
        """It was lost, while it served or on its way there."""
        self._failures = 0 if serving else self._failures + 1
        while self._began_s and now - self._began_s[0] > WINDOW_S:
            self._began_s.popleft()
