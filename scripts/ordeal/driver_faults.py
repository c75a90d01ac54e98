"""The launching process is frozen and killed: its hosts go on without it, and end with it."""

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from grpo.checkpoint import write_checkpoint

from ordeal.arena import DEADLINES, SLACK_S, Verdict
from ordeal.processes import Spoken, await_gone, descendants
from ordeal.table import DRIVER_CELLS, After, Blow, Cell

GONE_S = 10.0
"""After a driver's death, for everything that it had started to end; hosts go at once, Ray's agents with the reaper."""
NAME = "driven"


def strike_driver(cell: Cell, workspace: Path) -> Verdict:
    """AssertionError where a promise was broken. Each launch sweeps what the one before it left."""
    assert cell in DRIVER_CELLS
    folder = workspace / "checkpoint"
    if not folder.exists():
        write_checkpoint("qwen3_moe", folder, seed=1)
    with launched(workspace) as driver, learners(folder) as learner:
        up = driver.event("up")
        (first,) = set(up["versions"])
        assert first.startswith("checkpoint@0")
        if cell.blow is Blow.HICCUP:
            return freeze(cell, driver, learner)
        if cell.phase == "generating":
            driver.tell(do="generate")
            driver.event("done")
        else:
            learner.tell(order=1, fleet=NAME, run="driven", seed=5, step=1, phase=cell.phase, blow="gate")
            learner.event("gate", order=1)
        processes = descendants(driver.popen.pid)
        assert set(up["processes"]) <= processes
        os.kill(driver.popen.pid, signal.SIGKILL)
        began = time.monotonic()
        await_gone(processes, GONE_S)
        seconds = time.monotonic() - began
        if cell.phase != "generating":
            learner.tell(go=1)
            told = learner.event("failed", order=1, within_s=4 * DEADLINES["message_s"])
            assert told["error"] in ("UpdateAborted", "CommitIncomplete"), told
    if cell.phase == "generating":  # the other cell pays for the next launch, which takes as long as all the rest
        return Verdict(cell=cell, after=After.OLD, seconds=seconds, limit_s=GONE_S)
    runtime = Path(os.environ["MOE_ROLLOUT_RUNTIME_DIR"])
    left = sorted(path.name for path in runtime.iterdir())
    assert left == [f"{NAME}.{rest}" for rest in ("fleet.json", "host-0.sock", "host-1.sock", "roster.json")], left
    os.rename(runtime / f"{NAME}.roster.json", runtime / "other.roster.json")  # as if the dead one had another name
    text = (runtime / "other.roster.json").read_text().replace(f'"{NAME}"', '"other"')
    (runtime / "other.roster.json").write_text(text)
    with launched(workspace) as driver:
        assert set(driver.event("up")["versions"]) == {first}
        assert not (runtime / "other.roster.json").exists(), "the next launch sweeps what the dead one left"
    assert list(runtime.iterdir()) == [], "an orderly end leaves nothing"
    return Verdict(cell=cell, after=After.OLD, seconds=seconds, limit_s=GONE_S)


def freeze(cell: Cell, driver: Spoken, learner: Spoken) -> Verdict:
    """Frozen for longer than it lets a host be silent: it blames none of them for that when it wakes."""
    os.kill(driver.popen.pid, signal.SIGSTOP)
    began = time.monotonic()
    learner.tell(order=1, fleet=NAME, run="driven", seed=5, step=1, phase=None, blow=None)
    published = learner.event("published", order=1)
    seconds = time.monotonic() - began
    assert published["hosts"] == ["host-0", "host-1"]
    time.sleep(max(DEADLINES["answer_s"] + SLACK_S - seconds, 0))
    os.kill(driver.popen.pid, signal.SIGCONT)
    time.sleep(2 * SLACK_S)  # it has looked at its hosts by then
    driver.tell(do="status")
    status = driver.event("done")
    assert status["incidents"] == [], status
    assert set(status["versions"]) == {f"driven@1:{published['digest'][:8]}"}
    return Verdict(cell=cell, after=After.NEW, seconds=seconds, limit_s=4 * DEADLINES["message_s"])


@contextmanager
def launched(workspace: Path) -> Iterator[Spoken]:
    driver = Spoken("ordeal.driver", str(workspace), NAME)
    try:
        yield driver
    finally:
        driver.end()


@contextmanager
def learners(folder: Path) -> Iterator[Spoken]:
    learner = Spoken("ordeal.learner", str(folder))
    try:
        learner.event("ready")
        yield learner
    finally:
        learner.end()
