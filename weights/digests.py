"""Digests: the digests of many tensors at once, in one column, so that none of them costs an object of its own."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from weights.digest import Digest

_MASK = (1 << 64) - 1
DIGEST_BYTES = 16


@dataclass(frozen=True, slots=True)
class Digests:
    """N digests in the order of a catalogue. ValueError for bytes that are no whole number of them.

    Legend: N tensors, 2 lanes.
    """

    packed: bytes
    """N times two little-endian 64-bit lanes, the first lane first."""

    def __post_init__(self) -> None:
        if len(self.packed) % DIGEST_BYTES:
            raise ValueError(f"digests take {DIGEST_BYTES} bytes each, got {len(self.packed)} bytes")

    def __len__(self) -> int:
        return len(self.packed) // DIGEST_BYTES

    def __getitem__(self, index: int) -> Digest:
        place = index * DIGEST_BYTES
        first, second = (int.from_bytes(self.packed[place + lane : place + lane + 8], "little") for lane in (0, 8))
        return Digest(first, second)

    @classmethod
    def of(cls, digests: Iterable[Digest]) -> "Digests":
        """Packs `digests`."""
        lanes = (lane for digest in digests for lane in (digest.first, digest.second))
        return cls(b"".join(lane.to_bytes(8, "little") for lane in lanes))

    @classmethod
    def of_lanes(cls, lanes_N2: Tensor) -> "Digests":
        """Packs int64 [N, 2], lanes as signed patterns, from whatever device."""
        return cls(lanes_N2.cpu().contiguous().numpy().tobytes())

    @property
    def lanes(self) -> Tensor:
        """int64 [N, 2], lanes as signed patterns, on the CPU; a copy."""
        if not self.packed:
            return torch.zeros(0, 2, dtype=torch.int64)
        return torch.frombuffer(bytearray(self.packed), dtype=torch.int64).view(-1, 2)

    @property
    def total(self) -> Digest:
        """The sum of all, which is the digest of the whole content."""
        first, second = self.lanes.sum(0).tolist()
        return Digest(first & _MASK, second & _MASK)

    def differing(self, other: "Digests") -> list[int]:
        """Places where two columns of the same length differ."""
        if self == other:
            return []
        return (self.lanes != other.lanes).any(1).nonzero().flatten().tolist()

    @property
    def hex(self) -> str:
        """As text, for a message."""
        return self.packed.hex()

    @classmethod
    def from_hex(cls, text: str) -> "Digests":
        """The inverse of `hex`. ValueError for anything else."""
        return cls(bytes.fromhex(text))
