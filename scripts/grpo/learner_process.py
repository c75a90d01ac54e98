"""The trainer's handle on the learner's process."""

import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from types import TracebackType
from typing import Self

from grpo.batch import Batch
from grpo.errors import LearnerDied, LearnerFailed
from grpo.messages import Failed, FromLearner
from rollout import DeadlineExceeded

SCRIPTS = Path(__file__).resolve().parent.parent
STOP_S = 10.0


class LearnerProcess:
    """A running learner; leaving the block ends it.

    Args:
        replays: whether it trains on the experts that the hosts chose.
        log: file that takes its output.
    """

    def __init__(self, *, family: str, checkpoint: Path, seed: int, log: Path, replays: bool = False) -> None:
        self._log = log
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "grpo.learner", f"--pipe={theirs.fileno()}", f"--family={family}"]
        command += [f"--checkpoint={checkpoint}", f"--seed={seed}", *(["--replay"] if replays else [])]
        # The checkout's root comes along for those who run the script without having installed the packages.
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parent), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        environment = os.environ | {"PYTHONPATH": path.rstrip(os.pathsep), "OMP_NUM_THREADS": "1"}
        with theirs, log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env=environment,
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def send(self, message: str | Batch) -> None:
        """The fleet's name, then batches.

        Raises:
            LearnerFailed: the learner met an error of its own.
            LearnerDied: nobody reads any more.
        """
        try:
            self._pipe.send(message)
        except BrokenPipeError:
            self.receive("the learner's last words", STOP_S)
            raise self._died() from None

    def receive(self, awaited: str, deadline_s: float) -> FromLearner | None:
        """The next message; None where none is there and the deadline is 0 (a mere look).

        Raises:
            LearnerFailed: the learner met an error of its own.
            LearnerDied: its process is gone.
            DeadlineExceeded: nothing came.
        """
        try:
            if not self._pipe.poll(deadline_s):
                if deadline_s > 0:
                    raise DeadlineExceeded(awaited, deadline_s)
                return None
            message: FromLearner = self._pipe.recv()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        if isinstance(message, Failed):
            raise LearnerFailed(message.text)
        return message

    def close(self) -> None:
        """Closes the pipe, which the learner takes as its end; kills it where it does not go."""
        self._pipe.close()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(STOP_S)

    def _died(self) -> LearnerDied:
        try:
            code: int | None = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        return LearnerDied(code, str(self._log))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
