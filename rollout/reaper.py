"""Reaper: ends what a launcher's own Ray leaves when the launcher is killed.

Hosts end with their Ray at once; Ray's agents look for it another minute. Run as a script, this file is a small process
of its own that outlives the launcher by seconds: it is told which processes are the launcher's, and kills those that
are left when the launcher is gone without a word. It imports the standard library only.
"""

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.5
GRACE_S = 2.0
"""After the launcher's death, for its processes to go by themselves."""
FAREWELL = "farewell"


class Reaper:
    """The launcher's end."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, str(os.getpid())], stdin=subprocess.PIPE, start_new_session=True
        )

    def watch_descendants(self) -> None:
        """All processes below this one, as they are now, end with it."""
        self._tell(json.dumps([[process, _started(process)] for process in _descendants(os.getpid())]))

    def dismiss(self) -> None:
        """The launcher ends in good order and sees to its processes itself. Once more does nothing."""
        if self._process.poll() is None:
            self._tell(FAREWELL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()


def _descendants(process: int) -> set[int]:
    """Every process below this one, but the one that asks."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").iterdir():
        if path.name.isdigit():
            fields = _stat(int(path.name))
            if fields:
                children.setdefault(int(fields[1]), []).append(int(path.name))
    found: set[int] = set()
    new = [process]
    while new:
        below = children.get(new.pop(), [])
        found.update(below)
        new += below
    return found


def _started(process: int) -> str:
    """When it was started: with its id, what no other process has."""
    fields = _stat(process)
    return fields[19] if fields else ""


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty for a process that is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _main(launcher: int) -> None:
    told = b""
    while os.getppid() == launcher:  # a pipe alone is not enough: a fork of the launcher may hold its other end
        if select.select([0], [], [], LOOK_S)[0]:
            read = os.read(0, 1 << 16)
            if not read:
                break
            told += read
    lines = told.decode().splitlines()
    if not lines or lines[-1] == FAREWELL:
        return
    time.sleep(GRACE_S)
    for process, started in json.loads(lines[-1]):
        if process != os.getpid() and _started(process) == started:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


if __name__ == "__main__":
    _main(int(sys.argv[1]))
