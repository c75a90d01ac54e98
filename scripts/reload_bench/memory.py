"""How much more memory GPUs hold while an update runs, all processes together."""

import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

import torch

LOOK_S = 0.002


class Watch:
    """Looks at what is free, in a thread, between `begin` and `end`."""

    def __init__(self, devices: Sequence[int]) -> None:
        self._devices = sorted(set(devices))
        self._running = threading.Event()
        self._closing = threading.Event()
        self._before: dict[int, int] = {}
        self._least: dict[int, int] = {}
        self.extra_bytes: list[int] = []
        """Per update, the most that was taken beyond what was held when it began, of all devices together."""
        self._thread = threading.Thread(target=self._look, daemon=True)

    def begin(self) -> None:
        self._before = self._free()
        self._least = dict(self._before)
        self._running.set()

    def end(self) -> None:
        self._running.clear()
        after = self._free()
        least = {device: min(self._least[device], after[device]) for device in self._devices}
        self.extra_bytes.append(sum(self._before[device] - least[device] for device in self._devices))

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._running.set()
        self._thread.join(5)

    def _look(self) -> None:
        while not self._closing.wait(LOOK_S):
            self._running.wait()
            for device, free in self._free().items():
                self._least[device] = min(self._least.get(device, free), free)

    def _free(self) -> dict[int, int]:
        return {device: torch.cuda.mem_get_info(device)[0] for device in self._devices}
