"""Catalogue: which tensors an update holds. It is agreed once per learner; what changes between updates is digests.

A large model has tens of thousands of tensors, and whatever costs Python time for each of them is paid here, once:
their identities as hash functions, their places in buckets, their places in hosted storage.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from weights.digest import TensorHash
from weights.digests import Digests
from weights.dtypes import WIRE_DTYPES, dtype_name
from weights.errors import ManifestError

MAX_NAME_CHARACTERS = 512
MAX_DIMENSIONS = 8
MAX_TENSOR_BYTES = 1 << 50


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """One tensor on the wire, apart from its content. ManifestError where a field is out of bounds."""

    name: str
    """Its Hugging Face checkpoint name."""
    shape: tuple[int, ...]
    dtype: torch.dtype
    """Its dtype on the wire: the learner's."""

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


class Catalogue:
    """The tensors of an update, in the order in which they lie in its buckets.

    Legend: N tensors, 2 lanes of a digest.
    """

    def __init__(self, tensors: Iterable[TensorSpec]) -> None:
        self.tensors: tuple[TensorSpec, ...] = tuple(tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Catalogue) and (self is other or self.tensors == other.tensors)

    def __hash__(self) -> int:
        return hash(self.id)

    def __repr__(self) -> str:
        return f"Catalogue({len(self)} tensors, {self.bytes} bytes, {self.id:.8})"

    @cached_property
    def id(self) -> str:
        """32 hexadecimal digits, of its content in its order: two ends that know it need not repeat the rest."""
        rows = "\n".join(f"{dtype_name(t.dtype)}\t{list(t.shape)}\t{t.name}" for t in self.tensors)
        return hashlib.blake2b(rows.encode(), digest_size=16).hexdigest()

    @cached_property
    def bytes(self) -> int:
        """The size of all tensors on the wire, without the gaps between them in buckets."""
        return sum(tensor.bytes for tensor in self.tensors)

    @cached_property
    def functions(self) -> tuple[TensorHash, ...]:
        """Each tensor's hash function."""
        return tuple(TensorHash(tensor.name, tensor.shape, tensor.dtype) for tensor in self.tensors)

    @cached_property
    def seeds(self) -> Tensor:
        """int64 [N, 2]: the seeds of all hash functions, on the CPU."""
        return torch.tensor([function.seeds for function in self.functions], dtype=torch.int64).view(-1, 2)

    @cached_property
    def headers(self) -> Tensor:
        """int64 [N, 2]: what each tensor contributes to its digest besides its bytes, on the CPU."""
        return Digests.of(function.header for function in self.functions).lanes

    @cached_property
    def places(self) -> dict[str, int]:
        """Name -> place. Of a name that comes twice, the last."""
        return {tensor.name: place for place, tensor in enumerate(self.tensors)}

    @property
    def repeated(self) -> dict[str, int]:
        """Names that come more than once, with how often."""
        counts = Counter(tensor.name for tensor in self.tensors)
        return {name: count for name, count in counts.items() if count > 1}

    def to_plain(self) -> list[list[object]]:
        """As lists that JSON can hold, a row per tensor; `from_plain` is its inverse."""
        return [[tensor.name, list(tensor.shape), dtype_name(tensor.dtype)] for tensor in self.tensors]

    @classmethod
    def from_plain(cls, plain: object) -> "Catalogue":
        """Checks everything that arrives from outside. ManifestError for anything that `to_plain` does not give."""
        if not isinstance(plain, Sequence) or isinstance(plain, str | bytes):
            raise ManifestError(f"a catalogue is a list of tensors, got {type(plain).__name__}")
        return cls(_spec(row, index) for index, row in enumerate(plain))


def _spec(row: object, index: int) -> TensorSpec:
    match row:
        case [str(name), [*shape], str(dtype)] if len(sizes := tuple(s for s in shape if type(s) is int)) == len(shape):
            if dtype not in WIRE_DTYPES:
                raise ManifestError(
                    f"tensor {index} ({name!r:.120}): dtype {dtype!r:.40} is unknown; "
                    f"the wire knows {', '.join(WIRE_DTYPES)}"
                )
            return TensorSpec(name=name, shape=sizes, dtype=WIRE_DTYPES[dtype])
    raise ManifestError(f"tensor {index}: expected [name, [sizes], dtype], got {row!r:.200}")
