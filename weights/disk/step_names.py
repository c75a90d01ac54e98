"""What step folders are called, and which of them are the newest."""

import os
import re
from pathlib import Path

_NAME = re.compile(r"step-([0-9]{10,19})")
_MAX_STEP = (1 << 63) - 1


def step_name(step: int) -> str:
    """`step-0000000043`: names sort as their steps do, up to ten digits. ValueError for a step that no version has."""
    if not 0 <= step <= _MAX_STEP:
        raise ValueError(f"a step is in [0, 2^63), got {step}")
    return f"step-{step:010d}"


def parse_step_name(name: str) -> int | None:
    """The step that a folder's name says; None if it is not exactly what `step_name` gives."""
    found = _NAME.fullmatch(name)
    step = None if found is None else int(found[1])
    return step if step is not None and step <= _MAX_STEP and step_name(step) == name else None


def step_paths(folder: Path | str) -> tuple[Path, ...]:
    """All step folders in `folder`, by name alone, newest first. OSError if it cannot be listed."""
    named = [(step, name) for name in os.listdir(folder) if (step := parse_step_name(name)) is not None]
    return tuple(Path(folder) / name for _, name in sorted(named, reverse=True))


def latest_step(folder: Path | str) -> Path | None:
    """The step folder of the highest step, by name alone; None if there is none. OSError as `step_paths`."""
    return next(iter(step_paths(folder)), None)
