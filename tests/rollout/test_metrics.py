"""Metrics: what a host says of itself becomes what Prometheus sees, and the dashboard asks for exactly that."""

import json
import math
import re
import threading
from collections import defaultdict
from collections.abc import Mapping

import pytest
from fakes.weights_fleet import offer_of

from rollout.metrics import DASHBOARD, METRICS, FleetMetrics, HostMetrics, Kind, Metric, Observation
from rollout.request import FinishReason
from rollout.status import HostStatus
from rollout.totals import HostTotals
from rollout.updates import PHASES, UpdateLog, UpdateRecord
from weights.digest import Digest
from weights.manifest import Manifest
from weights.messages import Abort, Aborted, Commit, Committed, Offered, Refused, Stage, Staged, Vote, Voted
from weights.state import State
from weights.version import WeightVersion

FIRST = WeightVersion(run="a", step=1, digest=Digest(1, 1))
SECOND = WeightVersion(run="a", step=2, digest=Digest(2, 2))


class Kept:
    """Instruments that keep what they are told."""

    def __init__(self) -> None:
        self.told: dict[str, list[tuple[float, dict[str, str]]]] = defaultdict(list)

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        assert set(tags) == set(metric.tags), f"{metric.name} has the tags {metric.tags}"
        assert metric.kind is not Kind.COUNTER or value > 0, f"{metric.name}: a counter that stands still is not told"
        self.told[metric.name.removeprefix("moe_rollout_")].append((value, dict(tags)))

    def total(self, name: str, **tags: str) -> float:
        return sum(value for value, told in self.told[name] if tags.items() <= told.items())


def status(version: WeightVersion | None = FIRST, state: str = "idle", running: int = 3) -> HostStatus:
    return HostStatus(
        host_id="host-0", state=state, version=version, running=running, waiting=4, process=1, blocks_free=6, blocks=10
    )


def record(version: WeightVersion = SECOND) -> UpdateRecord:
    phases = dict(zip(PHASES, (0.1, 0.2, 0.3, 0.4), strict=True))
    return UpdateRecord(version=version, at_s=0.0, phases=phases, pause_s=0.25, copy_s=0.1, verify_s=0.1)


def totals(updates: tuple[UpdateRecord, ...] = (), torn: int = 0, **tokens: int) -> HostTotals:
    return HostTotals(
        tokens_by_version={FIRST: tokens.get("first", 0), SECOND: tokens.get("second", 0)},
        prompt_tokens=30,
        prefix_tokens=16,
        preemptions=2,
        finished={FinishReason.STOP: 5, FinishReason.LENGTH: 1},
        updates=len(updates),
        update_records=updates,
        updates_refused=1,
        updates_called_off=0,
        torn=torn,
    )


def queried(text: str) -> set[str]:
    return set(re.findall(r"\bray_moe_rollout_\w+", text))


def test_the_dashboard_and_the_metrics_name_each_other() -> None:
    dashboard = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    exported = {name: metric.name for metric in METRICS for name in metric.exported}
    asked = {name for panel in dashboard["panels"] for target in panel["targets"] for name in queried(target["expr"])}
    assert asked <= set(exported), "the dashboard asks for what nobody exports"
    assert {exported[name] for name in asked} == {metric.name for metric in METRICS}, "a metric stands on no panel"
    assert queried(json.dumps(dashboard["templating"])) <= set(exported)


def test_every_label_that_the_dashboard_groups_by_is_a_tag_of_that_metric() -> None:
    tags = {name: set(metric.tags) for metric in METRICS for name in metric.exported}
    for panel in json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]:
        for target in panel["targets"]:
            (first, *_) = re.findall(r"ray_moe_rollout_\w+", target["expr"])
            grouped = {label for group in re.findall(r"by \(([^)]*)\)", target["expr"]) for label in group.split(", ")}
            assert grouped - {"le"} <= tags[first], panel["title"]
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= grouped, panel["title"]


def test_panels_do_not_overlap_and_say_what_they_show() -> None:
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    assert len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len(panels)
    assert all(panel["title"] and panel["description"] for panel in panels)


def test_names_are_as_prometheus_has_them() -> None:
    assert all(re.fullmatch(r"moe_rollout_[a-z_]+", metric.name) for metric in METRICS)
    assert not any(metric.name.endswith(("_total", "_sum", "_count", "_bucket")) for metric in METRICS)
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_counters_are_told_what_came_on_top() -> None:
    kept = Kept()
    metrics = HostMetrics("run-7", "host-0", kept)
    metrics.observe(status(), totals(first=10))
    metrics.observe(status(), totals(first=10))
    metrics.observe(status(), totals(first=12, second=5))
    assert [value for value, _ in kept.told["tokens"]] == [10, 7]
    assert kept.total("version_tokens", run="a", step="1") == 12
    assert kept.total("version_tokens", run="a", step="2") == 5
    assert kept.told["prompt_tokens"] == [(30, {"fleet": "run-7", "host": "host-0"})]
    assert kept.total("completions", reason="stop") == 5
    assert kept.total("faults", kind="refused") == 1


def test_gauges_tell_how_things_stand() -> None:
    kept = Kept()
    HostMetrics("run-7", "host-0", kept).observe(status(), totals())
    now = {name: kept.told[name][-1][0] for name in ("running", "waiting", "blocks_in_use", "blocks", "serving")}
    assert now == {"running": 3, "waiting": 4, "blocks_in_use": 4, "blocks": 10, "serving": 1}


def test_a_version_that_is_served_no_more_becomes_nan() -> None:
    kept = Kept()
    metrics = HostMetrics("run-7", "host-0", kept)
    for version in (FIRST, FIRST, SECOND, None):
        metrics.observe(status(version, state="torn" if version is None else "idle"), totals())
    steps = [(None if math.isnan(value) else value, tags["digest"]) for value, tags in kept.told["step"]]
    first, second = FIRST.digest.hex, SECOND.digest.hex
    assert steps == [(1, first), (1, first), (None, first), (2, second), (None, second)]
    assert [value for value, _ in kept.told["serving"]] == [1, 1, 1, 0]


def test_every_update_is_told_once_though_several_came_between_two_looks() -> None:
    kept = Kept()
    metrics = HostMetrics("run-7", "host-0", kept)
    metrics.observe(status(), totals((record(),)))
    metrics.observe(status(), totals((record(), record(), record())))
    metrics.observe(status(), totals((record(), record(), record())))
    assert kept.total("updates") == 3
    assert len(kept.told["pause_seconds"]) == 3
    assert kept.total("update_phase_seconds", phase="commit") == pytest.approx(1.2)
    assert {tags["phase"] for _, tags in kept.told["update_phase_seconds"]} == set(PHASES)


def test_faults_are_told_by_kind() -> None:
    kept = Kept()
    metrics = HostMetrics("run-7", "host-0", kept)
    metrics.observe(status(None, "torn"), totals(torn=1))
    metrics.observe(status(None, "failed"), totals(torn=1))
    metrics.observe(status(None, "failed"), totals(torn=1))
    assert kept.total("faults", kind="torn") == kept.total("faults", kind="engine") == 1


def test_the_launcher_tells_of_the_hosts_that_it_lost() -> None:
    kept = Kept()
    metrics = FleetMetrics("run-7", kept)
    for lost in (0, 1, 1, 3):
        metrics.observe({"host-0": 0, "host-1": lost})
    assert [(value, tags["host"]) for value, tags in kept.told["faults"]] == [(1, "host-1"), (2, "host-1")]
    assert kept.total("faults", kind="lost") == 3


def test_an_observation_goes_on_until_it_is_stopped() -> None:
    looks = threading.Semaphore(0)
    observation = Observation(looks.release, every_s=0.001)
    for _ in range(3):
        assert looks.acquire(timeout=10)
    observation.stop()
    while looks.acquire(blocking=False):
        pass
    assert not looks.acquire(timeout=0.05)


OFFER = offer_of(Manifest.of([]), sequence=1)
COMMITTED = Committed(sequence=5, update="u", version=SECOND, pause_s=0.5, copy_s=0.1, verify_s=0.2)
TORN = Refused(sequence=5, update="u", state=State.TORN, reason="the disk burns")
NO = Refused(sequence=1, update="u", state=State.IDLE, reason="does not fit")


def staged(log: UpdateLog) -> None:
    """An update up to the vote, a second per message and one between two of them."""
    log.note(OFFER, Offered(sequence=1, update="u", stages=2, content=SECOND.digest), 10.0, 11.0)
    for bucket, began_s in enumerate((12.0, 14.0)):
        request = Stage(sequence=2 + bucket, update="u", bucket=bucket)
        log.note(request, Staged(sequence=2 + bucket, update="u", bucket=bucket), began_s, began_s + 1)
    log.note(Vote(sequence=4, update="u"), Voted(sequence=4, update="u", digest=SECOND.digest), 16.0, 17.0)


def test_the_phases_of_an_update_add_up_to_the_whole_of_it() -> None:
    log = UpdateLog()
    staged(log)
    log.note(Commit(sequence=5, update="u"), COMMITTED, 18.0, 19.0)
    log.note(Commit(sequence=5, update="u"), COMMITTED, 20.0, 21.0)
    assert log.last is not None
    assert log.committed == 1, "a commit that is asked for twice is one"
    assert log.last.phases == {"offer": 1.0, "stage": 4.0, "vote": 2.0, "commit": 2.0}
    assert (log.last.version, log.last.pause_s) == (SECOND, 0.5)


def test_refusals_aborts_and_torn_commits_are_told_apart() -> None:
    log = UpdateLog()
    log.note(OFFER, NO, 0.0, 1.0)
    assert (log.refused, log.called_off, log.committed) == (1, 0, 0)
    staged(log)
    abort = Abort(sequence=9, update="u", reason="")
    log.note(abort, Aborted(sequence=9, update="u", state=State.IDLE, version=FIRST), 20.0, 21.0)
    assert (log.refused, log.called_off, log.committed) == (1, 1, 0)
    log = UpdateLog()
    staged(log)
    log.note(Commit(sequence=5, update="u"), TORN, 18.0, 19.0)
    assert (log.refused, log.called_off, log.committed, log.last) == (0, 0, 0, None)
