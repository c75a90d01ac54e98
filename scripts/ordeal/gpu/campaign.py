"""Campaign: many cells on several fleets at a time, each with its own processes; most of a cell's time is waiting."""

import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from ordeal.gpu.arena import Arena, Verdict
from ordeal.gpu.pool import Pool
from ordeal.gpu.table import Cell
from ordeal.gpu.terms import Terms


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """A cell, and what came of it."""

    cell: Cell
    verdict: Verdict | None
    """None where a promise was broken."""
    fault: str
    """Which one; "" for none."""
    seconds: float
    """All of it: with the good update after it."""

    @property
    def kept(self) -> bool:
        return not self.fault


def run_cells(
    terms: Terms, cells: Sequence[Cell], *, lanes: int, told: Callable[[Found], None]
) -> tuple[list[Found], int]:
    """Every cell, in a lane that is free; and how many steps of the hosts were judged. `told` hears of each at once."""
    compile_first(terms)
    waiting: queue.SimpleQueue[Cell] = queue.SimpleQueue()
    for cell in cells:
        waiting.put(cell)
    found: list[Found] = []
    steps: list[int] = []
    lock = threading.Lock()

    def work(lane: int) -> None:
        mine = replace(terms, fleet=f"{terms.fleet}-{lane}")
        for result, more in _one_after_the_other(mine, waiting):
            with lock:
                found.append(result)
                steps.append(more)
                told(result)

    threads = [threading.Thread(target=work, args=(lane,)) for lane in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    order = {cell: place for place, cell in enumerate(cells)}
    return sorted(found, key=lambda result: order[result.cell]), sum(steps)


def compile_first(terms: Terms) -> None:
    """One process compiles the kernels; all others find them on disk."""
    if not terms.on_cpu:
        with Pool({terms.learner_device: 1}, wire=False) as pool:
            pool.await_warm()


def spare(terms: Terms) -> dict[str, int]:
    """Warm processes to keep for each device: a struck learner is followed by another, a second, and so on."""
    count = dict.fromkeys(terms.host_devices, 1)
    count[terms.learner_device] = count.get(terms.learner_device, 0) + 1
    return count if terms.on_cpu else {device: 2 * spares for device, spares in count.items()}


def _one_after_the_other(terms: Terms, waiting: "queue.SimpleQueue[Cell]") -> Iterator[tuple[Found, int]]:
    """One lane; a broken arena makes way for a new one."""
    with Pool(spare(terms), wire=terms.transport == "nccl") as pool:
        arena: Arena | None = None
        try:
            while not waiting.empty():
                try:
                    cell = waiting.get_nowait()
                except queue.Empty:
                    return
                began, verdict, fault, before = time.monotonic(), None, "", 0
                try:
                    arena = arena or Arena(terms, pool)
                    before = arena.steps
                    verdict = arena.run(cell)
                    if verdict.seconds > verdict.limit_s:
                        fault = f"took {verdict.seconds:.1f} s, the deadlines allow {verdict.limit_s:.1f} s"
                except (AssertionError, OSError) as error:  # TimeoutError is one
                    fault = str(error) or repr(error)
                steps = 0 if arena is None else arena.steps - before
                if fault and arena is not None:
                    arena.close()
                    arena = None
                yield Found(cell=cell, verdict=verdict, fault=fault, seconds=time.monotonic() - began), steps
        finally:
            if arena is not None:
                arena.close()
