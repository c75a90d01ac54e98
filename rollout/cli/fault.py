"""An error as one line: what a person reads on stderr in place of a stack trace."""

import torch

from rollout.errors import RolloutError
from weights.errors import WeightsError

FAULTS = (ValueError, RolloutError, WeightsError, OSError, MemoryError, torch.OutOfMemoryError)
"""What a command may end with: a caller's mistake, or the world's. Anything else is a bug and shows its trace."""

SHOWN_LINES = 3
"""Of an error that lists offenders, unless all are asked for."""
TRACEBACK = "Traceback (most recent call last):"


def one_line(error: BaseException) -> str:
    """Its text on one line, the first offenders of a long list, and how many more there are."""
    lines = described(error).splitlines()
    text, rest = lines[0], [line.strip() for line in lines[1:] if line.strip()]
    for line in rest[:SHOWN_LINES]:
        text = f"{text} {line}" if text.endswith((":", ";", ",")) else f"{text}; {line}"
    return text if len(rest) <= SHOWN_LINES else f"{text}; and {len(rest) - SHOWN_LINES} more (--verbose lists them)"


def described(error: BaseException) -> str:
    """The whole of what it says, in lines; of a host's traceback only the error itself."""
    if isinstance(error, OSError) and not isinstance(error, RolloutError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    text = str(error).strip() or type(error).__name__
    if TRACEBACK in text:
        before, _, trace = text.partition(TRACEBACK)
        text = f"{before.strip()} {trace.strip().splitlines()[-1].strip()}".strip()
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        text = f"out of memory: {text}; lower engine.kv_blocks, engine.max_running or engine.max_context"
    return text
