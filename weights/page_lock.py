"""Page-locks mapped memory, so that a device reads it where it is, at the speed of its bus.

Locking walks over every page, which takes about as long as reading it: worth it for memory that is read more than once.
What cannot be locked is read all the same, through a `PinnedRing`.
"""

import logging
import mmap
import weakref
from contextlib import suppress
from functools import cache
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

_LOG = logging.getLogger(__name__)
_PORTABLE = 1  # cudaHostRegisterPortable: locked for all devices


class Locker(Protocol):
    """Those functions of CUDA's runtime that lock pages, as `torch.cuda.cudart()` has them. 0 is success."""

    def cudaHostRegister(self, address: int, size: int, flags: int, /) -> int: ...  # noqa: N802 - CUDA's name
    def cudaHostUnregister(self, address: int, /) -> int: ...  # noqa: N802


def page_locked(mapping: mmap.mmap, locker: Locker | None = None) -> Tensor:
    """The mapping's bytes as flat uint8, page-locked if the machine allows it.

    They are unlocked once, right before they are unmapped: when the last view of the tensor dies, or the process ends.
    Whoever has launched copies from them waits for those first.

    Args:
        mapping: writable and shared (a private one would be copied page by page as it is locked). The tensor keeps it.
        locker: left out, CUDA's runtime; without a GPU nothing is locked.
    """
    array = np.frombuffer(mapping, dtype=np.uint8)
    data = torch.from_numpy(array)
    if locker is None:
        locker = torch.cuda.cudart() if torch.cuda.is_available() else None  # type: ignore[no-untyped-call]
    if locker is None:
        return data
    code = int(locker.cudaHostRegister(data.data_ptr(), data.numel(), _PORTABLE))
    if code:
        _say_once(f"mapped memory cannot be page-locked (CUDA error {code}) and is copied twice on its way to the GPU")
        _forget_last_error()
    else:
        # The array, not the tensor: it lives as long as any view of the bytes, and dies before the mapping does.
        weakref.finalize(array, locker.cudaHostUnregister, data.data_ptr())
    return data


@cache
def _say_once(text: str) -> None:
    _LOG.warning(text)


def _forget_last_error() -> None:
    """CUDA's runtime keeps a call's error, and PyTorch would raise it at its next launch, whosever that is."""
    if torch.cuda.is_available():
        with suppress(RuntimeError):
            torch.ones(1, device="cuda")
