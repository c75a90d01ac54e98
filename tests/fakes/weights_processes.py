"""Python processes that tests start, speak to in lines, and kill."""

import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


class Process:
    """One whose lines are read without ever waiting for good."""

    def __init__(self, *arguments: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def line(self) -> str:
        return self._lines.get(timeout=PATIENCE_S)

    def write(self, line: str) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(line + "\n")
        self.popen.stdin.flush()

    def freeze(self) -> None:
        """Returns when all of its threads have stopped, which the signal alone does not say."""
        self.popen.send_signal(signal.SIGSTOP)
        os.waitpid(self.popen.pid, os.WUNTRACED)

    def end(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()
        self._reader.join()
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.close()
        self.popen.stdout.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(line.strip())


class HostProcess(Process):
    """`fakes.weights_host`."""

    def __init__(self, fleet: str, host: str, silence_s: float, transport: str = "shared_memory") -> None:
        super().__init__("fakes.weights_host", fleet, host, str(silence_s), transport)
        self.host = host

    def event(self, kind: str) -> dict[str, Any]:
        """The next event of a kind; others before it are passed over."""
        while True:
            event: dict[str, Any] = json.loads(self.line())
            if event["event"] == kind:
                return event

    def describe(self, *seeds: int) -> dict[str, Any]:
        self.write(json.dumps({"seeds": seeds}))
        return self.event("described")


def assert_all(fleet: Mapping[str, HostProcess], *, serve: str, hold: int) -> None:
    for process in fleet.values():
        found = process.describe(hold)
        assert (found["state"], found["serves"], found["holds"]) == ("idle", serve, [hold])


def await_settled(fleet: Mapping[str, HostProcess]) -> None:
    """Asks hosts that have an update under way how they stand until they have ended it."""
    ends_at = time.monotonic() + PATIENCE_S
    while any(process.describe()["state"] in ("offered", "staged", "committing") for process in fleet.values()):
        assert time.monotonic() < ends_at
        time.sleep(0.02)
