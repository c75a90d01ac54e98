"""Processes under test, spoken to in lines of JSON; none is ever waited for without a deadline."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent
PATIENCE_S = 90.0
LOOK_S = 0.02


class Spoken:
    """`python -m MODULE ARGUMENTS`, in a session of its own."""

    def __init__(self, module: str, *arguments: str, prefix: Iterable[str] = ()) -> None:
        self.popen = subprocess.Popen(
            [*prefix, sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=SCRIPTS.parent,
            env=os.environ | {"PYTHONPATH": f"{SCRIPTS}:{SCRIPTS.parent}", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        self._lines: queue.Queue[dict[str, Any]] = queue.Queue()
        self._kept: list[dict[str, Any]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def tell(self, **line: Any) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(line) + "\n")
        self.popen.stdin.flush()

    def event(self, *kinds: str, order: int | None = None, within_s: float = PATIENCE_S) -> dict[str, Any]:
        """The next event of these kinds (and this order); others are kept for who waits for them."""
        ends_at = time.monotonic() + within_s
        while True:
            for event in self._kept:
                if event["event"] in kinds and (order is None or event["order"] == order):
                    self._kept.remove(event)
                    return event
            try:
                self._kept.append(self._lines.get(timeout=max(ends_at - time.monotonic(), 0)))
            except queue.Empty:
                raise TimeoutError(f"waited {within_s} s for {kinds} of {order}; heard {self._kept}") from None

    def kill(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> None:
        """Its input ends, and so does it."""
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        try:
            self.popen.wait(PATIENCE_S)
        finally:
            self.popen.kill()
            self._reader.join(PATIENCE_S)
            self.popen.stdout.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            if line.startswith("{"):
                self._lines.put(json.loads(line))


def descendants(process: int) -> set[int]:
    """Every process below this one."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            parents.setdefault(parent(int(path.name)), []).append(int(path.name))
    found, new = set(), [process]
    while new:
        children = parents.get(new.pop(), [])
        found |= set(children)
        new += children
    return found


def parent(process: int) -> int:
    """0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
    except (FileNotFoundError, ProcessLookupError):
        return 0


def lives(process: int) -> bool:
    """Whether it runs, or could: a zombie does not."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def await_gone(processes: Iterable[int], within_s: float) -> None:
    """TimeoutError naming those that are left."""
    ends_at = time.monotonic() + within_s
    while left := [process for process in processes if lives(process)]:
        if time.monotonic() > ends_at:
            lines = [Path(f"/proc/{process}/cmdline").read_text().replace("\0", " ")[:100] for process in left]
            raise TimeoutError(f"still there after {within_s} s: {lines}")
        time.sleep(LOOK_S)
