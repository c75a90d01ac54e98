"""Manifest: what an update holds. Every tensor's wire name, shape, dtype and digest."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch

from weights.digest import Digest
from weights.dtypes import WIRE_DTYPES, dtype_name
from weights.errors import ManifestError

MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 8
MAX_TENSOR_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor of an update. ManifestError where a field is out of bounds."""

    name: str
    """Its Hugging Face checkpoint name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Its dtype on the wire: the learner's."""
    digest: Digest
    """`tensor_digest` of it."""

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= MAX_NAME_CHARACTERS or not self.name.isprintable():
            raise ManifestError(
                f"a tensor's name is 1 to {MAX_NAME_CHARACTERS} printable characters, got {self.name!r:.120}"
            )
        if self.dtype not in WIRE_DTYPES.values():
            raise ManifestError(f"{self.name}: {self.dtype} cannot be sent; the wire knows {', '.join(WIRE_DTYPES)}")
        if len(self.shape) > MAX_DIMENSIONS or any(size < 0 for size in self.shape) or self.bytes > MAX_TENSOR_BYTES:
            raise ManifestError(
                f"{self.name}: at most {MAX_DIMENSIONS} dimensions, none negative, and 2^50 bytes, "
                f"got shape {self.shape!s:.120}"
            )

    @property
    def bytes(self) -> int:
        """Its size on the wire."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Manifest:
    """The tensors of an update, in the order in which they lie in its buckets."""

    entries: tuple[TensorEntry, ...]

    @cached_property
    def digest(self) -> Digest:
        """The sum of its tensors' digests: the same in whatever order they come."""
        return Digest.total(entry.digest for entry in self.entries)

    @cached_property
    def bytes(self) -> int:
        """The size of all tensors on the wire, without the gaps between them in buckets."""
        return sum(entry.bytes for entry in self.entries)

    def to_plain(self) -> list[list[object]]:
        """As lists that JSON can hold; `from_plain` is its inverse. A row per tensor: it may have tens of thousands."""
        return [[entry.name, list(entry.shape), dtype_name(entry.dtype), entry.digest.hex] for entry in self.entries]

    @classmethod
    def from_plain(cls, plain: object) -> "Manifest":
        """Checks everything that arrives from outside. ManifestError for anything that `to_plain` does not give."""
        if not isinstance(plain, Sequence) or isinstance(plain, str | bytes):
            raise ManifestError(f"a manifest is a list of tensors, got {type(plain).__name__}")
        return cls(tuple(_entry(row, index) for index, row in enumerate(plain)))


def _entry(row: object, index: int) -> TensorEntry:
    match row:
        case [str(name), [*shape], str(dtype), str(digest)] if len(
            sizes := tuple(s for s in shape if type(s) is int)
        ) == len(shape):
            if dtype not in WIRE_DTYPES:
                raise ManifestError(
                    f"tensor {index} ({name!r:.120}): dtype {dtype!r:.40} is unknown; "
                    f"the wire knows {', '.join(WIRE_DTYPES)}"
                )
            try:
                content = Digest.from_hex(digest)
            except ValueError as error:
                raise ManifestError(f"tensor {index} ({name!r:.120}): {error}") from error
            return TensorEntry(name=name, shape=sizes, dtype=WIRE_DTYPES[dtype], digest=content)
    raise ManifestError(f"tensor {index}: expected [name, [sizes], dtype, digest], got {row!r:.200}")
