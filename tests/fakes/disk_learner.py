"""Learners in a process of their own that do not live to finish a step.

`python -m fakes.disk_learner stop FOLDER RUN STEP` writes the step's first file, says "waiting", and never goes on.
`python -m fakes.disk_learner die FOLDER RUN STEP` writes the step into FOLDER/0, FOLDER/1, ... and is killed before its
first, second, ... fsync, until one is not.
"""

import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from weights.disk import write_step


def tensors() -> Iterator[tuple[str, Tensor]]:
    """Three files of them, if a file is to hold 64 bytes."""
    for index in range(3):
        yield f"w{index}", torch.full((16,), float(index))


def stopping() -> Iterator[tuple[str, Tensor]]:
    for index, pair in enumerate(tensors()):
        if index == 2:
            print("waiting", flush=True)
            time.sleep(600)
        yield pair


def stop(folder: str, run: str, step: str) -> None:
    write_step(stopping(), folder, run=run, step=int(step), file_bytes=64)


def die(folder: str, run: str, step: str) -> None:
    really = os.fsync
    for death in range(100):
        child = os.fork()
        if child == 0:
            synced = 0

            def sync(descriptor: Any, death: int = death) -> None:
                nonlocal synced
                if synced == death:
                    os.kill(os.getpid(), signal.SIGKILL)
                synced += 1
                really(descriptor)

            os.fsync = sync  # type: ignore[assignment]
            write_step(tensors(), os.path.join(folder, str(death)), run=run, step=int(step), file_bytes=64)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return
        assert os.WTERMSIG(status) == signal.SIGKILL


if __name__ == "__main__":
    {"stop": stop, "die": die}[sys.argv[1]](*sys.argv[2:])
