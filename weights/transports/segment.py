"""Segments of shared memory without a name: a memfd, whose descriptor travels to the hosts.

When the last process that holds one dies, however it dies, the memory is gone: nothing is left to clean up.
"""

import fcntl
import mmap
import os

import torch
from torch import Tensor

from weights.errors import MessageError
from weights.page_lock import page_locked

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_MAP_NORESERVE = 0x4000  # <asm-generic/mman.h>; the mmap module names it from Python 3.13 on


class SharedSegment:
    """The publisher's end, which is writable.

    Nobody can change its size any more, so that no host is ever killed by a read past its end.
    """

    def __init__(self, size: int) -> None:
        self.descriptor = os.memfd_create("moe-rollout-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(self.descriptor, size)
        fcntl.fcntl(self.descriptor, fcntl.F_ADD_SEALS, _SEALS)
        self._mapping: mmap.mmap | None = mmap.mmap(self.descriptor, size)
        self.data = torch.frombuffer(self._mapping, dtype=torch.uint8)
        """The mapping lives as long as this tensor or a view of it does."""

    def lock(self) -> None:
        if self._mapping is not None:
            self.data, self._mapping = page_locked(self._mapping), None

    def close(self) -> None:
        os.close(self.descriptor)
        self.data, self._mapping = torch.empty(0, dtype=torch.uint8), None


def map_segment(descriptor: int) -> Tensor:
    """The host's end: the segment's bytes, flat uint8.

    Takes the descriptor over. MessageError if it is no sealed segment.
    """
    return torch.frombuffer(map_memory(descriptor), dtype=torch.uint8)


def map_memory(descriptor: int, *, shared: bool = False) -> mmap.mmap:
    """The host's mapping of a segment.

    Takes the descriptor over. MessageError if it is no sealed segment.

    shared: the publisher's own pages, for page-locking, which would copy private ones; nobody may write to them.
    """
    try:
        try:
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
        except OSError as error:
            raise MessageError(f"a segment is a memfd, got another file: {error}") from error
        size = os.fstat(descriptor).st_size
        if seals & _SEALS != _SEALS or not size:
            raise MessageError(
                f"a segment is sealed against shrinking and not empty, got seals {seals:#x}, {size} bytes"
            )
        # Private: writable for torch's sake, and nothing that this process does can reach the others' pages.
        # Nobody writes, so no page is ever copied and none need be reserved.
        flags = mmap.MAP_SHARED if shared else mmap.MAP_PRIVATE | _MAP_NORESERVE
        return mmap.mmap(descriptor, size, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(descriptor)
