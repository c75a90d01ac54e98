"""The engine's thread pauses between two steps, never inside one, and says so when it cannot."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rollout.engine.loop import EngineLoop
from rollout.errors import DeadlineExceeded


class GatedEngine:
    """An engine that always has work; each step waits at a gate."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.entered = threading.Semaphore(0)
        self.inside = False
        self.steps = 0
        self.has_work = True
        self.broken = False

    def step(self) -> list[Any]:
        self.inside = True
        self.entered.release()
        self.gate.acquire()
        if self.broken:
            raise RuntimeError("this engine is broken")
        self.inside = False
        self.steps += 1
        return [self.steps]


class Running:
    def __init__(self) -> None:
        self.engine = GatedEngine()
        self.finished: list[int] = []
        self.failures: list[str] = []
        self.failed = threading.Event()
        self.loop = EngineLoop(self.engine, finished=self.finished.append, failed=self._failed)  # type: ignore[arg-type]
        self.loop.start()

    def _failed(self, traceback: str) -> None:
        self.failures.append(traceback)
        self.failed.set()


@pytest.fixture
def running() -> Iterator[Running]:
    running = Running()
    yield running
    running.engine.has_work = False
    running.engine.gate.release(1000)
    running.loop.stop(5)


def in_thread(function: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=function)
    thread.start()
    return thread


def test_a_pause_waits_for_the_running_step_and_holds_the_next(running: Running) -> None:
    engine, paused, release = running.engine, threading.Event(), threading.Event()
    inside_during_pause: list[bool] = []

    def pause() -> None:
        with running.loop.paused(5):
            inside_during_pause.append(engine.inside)
            paused.set()
            release.wait(5)
            inside_during_pause.append(engine.inside)

    engine.entered.acquire()
    thread = in_thread(pause)
    assert not paused.wait(0.05), "paused in the middle of a step"
    engine.gate.release(3)
    assert paused.wait(5)
    steps = engine.steps
    assert not engine.entered.acquire(timeout=0.05), "a step began during the pause"
    release.set()
    thread.join()
    assert inside_during_pause == [False, False]
    assert engine.entered.acquire(timeout=5), "no step began after the pause"
    assert engine.steps >= steps


def test_a_pause_that_cannot_be_had_in_time_says_what_it_waited_for(running: Running) -> None:
    running.engine.entered.acquire()
    with (
        pytest.raises(DeadlineExceeded, match=r"waited 0\.05 s for the engine's running step to end"),
        running.loop.paused(0.05),
    ):
        pass
    running.engine.gate.release()
    assert running.engine.entered.acquire(timeout=5), "the loop goes on"


def test_actions_run_between_steps_in_their_order(running: Running) -> None:
    seen: list[tuple[int, bool]] = []
    done = threading.Event()
    running.engine.entered.acquire()
    for number in range(3):
        running.loop.post(lambda engine, number=number: seen.append((number, engine.inside)))
    running.loop.post(lambda engine: done.set())
    running.engine.gate.release()
    assert done.wait(5)
    assert seen == [(0, False), (1, False), (2, False)]


def test_torn_parameters_stop_the_steps_but_not_the_actions(running: Running) -> None:
    running.engine.entered.acquire()
    running.engine.gate.release()
    running.engine.entered.acquire()
    running.engine.gate.release()
    with running.loop.paused(5):
        running.loop.serving = False
        while running.engine.entered.acquire(blocking=False):
            pass
    done = threading.Event()
    running.loop.post(lambda engine: done.set())
    assert done.wait(5)
    assert not running.engine.entered.acquire(timeout=0.05), "a step ran on torn parameters"
    with running.loop.paused(5):
        running.loop.serving = True
    assert running.engine.entered.acquire(timeout=5)


def test_what_stops_the_engine_is_reported_and_nobody_waits_for_it() -> None:
    running = Running()
    running.engine.entered.acquire()
    running.engine.broken = True
    running.engine.gate.release()
    assert running.failed.wait(5)
    assert "this engine is broken" in running.failures[0]
    with running.loop.paused(5):
        pass
    running.loop.stop(5)
