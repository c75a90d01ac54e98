"""TensorFile: a safetensors file that is read with read(), not mapped.

A mapped file that somebody truncates, or whose disk goes away, kills its reader with SIGBUS; whoever reads weights
here is a trainer's own process, and it is to get an error. Hence this reader of the format (8 bytes of length, a JSON
header, the data), which takes what the library takes: entries, in any order, that cover the data exactly.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

from weights.catalogue import MAX_TENSOR_BYTES, TensorSpec
from weights.errors import FolderError, ManifestError

MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Names in a header -> dtypes: those that the wire knows."""

_KEPT_HEADERS = 64
"""Every step of a model has the same ones, and to parse tens of thousands of tensors takes as long as to read them."""

_READ_BYTES = 1 << 30  # Linux reads at most 2 GiB at once


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """Where a tensor lies in its file."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    start: int
    """First byte, from the file's beginning."""
    bytes: int


class TensorFile:
    """An open safetensors file, and a source for a `ParallelReader`. The descriptor stays the caller's."""

    def __init__(self, descriptor: int, path: str) -> None:
        """path: for messages. FolderError if the file is no safetensors file from its first to its last byte."""
        self._descriptor = descriptor
        self._path = path
        self.tensors: tuple[StoredTensor, ...] = self._header()
        """In the order in which they lie."""

    def read(self, stored: StoredTensor) -> Tensor:
        """The tensor, in memory of its own. FolderError if the disk does not give it."""
        data = torch.empty(stored.bytes, dtype=torch.uint8)
        self.fill([data], stored.start)
        return data.view(stored.dtype).reshape(stored.shape)

    def fill(self, places: Sequence[Tensor], start: int) -> None:
        """Reads consecutive bytes, from byte `start` of the file on, into `places`: flat uint8 on the CPU.

        At most 1024 places. FolderError if the disk does not give them.
        """
        views = [place.numpy().data for place in places if place.numel()]
        while views:
            done = self._read_into(views, start)
            start += done
            while views and done >= len(views[0]):
                done -= len(views.pop(0))
            if done:
                views[0] = views[0][done:]

    def locked(self, start: int, size: int) -> None:
        """None: a file is not page-locked memory."""

    def _header(self) -> tuple[StoredTensor, ...]:
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(self._bytes(8, 0), "little") if size >= 8 else 0
        if not 0 < length <= min(MAX_HEADER_BYTES, size - 8):
            raise self._broken(f"a header of {length} bytes in a file of {size}")
        try:
            found = _parsed(self._bytes(length, 8))
        except (ValueError, ManifestError) as error:
            raise self._broken(str(error)) from error
        end = found[-1].start + found[-1].bytes if found else 8 + length
        if end != size:
            raise self._broken(f"its tensors end at byte {end}, the file at {size}")
        return found

    def _bytes(self, count: int, offset: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        done = 0
        while done < count:
            done += self._read_into([view[done:]], offset + done)
        return bytes(data)

    def _read_into(self, views: Sequence[memoryview], offset: int) -> int:
        try:
            count = os.preadv(self._descriptor, views, offset)
        except OSError as error:
            raise FolderError(f"{self._path}: cannot be read: {error.strerror}") from error
        if not count:
            raise self._broken(f"it ended at byte {offset} while it was read")
        return count

    def _broken(self, reason: str) -> FolderError:
        return FolderError(f"{self._path}: not a whole safetensors file: {reason}")


@lru_cache(maxsize=_KEPT_HEADERS)
def _parsed(header: bytes) -> tuple[StoredTensor, ...]:
    """The tensors of a header, as they lie, without gaps. ValueError or ManifestError if it is none."""
    try:
        content = json.loads(header, object_pairs_hook=_distinct)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError("its header is not a JSON object")
    content.pop("__metadata__", None)
    end = 8 + len(header)
    found = sorted(
        (_stored(name, plain, end) for name, plain in content.items()), key=lambda stored: (stored.start, stored.bytes)
    )
    for stored in found:
        if stored.start != end:
            raise ValueError(f"{stored.name!r} begins at byte {stored.start}, expected {end}")
        end += stored.bytes
    return tuple(found)


def _stored(name: str, plain: object, data_start: int) -> StoredTensor:
    """One entry of a header. ValueError or ManifestError if it is none."""
    match plain:
        case {"dtype": str(dtype), "shape": [*sizes], "data_offsets": [int(start), int(stop)]}:
            if dtype not in SAFETENSORS_DTYPES:
                raise ValueError(f"{name!r:.120}: dtype {dtype!r:.40}; known are {', '.join(SAFETENSORS_DTYPES)}")
            shape = tuple(size for size in sizes if type(size) is int)
            # Torch multiplies the sizes of an empty tensor, too.
            if len(shape) != len(sizes) or prod(size for size in shape if size) > MAX_TENSOR_BYTES:
                raise ValueError(f"{name!r:.120}: its shape is none that a tensor has")
            entry = TensorSpec(name=name, shape=shape, dtype=SAFETENSORS_DTYPES[dtype])
            if start < 0 or stop - start != entry.bytes:
                raise ValueError(
                    f"{name!r:.120}: its offsets hold {stop - start} bytes, its shape and dtype take {entry.bytes}"
                )
            return StoredTensor(name=name, shape=shape, dtype=entry.dtype, start=data_start + start, bytes=entry.bytes)
    raise ValueError(f"{name!r:.120}: expected dtype, shape and data_offsets")


def _distinct(pairs: Iterable[tuple[str, object]]) -> dict[str, object]:
    found: dict[str, object] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{name!r:.120} stands there twice")
        found[name] = value
    return found
