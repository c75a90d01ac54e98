"""Scores that somebody waits for, from the question to the engine's answer."""

import threading
from collections.abc import Sequence as Many
from concurrent.futures import Future

from rollout.engine.sequence import Purpose, Sequence
from rollout.errors import HostFailed
from rollout.request import Prompt, SamplingParams, Score

CLIENT = "score"
_PARAMS = SamplingParams(max_tokens=1, seed=0)


class Scores:
    """Questions without an answer yet. Safe to use from several threads."""

    def __init__(self) -> None:
        self._asked = 0
        self._failure: str | None = None
        self._open: dict[Sequence, Future[Score]] = {}
        self._lock = threading.Lock()

    def ask(self, sequences: Many[tuple[int, ...]]) -> dict[Sequence, "Future[Score]"]:
        """A scoring sequence for each of these token sequences, and where its answer will be.

        Raises:
            ValueError: one of them is empty.
            HostFailed: the engine has stopped.
        """
        with self._lock:
            if self._failure is not None:
                raise HostFailed(self._failure)
            self._asked += 1
            asked: dict[Sequence, Future[Score]] = {
                Sequence(
                    (CLIENT, f"{self._asked}", index),
                    Prompt(id=f"score {index}", token_ids=tuple(tokens)),
                    _PARAMS,
                    Purpose.SCORE,
                ): Future()
                for index, tokens in enumerate(sequences)
            }
            self._open |= asked
        return asked

    def answer(self, sequence: Sequence) -> None:
        """The engine is done with it."""
        self._take(sequence).set_result(sequence.score())

    def drop(self, sequence: Sequence) -> None:
        """Nobody waits for it any more."""
        self._take(sequence).cancel()

    def fail(self, reason: str) -> None:
        """No more answers: everybody who waits is told why, and whoever asks later."""
        with self._lock:
            self._failure = reason
            futures = list(self._open.values())
            self._open.clear()
        for future in futures:
            future.set_exception(HostFailed(reason))

    def _take(self, sequence: Sequence) -> "Future[Score]":
        with self._lock:
            return self._open.pop(sequence)
