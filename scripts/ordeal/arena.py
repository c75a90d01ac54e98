"""A fleet of three tiny hosts, learners that stop where they are told, and the judgement after each fault."""

import os
import shutil
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from grpo.checkpoint import write_checkpoint

from ordeal.content import Content
from ordeal.processes import LOOK_S, Spoken
from ordeal.table import HOST_CELLS, LEARNER_CELLS, After, Blow, Cell
from rollout import Fleet, HostDied, Prompt, RolloutConfig, SamplingParams
from rollout.errors import StepNotTaken
from rollout.watch import FolderWatch
from weights.disk import write_step
from weights.report import PublishReport
from weights.version import WeightVersion

HOSTS = 3
ALL = [f"host-{index}" for index in range(HOSTS)]
STRUCK = "host-1"
RUN_S = 45.0
"""A tiny host has been started again and serves, at the latest."""
SLACK_S = 1.0
DEADLINES = {
    "start_s": 60.0,
    "pause_s": 1.0,
    "message_s": 1.5,
    "silence_s": 2.0,
    "answer_s": 3.0,
    "torn_s": 5.0,
    "stop_s": 5.0,
    "progress_s": 60.0,
}
BUSY = {"offered", "staged", "committing"}
RELEASED = {
    "Stage to host 0",
    "Stage to host 1",
    "Vote to host 0",
    "half of the Vote to host 1",
    "Vote to host 2",
    "Commit to host 0",
}
"""Phases at which every host has an update under way, so that all let go of a frozen learner at their deadline. At the
others one of them has none, and keeps the learner's place until its process is ended."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """What was found after a cell."""

    cell: Cell
    after: After
    seconds: float
    """From the blow until every host was at rest (a host's: until all three serve again)."""
    limit_s: float
    """What the deadlines allow for that."""


def arena_config(workspace: Path, name: str, hosts: int = HOSTS, **fields: Any) -> RolloutConfig:
    """A fleet of tiny hosts with short deadlines; its checkpoint is written into the workspace."""
    folder = workspace / "checkpoint"
    if not folder.exists():
        write_checkpoint("qwen3_moe", folder, seed=1)
    plain: dict[str, Any] = {
        "name": name,
        "model": str(folder),
        "hosts": hosts,
        "restarts": 10_000,
        "engine": {"max_context": 64, "max_running": 8},
        "weights": {"bucket_mib": 1},
        "deadlines": DEADLINES,
    }
    return RolloutConfig.from_mapping(plain | fields)


class Arena:
    """Takes cells one after the other; every one begins with three hosts at the same version and ends so."""

    def __init__(self, workspace: Path, name: str) -> None:
        self.workspace = workspace
        self.config = arena_config(workspace, name)
        self.content = Content(Path(self.config.model))
        self.learners = Spoken("ordeal.learner", self.config.model)
        self.learners.event("ready")
        self._orders = 0
        try:
            self.fleet = Fleet.launch(self.config)
        except BaseException:
            self.learners.end()
            raise
        self.good_update()

    def close(self) -> None:
        self.learners.end()
        self.fleet.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, cell: Cell) -> Verdict:
        """AssertionError where a promise was broken; whatever the cell, the fleet is whole again after it."""
        if cell in LEARNER_CELLS:
            return self.strike_learner(cell)
        if cell in HOST_CELLS:
            return self.strike_host(cell)
        return {
            "the checkpoint, as a host starts again": self.remove_checkpoint,
            "the watched folder": self.remove_watched_folder,
            "a step is written": self.fill_disk,
        }[cell.phase](cell)

    def strike_learner(self, cell: Cell) -> Verdict:
        order, new = self.order(
            phase=cell.phase, blow=cell.blow.name.replace("KILL", "SIGKILL").replace("FREEZE", "SIGSTOP")
        )
        struck = self.learners.event("stopped" if cell.blow is Blow.FREEZE else "killed", order=order)
        began = time.monotonic()
        limit_s = SLACK_S + (HOSTS - 1) * DEADLINES["message_s"]  # a host asks the others, who may be asking it
        if cell.blow is Blow.FREEZE:
            limit_s += DEADLINES["silence_s"]
        self.await_rest(limit_s)
        seconds = time.monotonic() - began
        after = self.judge(self.old, new)
        assert cell.allows(after), f"{cell}: the hosts hold the {after} version"
        if cell.blow is Blow.FREEZE and cell.phase in RELEASED:
            good = self.good_update()
            os.kill(struck["process"], signal.SIGCONT)  # it wakes into a world that went on without it
            assert self.learners.event("failed", order=order)["error"] in ("UpdateAborted", "CommitIncomplete")
            assert self.judge(good, good) is After.OLD
        elif cell.blow is Blow.FREEZE:
            second, _ = self.order(phase=None, blow=None)
            refusal = self.learners.event("failed", order=second)
            assert "has a publisher already" in refusal["text"], refusal
            os.kill(struck["process"], signal.SIGKILL)
            self.learners.event("killed", order=order)
        self.good_update()
        return Verdict(cell=cell, after=after, seconds=seconds, limit_s=limit_s)

    def strike_host(self, cell: Cell) -> Verdict:
        wanted = {(f"p{index}", sample) for index in range(12) for sample in range(2)}
        stream = self.fleet.generate(
            [Prompt(id=f"p{index}", token_ids=(1, 2, index % 8)) for index in range(12)],
            SamplingParams(n=2, max_tokens=50, ignore_eos=True),
        )
        (process,) = [host.process for host in self.fleet.status().hosts if host.host_id == STRUCK]
        order, new = self.order(phase=cell.phase, blow="gate")
        self.learners.event("gate", order=order)
        os.kill(process, signal.SIGKILL if cell.blow is Blow.KILL else signal.SIGSTOP)
        began = time.monotonic()
        self.learners.tell(go=order)
        if cell.blow is Blow.HICCUP:
            time.sleep(DEADLINES["message_s"] / 5)
            os.kill(process, signal.SIGCONT)
        event = self.learners.event("published", "failed", order=order)
        published = event["event"] == "published"
        assert published or cell.blow is not Blow.HICCUP, event
        # Sent to all, the struck host may have taken the commit and answered before the blow fell.
        assert not published or cell.blow is Blow.HICCUP or cell.phase == "Commit sent", event
        assert not published or event["hosts"] == ALL, event
        learner_s = time.monotonic() - began
        assert learner_s < 3 * DEADLINES["message_s"] + SLACK_S, f"the learner took {learner_s} s to be told"

        answered: Counter[tuple[str, int]] = Counter()
        lost: set[tuple[str, int]] = set()
        dead: tuple[str, ...] = ()
        try:
            for completion in stream:
                answered[completion.prompt_id, completion.sample] += 1
        except HostDied as error:
            lost, dead = set(error.request_ids), error.host_ids
        assert set(dead) <= {STRUCK}
        assert set(answered) | lost == wanted, "a request was lost without a word"
        assert set(answered).isdisjoint(lost)
        assert set(answered.values()) == {1}, "a request was answered twice"

        limit_s = DEADLINES["answer_s"] + RUN_S
        self.await_whole(limit_s, other_than=None if cell.blow is Blow.HICCUP else process)
        seconds = time.monotonic() - began
        after = self.judge(self.old, new)
        assert cell.allows(after), f"{cell}: the hosts hold the {after} version"
        self.good_update()
        return Verdict(cell=cell, after=after, seconds=seconds, limit_s=limit_s)

    def remove_checkpoint(self, cell: Cell) -> Verdict:
        folder = Path(self.config.model)
        aside = folder.with_name("aside")
        (process,) = [host.process for host in self.fleet.status().hosts if host.host_id == STRUCK]
        folder.rename(aside)
        os.kill(process, signal.SIGKILL)
        began = time.monotonic()
        try:
            self.await_true(
                lambda: any("could not start" in incident.what for incident in self.fleet.status().incidents),
                RUN_S,
                "the failed start to be told",
            )
            assert [host.version for host in self.fleet.status().hosts].count(self.old) == HOSTS - 1
        finally:
            aside.rename(folder)
        limit_s = 2 * RUN_S
        self.await_whole(limit_s, other_than=process)
        seconds = time.monotonic() - began
        after = self.judge(self.old, self.old)
        self.good_update()
        return Verdict(cell=cell, after=after, seconds=seconds, limit_s=limit_s)

    def remove_watched_folder(self, cell: Cell) -> Verdict:
        folder = self.workspace / "steps"
        updates: list[PublishReport] = []
        errors: list[StepNotTaken] = []
        told = threading.Event()

        def on_error(error: StepNotTaken) -> None:
            errors.append(error)
            told.set()

        write_step(self.content.tensors(71), folder, run="disk", step=1)
        with FolderWatch(self.fleet.name, folder, poll_s=0.05, on_update=updates.append, on_error=on_error):
            self.await_true(lambda: len(updates) == 1, RUN_S, "the first step to be taken up")
            held = self.content.version("disk", 1, 71)
            shutil.rmtree(folder)
            began = time.monotonic()
            assert told.wait(RUN_S), "the loss of the folder was not told"
            seconds = time.monotonic() - began
            assert "cannot be listed" in str(errors[0]), errors
            after = self.judge(held, held)
            write_step(self.content.tensors(72), folder, run="disk", step=2)
            self.await_true(lambda: len(updates) == 2, RUN_S, "the second step to be taken up")
            back = self.content.version("disk", 2, 72)
            self.judge(back, back)
        shutil.rmtree(folder)
        self.good_update()
        return Verdict(cell=cell, after=after, seconds=seconds, limit_s=RUN_S)

    def fill_disk(self, cell: Cell) -> Verdict:
        """In a user namespace of its own a process may mount a disk as small as it likes."""
        folder = self.workspace / "small"
        folder.mkdir()
        began = time.monotonic()
        writer = Spoken("ordeal.full_disk", self.fleet.name, self.config.model, str(folder), prefix=("unshare", "-rm"))
        full = writer.event("full")
        seconds = time.monotonic() - began
        after = self.judge(self.old, self.old)
        assert "No space left on device" in full["text"], full
        assert full["left"] == [], "half of a step was left behind"
        assert full["updates"] == 0
        writer.tell(go=True)
        assert writer.event("written")["updates"] == 1
        new = self.content.version("disk", 2, 82)
        self.judge(new, new)
        writer.end()
        folder.rmdir()
        self.good_update()
        return Verdict(cell=cell, after=after, seconds=seconds, limit_s=RUN_S)

    def order(self, *, phase: str | None, blow: str | None) -> tuple[int, WeightVersion]:
        """Sends a learner off; returns its number and the version that it is to publish."""
        self._orders += 1
        seed = 1000 + self._orders
        run = f"run-{self._orders}"
        self.learners.tell(
            order=self._orders, fleet=self.fleet.name, run=run, seed=seed, step=1, phase=phase, blow=blow
        )
        return self._orders, self.content.version(run, 1, seed)

    def good_update(self) -> WeightVersion:
        """A new learner reaches every host."""
        order, version = self.order(phase=None, blow=None)
        event = self.learners.event("published", "failed", order=order)
        assert event["event"] == "published", event["text"]
        assert event["hosts"] == ALL, event
        assert self.judge(version, version) is After.OLD
        self.old = version
        return version

    def judge(self, old: WeightVersion, new: WeightVersion) -> After:
        """Old or new, the same on all hosts, and bit for bit what the label says."""
        found = self.fleet.verify()
        assert len(found) == HOSTS, found
        for host, (version, digest) in found.items():
            assert version is not None, f"{host} serves nothing"
            assert version.digest == digest, f"{host} says {version} and holds {digest}"
        (version,) = {version for version, _ in found.values()}
        assert version in (old, new), f"the hosts hold {version}, neither {old} nor {new}"
        return After.OLD if version == old else After.NEW

    def await_rest(self, within_s: float) -> None:
        """No host has an update under way."""
        self.await_true(
            lambda: not BUSY & {host.state for host in self.fleet.status().hosts}, within_s, "the hosts to settle"
        )

    def await_whole(self, within_s: float, *, other_than: int | None) -> None:
        """Every host serves the same version, the struck one in another process."""

        def whole() -> bool:
            status = self.fleet.status()
            return status.version is not None and other_than not in {host.process for host in status.hosts}

        self.await_true(whole, within_s, "every host to serve the same version again")

    def await_true(self, true: Callable[[], bool], within_s: float, awaited: str) -> None:
        ends_at = time.monotonic() + within_s
        while not true():
            assert time.monotonic() < ends_at, f"waited {within_s} s for {awaited}: {self.fleet.status()}"
            time.sleep(LOOK_S)
