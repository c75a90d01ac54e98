"""RollCall: the ranks of one learner keep in step while they gather what they share.

A collective that one rank enters and another does not hangs. So before every layer all ranks of the learner meet in
one small reduction, by which each learns whether all of them hold the same tensors, which rank publishes, and whether
that rank has called the gathering off. Everything else is the same on every rank by construction.

What bounds a wait: `deadline_s`, at every roll call and for every tensor that NCCL gathers; the process group's own
timeout where torch waits inside a call, as gloo does for every tensor and NCCL for its group's very first collective.
After either, the ranks' collectives no longer pair up, and on a GPU the stream is stuck behind one until NCCL's
watchdog ends the process at the group's timeout: as after any lost rank, the learner starts again.
"""

import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from weights.errors import DeadlineExceeded, TransportError, UpdateAborted

if TYPE_CHECKING:  # it takes a second to import, and who has a sharded tensor has it already
    from torch.distributed.device_mesh import DeviceMesh

_NEVER = -(1 << 62)
_SPIN_S = 0.002
_NAP_S = 0.0005


class RollCall:
    """One rank's place among the ranks of `mesh`; every rank calls the same methods in the same order."""

    def __init__(
        self,
        mesh: "DeviceMesh",
        *,
        publishing: bool,
        tensors: int,
        fingerprint: int,
        deadline_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """mesh: holds every rank of the learner. tensors, fingerprint: how many tensors this rank lists, and what they
        are, in [0, 2^62). deadline_s: how long the other ranks may take to come to one roll call."""
        self._groups = mesh.get_all_groups()
        self._device = torch.device(mesh.device_type)
        self._rank = dist.get_rank()
        self._publishing = publishing
        self._tensors = tensors
        self._fingerprint = fingerprint
        self._deadline_s = deadline_s
        self._clock = clock

    def wait(self, done: Callable[[], bool], what: str) -> None:
        """Until `done`. DeadlineExceeded, TransportError if asking fails."""
        began = self._clock()
        try:
            while not done():
                waited_s = self._clock() - began
                if waited_s > self._deadline_s:
                    raise DeadlineExceeded(
                        f"rank {self._rank} waited {waited_s:.1f} s at {what} for the learner's other ranks; every one "
                        f"of them calls take_part(), the publishing one gathered()"
                    )
                time.sleep(0 if waited_s < _SPIN_S else _NAP_S)
        except RuntimeError as error:
            raise TransportError(f"rank {self._rank}: {what} failed: {error}") from error

    def call(self, what: str, *, off: bool = False) -> None:
        """Waits for every rank. what: is to come, for messages. off: this rank, which publishes, gives up.

        The same error on every rank: ValueError if their tensors differ or not exactly one of them publishes,
        UpdateAborted if the publishing one gives up. DeadlineExceeded if a rank does not come, TransportError if it is
        gone.
        """
        place = self._rank if self._publishing else None
        words = [
            int(off),
            *_range(self._tensors),
            *_range(self._fingerprint),
            *(_range(place) if place is not None else (_NEVER, _NEVER)),
        ]
        gave_up, most, fewest, highest, lowest, last, first = self.largest(words, what)
        if (most, highest) != (-fewest, -lowest):
            raise ValueError(
                f"the learner's ranks hold different tensors: this one lists {self._tensors}, all of them between "
                f"{-fewest} and {most}, which must agree in name, shape, dtype and placement; gather the same module "
                f"on every rank"
            )
        if last == _NEVER:
            raise ValueError("every rank of the learner takes part and none publishes: one calls gathered()")
        if last != -first:
            raise ValueError(
                f"ranks {-first} and {last} both publish; one calls gathered(), every other rank take_part()"
            )
        if gave_up and not off:
            raise UpdateAborted(f"rank {last}, which publishes, gave up before {what}; its own error says why", {})

    def largest(self, words: Sequence[int], what: str) -> list[int]:
        """Of each of `words` (int64, as many on every rank) the largest that any rank has. Errors as in `call`."""
        words_N = torch.tensor(words, dtype=torch.int64, device=self._device)
        try:
            for group in self._groups:  # one for each dimension of the mesh: together they span it
                work = dist.all_reduce(words_N, dist.ReduceOp.MAX, group=group, async_op=True)
                assert work is not None, "a mesh's group holds the rank that has the mesh"
                self.wait(work.is_completed, f"the roll call before {what}")
                work.wait()
            return [int(word) for word in words_N.tolist()]
        except RuntimeError as error:
            raise TransportError(
                f"rank {self._rank}: another rank of the learner is gone before {what}: {error}"
            ) from error


def _range(word: int) -> tuple[int, int]:
    """What makes a largest and a smallest of one reduction."""
    return word, -word
