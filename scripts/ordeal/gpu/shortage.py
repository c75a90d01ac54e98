"""Shortage: a device on which this process gets no memory any more, for a while."""

import torch
from torch import Tensor

from weights.aside import aside

_LARGEST, _SMALLEST = 1 << 24, 1 << 9


class Shortage:
    """Of one process on one device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._hogs: list[Tensor] = []

    def begin(self) -> None:
        """Every request for memory fails from now on, as PyTorch's do on a full device; on a CPU, only the caller's."""
        if self._device.type == "cpu":
            raise torch.OutOfMemoryError("no memory is left on the device")
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(0.0, self._device)
        with aside(self._device):  # PyTorch keeps what is free by stream
            self._take()
        self._take()

    def end(self) -> None:
        if self._device.type == "cpu":
            return
        self._hogs = []
        torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def _take(self) -> None:
        size = _LARGEST
        while size >= _SMALLEST:
            try:
                self._hogs.append(torch.empty(size, dtype=torch.uint8, device=self._device))
            except torch.OutOfMemoryError:
                size //= 2
