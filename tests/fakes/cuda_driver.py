"""The CUDA driver's functions over this machine's memory, as ctypes would find them, and a second process of fakes."""

import ctypes
from typing import Any

ERRORS = {
    1: (b"CUDA_ERROR_INVALID_VALUE", b"invalid argument"),
    2: (b"CUDA_ERROR_OUT_OF_MEMORY", b"out of memory"),
    101: (b"CUDA_ERROR_INVALID_DEVICE", b"invalid device ordinal"),
    201: (b"CUDA_ERROR_INVALID_CONTEXT", b"invalid device context"),
    217: (b"CUDA_ERROR_PEER_ACCESS_UNSUPPORTED", b"peer access is not supported between these two devices"),
}


class FakeMachine:
    """What all processes see: allocations, by their handles."""

    def __init__(self, room: int = 1 << 20) -> None:
        self.room = room
        self.exported: dict[bytes, tuple[int, int]] = {}


class FakeCuda:
    """One process's driver."""

    def __init__(self, machine: FakeMachine, *, devices: int = 2) -> None:
        self.machine = machine
        self.memory: dict[int, tuple[Any, int, int]] = {}
        """Address -> what keeps it, bytes, identity."""
        self.opened: list[int] = []
        self.current: list[int] = []
        self.retained: list[int] = []
        self.legacy = True
        self.open_code = 0
        self._devices = devices
        self._identities = 0
        self._mine: set[bytes] = set()

    def add(self, size: int) -> int:
        """Memory that some allocator made; its address."""
        kept = (ctypes.c_ubyte * size)()
        self._identities += 1
        self.memory[ctypes.addressof(kept)] = (kept, size, self._identities)
        return ctypes.addressof(kept)

    def replace(self, address: int) -> None:
        """Frees an allocation and makes another at its address."""
        kept, size, _ = self.memory[address]
        self._identities += 1
        self.memory[address] = (kept, size, self._identities)

    def cuInit(self, flags: Any) -> int:  # noqa: N802
        return 0

    def cuDeviceGet(self, ordinal: Any, index: Any) -> int:  # noqa: N802
        ordinal._obj.value = index.value
        return 0 if index.value < self._devices else 101

    def cuDevicePrimaryCtxRetain(self, context: Any, ordinal: Any) -> int:  # noqa: N802
        self.retained.append(ordinal.value)
        context._obj.value = 0xC000 + ordinal.value
        return 0

    def cuCtxPushCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.current.append(context.value - 0xC000)
        return 0

    def cuCtxPopCurrent_v2(self, context: Any) -> int:  # noqa: N802
        self.current.pop()
        return 0

    def cuMemGetAddressRange_v2(self, start: Any, size: Any, address: Any) -> int:  # noqa: N802
        found = self._around(address.value)
        if found is None:
            return 1
        start._obj.value, size._obj.value = found, self.memory[found][1]
        return 0

    def cuPointerGetAttribute(self, value: Any, attribute: Any, address: Any) -> int:  # noqa: N802
        found = self._around(address.value)
        if found is None:
            return 1
        value._obj.value = {7: self.memory[found][2], 10: int(self.legacy)}[attribute.value]
        return 0

    def cuIpcGetMemHandle(self, handle: Any, address: Any) -> int:  # noqa: N802
        if not self.legacy or address.value not in self.memory:
            return 1
        _, size, identity = self.memory[address.value]
        raw = b"%016x%048d" % (address.value, identity)
        ctypes.memmove(ctypes.addressof(handle._obj), raw, 64)
        self.machine.exported[raw] = (address.value, size)
        self._mine.add(raw)
        return 0

    def cuIpcOpenMemHandle_v2(self, address: Any, handle: Any, flags: Any) -> int:  # noqa: N802
        raw = bytes(handle)
        assert flags.value == 1
        assert self.current
        if self.open_code:
            return self.open_code
        if raw in self._mine:
            return 201
        if raw not in self.machine.exported:
            return 1
        address._obj.value, size = self.machine.exported[raw]
        self.memory[address._obj.value] = (None, size, 0)
        self.opened.append(address._obj.value)
        return 0

    def cuIpcCloseMemHandle(self, address: Any) -> int:  # noqa: N802
        self.opened.remove(address.value)
        return 0

    def cuMemAlloc_v2(self, address: Any, size: Any) -> int:  # noqa: N802
        if size.value > self.machine.room:
            return 2
        self.machine.room -= size.value
        address._obj.value = self.add(size.value)
        return 0

    def cuMemFree_v2(self, address: Any) -> int:  # noqa: N802
        self.machine.room += self.memory.pop(address.value)[1]
        return 0

    def cuMemGetInfo_v2(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value = self.machine.room
        return 0

    def cuGetErrorName(self, code: Any, text: Any) -> int:  # noqa: N802
        text._obj.value = ERRORS[code.value][0]
        return 0

    def cuGetErrorString(self, code: Any, text: Any) -> int:  # noqa: N802
        text._obj.value = ERRORS[code.value][1]
        return 0

    def _around(self, address: int) -> int | None:
        return next((start for start, (_, size, _) in self.memory.items() if start <= address < start + size), None)
