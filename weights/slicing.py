"""Cuts what is to be read from one source into slices: a pure function, which `parallel_reader.py` carries out."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from weights.digest import BLOCK_BYTES

MAX_PARTS = 512
"""Tensors of which a slice may hold bytes: Linux scatters one read over at most 1024 places."""


@dataclass(frozen=True, slots=True)
class Part:
    """Consecutive bytes of one tensor."""

    tensor: int
    """Its place among the extents."""
    offset: int
    """First byte in the tensor; a multiple of the digest's block."""
    bytes: int


@dataclass(frozen=True, slots=True)
class Slice:
    """Consecutive bytes of a source, read at once."""

    start: int
    """First byte in the source."""
    bytes: int
    parts: tuple[Part, ...]
    """What they are, one behind the other, without gaps."""


def cut(extents: Sequence[tuple[int, int]], slice_bytes: int) -> Iterator[Slice]:
    """The slices that cover all `extents`, in the order in which they lie.

    Args:
        extents: of each tensor, its first byte in the source and how many it has.
        slice_bytes: of a slice at most.

    Raises:
        ValueError: a slice that holds no block.
    """
    if slice_bytes < BLOCK_BYTES:
        raise ValueError(f"a slice holds at least {BLOCK_BYTES} bytes, got {slice_bytes}")
    parts: list[Part] = []
    start = end = 0
    for tensor in sorted(range(len(extents)), key=extents.__getitem__):
        first, size = extents[tensor]
        offset = 0
        while offset < size:
            if parts and (first + offset != end or len(parts) == MAX_PARTS):
                yield Slice(start, end - start, tuple(parts))
                parts = []
            if not parts:
                start = end = first + offset
            taken = min(size - offset, slice_bytes - (end - start))
            if taken < size - offset:
                taken -= taken % BLOCK_BYTES  # so that elements stay whole, and places aligned
            if taken:
                parts.append(Part(tensor, offset, taken))
                offset, end = offset + taken, end + taken
            if offset < size:
                yield Slice(start, end - start, tuple(parts))
                parts = []
    if parts:
        yield Slice(start, end - start, tuple(parts))
