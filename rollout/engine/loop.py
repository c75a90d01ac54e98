"""The engine's thread: steps while there is work, and stops between two steps for whoever must touch the parameters.

Everything that changes the engine happens here: requests come as actions that run between steps, a weight update comes
through `paused()`. So the engine needs no locks.
"""

import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rollout.engine.engine import Engine
from rollout.engine.sequence import Sequence
from rollout.errors import DeadlineExceeded


class EngineLoop:
    """Runs an engine in a thread of its own.

    Args:
        finished: called in the engine's thread with each sequence that ended.
        failed: called once, in the engine's thread, with the traceback of what stopped it.
    """

    def __init__(self, engine: Engine, *, finished: Callable[[Sequence], None], failed: Callable[[str], None]) -> None:
        self.engine = engine
        self.serving = True
        """False while the host may not serve: requests wait, no step runs. Set True only inside `paused()`; False at
        any time and from any thread: a step that runs ends, and no other begins.
        """
        self._finished = finished
        self._failed = failed
        self._actions: deque[Callable[[Engine], None]] = deque()
        self._changed = threading.Condition()
        self._pauses_wanted = 0
        self._stepping = False
        self._paused = False
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def post(self, action: Callable[[Engine], None]) -> None:
        """Has `action` run in the engine's thread, between two steps. Never waits."""
        with self._changed:
            self._actions.append(action)
            self._changed.notify_all()

    @contextmanager
    def paused(self, deadline_s: float) -> Iterator[None]:
        """No step and no action runs inside.

        Raises:
            DeadlineExceeded: the running step (or another pause) did not end in time.
        """
        until = time.monotonic() + deadline_s
        with self._changed:
            self._pauses_wanted += 1
            self._changed.notify_all()
            try:
                while self._stepping or self._paused:
                    if not self._changed.wait(until - time.monotonic()):
                        raise DeadlineExceeded("the engine's running step to end", deadline_s)
                self._paused = True
            finally:
                self._pauses_wanted -= 1
                self._changed.notify_all()
        try:
            yield
        finally:
            with self._changed:
                self._paused = False
                self._changed.notify_all()

    def stop(self, deadline_s: float) -> None:
        """Ends the thread after the running step.

        Raises:
            DeadlineExceeded: it did not end in time.
        """
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(deadline_s)
        if self._thread.is_alive():
            raise DeadlineExceeded("the engine's running step to end", deadline_s)

    def _run(self) -> None:
        try:
            while self._next_turn():
                for action in self._take_actions():
                    action(self.engine)
                if self.serving:
                    for sequence in self.engine.step():
                        self._finished(sequence)
        except Exception:  # the thread's edge: whatever stopped the engine, the host must say so and not hang
            self._failed(traceback.format_exc())
        finally:
            with self._changed:
                self._stepping = False
                self._changed.notify_all()

    def _next_turn(self) -> bool:
        """Waits until there is something to do and nobody wants a pause; False when the thread must end."""
        with self._changed:
            self._stepping = False
            self._changed.notify_all()
            self._changed.wait_for(
                lambda: self._stopping or (self._has_work() and not (self._pauses_wanted or self._paused))
            )
            self._stepping = not self._stopping
            return self._stepping

    def _has_work(self) -> bool:
        return bool(self._actions) or (self.serving and self.engine.has_work)

    def _take_actions(self) -> list[Callable[[Engine], None]]:
        with self._changed:
            actions = list(self._actions)
            self._actions.clear()
        return actions
