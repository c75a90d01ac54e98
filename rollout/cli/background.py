"""A launcher in the background: the same command in a session of its own, with a log file in place of a terminal."""

import os
import subprocess
import sys
import time
from pathlib import Path

from rollout.cli.terminal import say
from rollout.config import RolloutConfig
from rollout.errors import DeadlineExceeded, RolloutError
from rollout.whereabouts import Whereabouts
from weights.rendezvous import runtime_directory

LOOK_S = 0.2


def launch_in_background(config_file: str, config: RolloutConfig) -> int:
    """Returns when the hosts are up.

    Raises:
        RolloutError: the launcher ended; carries its last words.
        DeadlineExceeded: the hosts were not up in time; the launcher was ended.
    """
    log = runtime_directory() / f"{config.name}.log"
    command = [sys.executable, "-m", "rollout.cli", "launch", config_file]
    command += [] if config.metrics_port is None else ["--metrics-port", str(config.metrics_port)]
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    until = time.monotonic() + config.deadlines.start_s + config.deadlines.stop_s
    try:
        while not _is_up(config.name, launcher.pid):
            if launcher.poll() is not None:
                raise RolloutError(f"the launcher ended with status {launcher.returncode}: {_last_words(log)}")
            if time.monotonic() > until:
                raise DeadlineExceeded(f"the hosts of {config.name} (see {log})", config.deadlines.start_s)
            time.sleep(LOOK_S)
    except BaseException:
        launcher.terminate()
        raise
    say(f"fleet {config.name}: up in the background, process {launcher.pid}, log {log}")
    say(f"end it with: kill {launcher.pid}")
    return 0


def _is_up(name: str, launcher: int) -> bool:
    found = Whereabouts.read(name)
    return found is not None and found.launcher == launcher


def _last_words(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return lines[-1].removeprefix("moe-rollout launch: ") if lines else f"it said nothing, see {os.fspath(log)}"
