"""Broadcasts between CPUs, over TCP by gloo: what NCCL does between GPUs, wherever there are none."""

import time
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, ProcessGroupGloo, Work

from weights.errors import TransportError
from weights.wires.meeting import Meeting

_POLL_S = 0.001
_SLACK_S = 0.25  # later than the wire's deadline: gloo's own timeout ends a broadcast that the wire gave up


def open_gloo(meeting: Meeting, *, rank: int, size: int) -> "GlooChannel":
    """Meets the others and connects to every one of them. What `Meeting.arrive` raises, or TransportError."""
    store = meeting.arrive()
    group: Any = ProcessGroupGloo
    options = group._Options()
    options._devices = [group.create_device(hostname=meeting.own_address())]
    options._timeout = timedelta(seconds=meeting.left_s)
    try:
        return GlooChannel(group(PrefixStore("gloo", store), rank, size, options))
    except RuntimeError as error:
        if meeting.over:
            raise meeting.late() from error
        raise TransportError(f"rank {rank} of {size} cannot connect to the others by gloo: {error}") from error


class GlooChannel:
    """A process group of its own: the trainer's default one is never touched."""

    def __init__(self, group: Any) -> None:
        """group: a ProcessGroupGloo."""
        self.device = torch.device("cpu")
        self._group = group
        self._works: list[Work] = []

    def start(self, data: Tensor, root: int, deadline_s: float) -> "GlooTransfer":
        options = BroadcastOptions()
        options.rootRank, options.rootTensor = root, 0
        options.timeout = timedelta(seconds=deadline_s + _SLACK_S)
        try:
            work = self._group.broadcast([data], options)
        except RuntimeError as error:
            raise TransportError(f"gloo takes no broadcast any more: {error}") from error
        self._works = [known for known in self._works if not known.is_completed()] + [work]
        return GlooTransfer(work)

    def stop(self) -> None:
        self._group.abort()  # ends what is sent; what is received from a peer that is there ends at its timeout
        while not all(work.is_completed() for work in self._works):
            time.sleep(_POLL_S)


class GlooTransfer:
    """A broadcast in one of gloo's threads."""

    def __init__(self, work: Work) -> None:
        self._work = work

    def begun(self) -> bool:
        return True

    def done(self) -> bool:
        if not self._work.is_completed():
            return False
        try:
            self._work.wait()
        except RuntimeError as error:
            raise TransportError(f"a peer of the wire is gone, or does not answer: {error}") from error
        return True
