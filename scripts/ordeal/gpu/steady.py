"""Many updates in a row: whether the last cost as much as the first, in memory, descriptors and seconds."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from ordeal.gpu.arena import Arena
from ordeal.gpu.campaign import spare
from ordeal.gpu.pool import Pool
from ordeal.gpu.table import Kind
from ordeal.gpu.terms import Terms
from ordeal.resources import held

GROWTH = 0.02
MEBI = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Steady:
    """What one kind of update cost, early and late: medians of a tenth of the updates each."""

    kind: Kind
    updates: int
    hosts: int
    early: dict[str, float]
    late: dict[str, float]
    seconds: float
    """Of all updates, with the samples."""

    @property
    def grown(self) -> list[str]:
        """What grew by more than GROWTH."""
        return [what for what, early in self.early.items() if self.late[what] > early * (1 + GROWTH)]


@dataclass(slots=True)
class _Samples:
    found: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        for what, value in values.items():
            self.found.setdefault(what, []).append(value)

    def medians(self) -> dict[str, float]:
        return {what: median(values) for what, values in self.found.items()}


def run_steady(terms: Terms, kinds: Sequence[Kind], updates: int) -> list[Steady]:
    """updates: at least 50; the second tenth of them is compared with the last."""
    found = []
    with Pool(spare(terms), wire=terms.transport == "nccl") as pool, Arena(terms, pool) as arena:
        pool.drain()  # what is on the devices now is the fleet's
        for kind in kinds:
            terms.roster(kind.delivery).write()
            found.append(_run(arena, kind, updates))
    return found


def _run(arena: Arena, kind: Kind, updates: int) -> Steady:
    tenth = updates // 10
    early, late = _Samples(), _Samples()
    began = time.monotonic()
    for update in range(updates):
        report = arena.publish_for(kind)
        samples = early if tenth <= update < 2 * tenth else late if update >= updates - tenth else None
        if samples is not None:
            samples.add(seconds=report["seconds"], **_held(arena))
    seconds = time.monotonic() - began
    arena.good_update()  # nothing wrong was served meanwhile, and every host holds the last one
    return Steady(
        kind=kind,
        updates=updates,
        hosts=len(arena.terms.hosts),
        early=early.medians(),
        late=late.medians(),
        seconds=seconds,
    )


def _held(arena: Arena) -> dict[str, float]:
    actors = arena.actors
    own = held([actor.process for actor in actors.values()], 0.0)
    assert own is not None, "a process has ended"
    found: dict[str, float] = {"memory_mib": own.memory_mib, "descriptors": own.descriptors}
    devices: list[dict[str, Any]] = [actor.ask("device") for actor in actors.values()]
    if all(devices):
        found["device_reserved_mib"] = sum(device["reserved"] for device in devices) / MEBI
        found["device_used_mib"] = max(device["used"] for device in devices) / MEBI
    return found
