"""A call that may never return, and a caller who waits only so long.

NCCL, gloo and their store wait inside C++ for peers that may be dead or stopped, some without any timeout of their own.
"""

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Errand(Generic[T]):
    """A call in a thread of its own, which dies with the process if it never returns."""

    def __init__(self, call: Callable[[], T], name: str, *, unclaimed: Callable[[T], None] | None = None) -> None:
        """unclaimed: gets the result if nobody waits for it any more."""
        self._call = call
        self._unclaimed = unclaimed
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._left = False
        self._result: list[T] = []
        self._error: BaseException | None = None
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def result(self, within_s: float) -> T:
        """What the call returned or raised. TimeoutError, and the call is left to itself, if it takes longer."""
        if not self._ended.wait(within_s):
            with self._lock:
                self._left = not self._ended.is_set()
            if self._left:
                raise TimeoutError
        if self._error is not None:
            raise self._error
        return self._result[0]

    def _run(self) -> None:
        try:
            self._result.append(self._call())
        except BaseException as error:  # it is raised again where it is waited for
            self._error = error
        with self._lock:
            left = self._left
            self._ended.set()
        if left and self._result and self._unclaimed is not None:
            self._unclaimed(self._result.pop())
