"""A learner and a watch of its folder on a disk that is too small.

`python -m ordeal.full_disk FLEET CHECKPOINT FOLDER` mounts it.
Says what became of a step that does not fit; told to go on, has a larger disk and writes another one.
"""

import json
import subprocess
import sys
from pathlib import Path

from ordeal.content import Content
from rollout.watch import FolderWatch
from weights.disk import write_step
from weights.errors import FolderError
from weights.report import PublishReport


def say(**event: object) -> None:
    print(json.dumps(event), flush=True)


def main(fleet: str, checkpoint: str, folder: str) -> None:
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k,mode=700", "tmpfs", folder]
    subprocess.run(mount, check=True)
    content = Content(Path(checkpoint))
    updates: list[PublishReport] = []
    watch = FolderWatch(
        fleet, folder, on_update=updates.append, on_error=lambda error: say(event="told", text=str(error))
    )
    try:
        write_step(content.tensors(81), folder, run="disk", step=1)
    except FolderError as error:
        watch.look()
        left = [path.name for path in Path(folder).iterdir() if path.name.startswith("step-") or path.is_dir()]
        say(event="full", text=str(error), left=left, updates=len(updates))
    sys.stdin.readline()
    subprocess.run(["mount", "-o", "remount,size=64m", folder], check=True)
    write_step(content.tensors(82), folder, run="disk", step=2)
    watch.look()
    say(event="written", updates=len(updates))
    sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
