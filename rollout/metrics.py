"""What a fleet tells Prometheus, through Ray's metrics.

Ray puts `ray_` before every name and `_total` after a counter's. Every name stands in METRICS; the dashboard beside
this file queries these and no others.
"""

import math
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from ray.util.metrics import Counter, Gauge, Histogram

from rollout.status import HostStatus
from rollout.totals import HostTotals
from weights.version import WeightVersion

PREFIX = "ray_"
DASHBOARD = Path(__file__).with_name("grafana_dashboard.json")
OBSERVE_S = 1.0
"""Seconds between two observations. Ray exports what was observed last every 10 s."""
SECONDS = tuple(scale * digit for scale in (0.001, 0.01, 0.1, 1.0, 10.0, 100.0) for digit in (1, 2, 5))
"""Boundaries of histograms."""
HOST = ("fleet", "host")


class Kind(StrEnum):
    """Of a metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, kw_only=True, slots=True)
class Metric:
    """One metric as Ray gets it."""

    name: str
    kind: Kind
    what: str
    tags: tuple[str, ...] = HOST

    @property
    def exported(self) -> tuple[str, ...]:
        """Its names in Prometheus."""
        suffixes = {Kind.COUNTER: ("_total",), Kind.GAUGE: ("",), Kind.HISTOGRAM: ("_bucket", "_sum", "_count")}
        return tuple(f"{PREFIX}{self.name}{suffix}" for suffix in suffixes[self.kind])


def _counter(name: str, what: str, *tags: str) -> Metric:
    return Metric(name=f"moe_rollout_{name}", kind=Kind.COUNTER, what=what, tags=(*HOST, *tags))


def _gauge(name: str, what: str, *tags: str) -> Metric:
    return Metric(name=f"moe_rollout_{name}", kind=Kind.GAUGE, what=what, tags=(*HOST, *tags))


def _histogram(name: str, what: str, *tags: str) -> Metric:
    return Metric(name=f"moe_rollout_{name}", kind=Kind.HISTOGRAM, what=what, tags=(*HOST, *tags))


TOKENS = _counter("tokens", "Sampled tokens.")
VERSION_TOKENS = _counter("version_tokens", "Sampled tokens by the version that made them.", "run", "step")
PROMPT_TOKENS = _counter("prompt_tokens", "Tokens of prompts that were read, found prefixes included.")
PREFIX_TOKENS = _counter("prefix_tokens", "Tokens of prompts that were found in the prefix cache.")
COMPLETIONS = _counter("completions", "Completions by why they ended.", "reason")
PREEMPTIONS = _counter("preemptions", "Sequences that gave up their KV blocks, to resume later.")
UPDATES = _counter("updates", "Weight updates committed.")
FAULTS = _counter(
    "faults",
    "torn: a commit failed half-way. refused: an update did not fit or was not whole. called_off: the publisher took "
    "an update back. engine: the engine stopped. lost: the host died, froze or stayed torn, and was ended.",
    "kind",
)
SERVING = _gauge("serving", "1 where the host serves a version, 0 where it serves nothing.")
STEP = _gauge("step", "The trainer's step that the host serves.", "run", "digest")
RUNNING = _gauge("running", "Sequences that run.")
WAITING = _gauge("waiting", "Sequences that wait.")
BLOCKS_IN_USE = _gauge("blocks_in_use", "KV blocks that sequences hold.")
BLOCKS = _gauge("blocks", "KV blocks there are.")
PHASE_SECONDS = _histogram(
    "update_phase_seconds",
    "Seconds of each phase of an update (offer, stage, vote, commit), as the host saw it.",
    "phase",
)
PAUSE_SECONDS = _histogram("pause_seconds", "Seconds in which an update let no engine step run.")

METRICS = (
    TOKENS,
    VERSION_TOKENS,
    PROMPT_TOKENS,
    PREFIX_TOKENS,
    COMPLETIONS,
    PREEMPTIONS,
    UPDATES,
    FAULTS,
    SERVING,
    STEP,
    RUNNING,
    WAITING,
    BLOCKS_IN_USE,
    BLOCKS,
    PHASE_SECONDS,
    PAUSE_SECONDS,
)

Tags = Mapping[str, str]


class Instruments(Protocol):
    """Where metrics go."""

    def record(self, metric: Metric, value: float, tags: Tags) -> None:
        """Adds to a counter, sets a gauge, or puts into a histogram."""
        ...


class RayInstruments:
    """Ray's own, made when first needed; usable in any process of a Ray cluster."""

    def __init__(self) -> None:
        self._made: dict[str, Any] = {}

    def record(self, metric: Metric, value: float, tags: Tags) -> None:
        if metric.name not in self._made:
            self._made[metric.name] = _made(metric)
        instrument = self._made[metric.name]
        match metric.kind:
            case Kind.COUNTER:
                instrument.inc(value, dict(tags))
            case Kind.GAUGE:
                instrument.set(value, dict(tags))
            case Kind.HISTOGRAM:
                instrument.observe(value, dict(tags))


def _made(metric: Metric) -> Any:
    if metric.kind is Kind.COUNTER:
        return Counter(metric.name, metric.what, tag_keys=metric.tags)
    if metric.kind is Kind.GAUGE:
        return Gauge(metric.name, metric.what, tag_keys=metric.tags)
    return Histogram(metric.name, metric.what, boundaries=list(SECONDS), tag_keys=metric.tags)


class HostMetrics:
    """One host's metrics, from what it says of itself. Called in the host's process.

    Args:
        fleet: its name.
        host_id: the host.
        instruments: Ray's, unless a test has its own.
    """

    def __init__(self, fleet: str, host_id: str, instruments: Instruments | None = None) -> None:
        self._tags = {"fleet": fleet, "host": host_id}
        self._instruments = RayInstruments() if instruments is None else instruments
        self._seen: dict[tuple[str, tuple[tuple[str, str], ...]], float] = {}
        self._served: WeightVersion | None = None
        self._updates = 0

    def observe(self, status: HostStatus, totals: HostTotals) -> None:
        """Tells what has changed since the last time, and how things stand."""
        self._set(RUNNING, status.running)
        self._set(WAITING, status.waiting)
        self._set(BLOCKS_IN_USE, status.blocks - status.blocks_free)
        self._set(BLOCKS, status.blocks)
        self._set(SERVING, 0 if status.version is None else 1)
        self._serve(status.version)
        self._rise(TOKENS, sum(totals.tokens_by_version.values()))
        for version, tokens in totals.tokens_by_version.items():
            self._rise(VERSION_TOKENS, tokens, run=version.run, step=str(version.step))
        self._rise(PROMPT_TOKENS, totals.prompt_tokens)
        self._rise(PREFIX_TOKENS, totals.prefix_tokens)
        self._rise(PREEMPTIONS, totals.preemptions)
        for reason, count in totals.finished.items():
            self._rise(COMPLETIONS, count, reason=str(reason))
        faults = {
            "torn": totals.torn,
            "refused": totals.updates_refused,
            "called_off": totals.updates_called_off,
            "engine": int(status.state == "failed"),
        }
        for kind, count in faults.items():
            self._rise(FAULTS, count, kind=kind)
        self._update(totals)

    def _serve(self, version: WeightVersion | None) -> None:
        if self._served is not None and self._served != version:
            # Ray exports a gauge for ever, with every set of tags that it ever had, unless its value is NaN.
            self._set(STEP, math.nan, run=self._served.run, digest=self._served.digest.hex)
        self._served = version
        if version is not None:
            self._set(STEP, version.step, run=version.run, digest=version.digest.hex)

    def _update(self, totals: HostTotals) -> None:
        new = min(totals.updates - self._updates, len(totals.update_records))
        self._rise(UPDATES, totals.updates)
        self._updates = totals.updates
        for record in totals.update_records[len(totals.update_records) - new :]:
            for phase, seconds in record.phases.items():
                self._instruments.record(PHASE_SECONDS, seconds, {**self._tags, "phase": phase})
            self._instruments.record(PAUSE_SECONDS, record.pause_s, self._tags)

    def _set(self, metric: Metric, value: float, **tags: str) -> None:
        self._instruments.record(metric, value, {**self._tags, **tags})

    def _rise(self, metric: Metric, total: float, **tags: str) -> None:
        """Brings a counter to `total`, which never falls."""
        key = (metric.name, tuple(tags.items()))
        more = total - self._seen.get(key, 0)
        if more > 0:
            self._instruments.record(metric, more, {**self._tags, **tags})
            self._seen[key] = total


class FleetMetrics:
    """What only the launcher of a fleet knows: the hosts that it lost."""

    def __init__(self, fleet: str, instruments: Instruments | None = None) -> None:
        self._fleet = fleet
        self._instruments = RayInstruments() if instruments is None else instruments
        self._seen: dict[str, int] = {}

    def observe(self, losses: Mapping[str, int]) -> None:
        """How often each host was lost so far."""
        for host, count in losses.items():
            more = count - self._seen.get(host, 0)
            if more > 0:
                self._instruments.record(FAULTS, more, {"fleet": self._fleet, "host": host, "kind": "lost"})
                self._seen[host] = count


class Observation:
    """Observes again and again, in a thread, until it is stopped."""

    def __init__(self, observe: Callable[[], None], every_s: float = OBSERVE_S) -> None:
        self._observe = observe
        self._every_s = every_s
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Observes no more."""
        self._stopping.set()
        self._thread.join(self._every_s)

    def _run(self) -> None:
        self._observe()
        while not self._stopping.wait(self._every_s):
            self._observe()
