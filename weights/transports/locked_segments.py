"""LockedSegments: a host's view of a publisher's segments, page-locked for its GPU."""

import os

from torch import Tensor

from weights.page_lock import Locker, page_locked
from weights.transports.segment import map_memory


class LockedSegments:
    """A publisher's segments, mapped and page-locked once, since it fills the same ones update after update.

    The memory stays while it is held here: sweep after each update, drop all when the publisher goes. Not for several
    threads.
    """

    def __init__(self, locker: Locker | None = None) -> None:
        self._locker = locker
        self._tensors: dict[tuple[int, int], Tensor] = {}
        self._used: set[tuple[int, int]] = set()

    def map(self, descriptor: int) -> Tensor:
        """The segment's bytes, flat uint8, as its publisher fills them: only to be read.

        Takes the descriptor over. MessageError if it is no sealed segment.
        """
        status = os.fstat(descriptor)
        identity = (status.st_dev, status.st_ino)  # nobody else's while its memory is held
        if identity in self._tensors:
            os.close(descriptor)
        else:
            self._tensors[identity] = page_locked(map_memory(descriptor, shared=True), self._locker)
        self._used.add(identity)
        return self._tensors[identity]

    def sweep(self) -> None:
        """Lets go of those that were not mapped since the last sweep: their publisher has taken others."""
        self._tensors = {identity: self._tensors[identity] for identity in self._used}
        self._used.clear()

    def drop(self) -> None:
        """Lets go of all; what somebody still reads stays locked until then."""
        self._tensors.clear()
        self._used.clear()
