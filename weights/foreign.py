"""Tensors over memory that PyTorch did not allocate, on whatever device it lies.

Through DLPack rather than `__cuda_array_interface__`: the caller names the device. Memory of another GPU that was
opened on this one might otherwise count as the other's, and the first operation on it make a context there.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import from_dlpack

_DEVICE_TYPES = {"cpu": 1, "cuda": 2}
_UNSIGNED = 1
_CAPSULE = ctypes.c_char_p(b"dltensor")  # the capsule keeps the pointer, so this lives as long as the module


class _Managed(ctypes.Structure):
    """DLManagedTensor of DLPack 0.x, with room for one size and one stride behind it."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("dimensions", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
        ("owner", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


def borrow(address: int, size: int, device: torch.device) -> Tensor:
    """Flat uint8 over `size` bytes from `address` on, without a copy.

    The tensor does not own the memory, which must outlive it and its views. ValueError for a null address, no bytes, or
    a device without an index that is neither CPU nor CUDA.
    """
    if address <= 0 or size <= 0:
        raise ValueError(f"a tensor is borrowed over memory that is there, got {size} bytes at address {address}")
    if device.type not in _DEVICE_TYPES or (device.type == "cuda" and device.index is None):
        raise ValueError(f"memory is borrowed on cpu or on a cuda device with its index, got {device}")
    library = _c_library()
    place = library.malloc(ctypes.sizeof(_Managed))
    managed = _Managed.from_address(place)
    managed.data, managed.byte_offset = address, 0
    managed.device_type, managed.device_id = _DEVICE_TYPES[device.type], device.index or 0
    managed.dimensions, managed.size, managed.stride = 1, size, 1
    managed.code, managed.bits, managed.lanes = _UNSIGNED, 8, 1
    managed.shape, managed.strides = place + _Managed.size.offset, place + _Managed.stride.offset
    managed.owner = None
    # The description alone is freed with the tensor, and by C: a tensor may die after the interpreter.
    managed.deleter = ctypes.cast(library.free, ctypes.c_void_p).value
    capsule = ctypes.pythonapi.PyCapsule_New
    capsule.restype, capsule.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)
    tensor: Tensor = from_dlpack(capsule(place, _CAPSULE, None))
    return tensor


@lru_cache(maxsize=1)
def _c_library() -> Any:
    library = ctypes.CDLL(None)
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, (ctypes.c_size_t,)
    return library
