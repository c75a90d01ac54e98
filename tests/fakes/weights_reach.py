"""A learner's memory and wires within this process: what a GPU's handles and NCCL are to real ones."""

from collections.abc import Mapping

import torch
from torch import Tensor

from weights.errors import TransportError
from weights.lease import Memory, WireTerms


class ProcessMemory:
    """Gives out and opens handles to ordinary memory: an Exporter and a Reach at once."""

    def __init__(self) -> None:
        self._shared: dict[str, Tensor] = {}
        self.opened: list[str] = []
        """Handles that were opened and not closed."""
        self.opens = 0
        self.hidden = False
        """No memory has a handle: the learner's allocator does not let it be shared."""
        self.unreachable = False
        """No handle can be opened: the learner's device is not visible."""

    def share(self, state: Mapping[str, Tensor]) -> None:
        """The storages of these tensors have handles from now on."""
        for tensor in state.values():
            storage = tensor.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            self._shared[f"{storage.data_ptr():x}"] = whole

    def around(self, address: int, device: torch.device) -> tuple[Memory, int]:
        if not self.hidden:
            for handle, whole in self._shared.items():
                if 0 <= address - whole.data_ptr() < whole.numel():
                    return Memory(handle, handle, whole.numel()), address - whole.data_ptr()
        raise TransportError("this memory has no handle")

    def buffer(self, size: int, device: torch.device) -> "ProcessBuffer":
        data = torch.zeros(size, dtype=torch.uint8)
        handle = f"{data.data_ptr():x}"
        self._shared[handle] = data
        return ProcessBuffer(Memory(handle, handle, size), data)

    def open(self, memory: Memory) -> "OpenedMemory":
        if self.unreachable or memory.handle not in self._shared:
            raise TransportError("the learner's device is not visible here")
        self.opens += 1
        self.opened.append(memory.handle)
        return OpenedMemory(self, memory.handle, self._shared[memory.handle])

    def join(self, terms: WireTerms, host: str) -> "HostEnd":
        raise TransportError("no wire here")


class ProcessBuffer:
    def __init__(self, memory: Memory, data: Tensor) -> None:
        self.memory = memory
        self.data = data

    def close(self) -> None:
        """Nothing to do."""


class OpenedMemory:
    def __init__(self, owner: ProcessMemory, handle: str, data: Tensor) -> None:
        self._owner = owner
        self._handle = handle
        self.data = data

    def close(self) -> None:
        self._owner.opened.remove(self._handle)


class HostEnd:
    """Of a wire within one thread: it takes what the learner last sent."""
