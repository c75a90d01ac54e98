"""Work of weight updates on a GPU goes through a stream of its own, beside the engine's or the learner's."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch


@contextmanager
def aside(device: torch.device) -> Iterator[None]:
    """What is launched inside goes to the device's stream for weight updates; on a CPU nothing changes."""
    if device.type == "cpu":
        yield
        return
    with torch.cuda.device(device), torch.cuda.stream(_stream(device)):
        yield


def settled(device: torch.device) -> None:
    """Waits until everything launched on the device so far, by whomever in this process, has ended."""
    if device.type != "cpu":
        torch.cuda.synchronize(device)


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
