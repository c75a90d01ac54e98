"""Where the tensors of an update lie in flat memory: packed into buckets, by a pure function that both ends compute
alike, or where a learner has them.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from weights.catalogue import Catalogue
from weights.digest import BLOCK_BYTES

DEFAULT_BUCKET_BYTES = 256 << 20
ALIGNMENT = 256
"""Bytes: where a piece may start in a bucket; every dtype may be viewed there."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive bytes of one tensor inside one bucket, or another stretch of flat memory."""

    tensor: int
    """Its place in the catalogue."""
    tensor_offset: int
    """First byte in the tensor; a multiple of the digest's block."""
    bucket: int
    bucket_offset: int
    """First byte in the bucket; a multiple of ALIGNMENT where it was packed."""
    bytes: int


def check_bucket_bytes(bucket_bytes: int) -> None:
    """ValueError unless a bucket holds a whole number of digest blocks, at least one."""
    if bucket_bytes < BLOCK_BYTES or bucket_bytes % BLOCK_BYTES:
        raise ValueError(f"a bucket is a positive multiple of {BLOCK_BYTES} bytes, got {bucket_bytes}")


class Packer:
    """Places tensors one after the other, so that a learner may pack while it still gathers."""

    def __init__(self, bucket_bytes: int) -> None:
        check_bucket_bytes(bucket_bytes)
        self._bucket_bytes = bucket_bytes
        self._tensors = 0
        self._bucket = 0
        self._used = 0

    def place(self, size: int) -> tuple[Piece, ...]:
        """The pieces of the next tensor, of `size` bytes.

        None for an empty one; one where it fits into what is left of the bucket.
        """
        pieces = []
        offset = 0
        while offset < size:
            start = -(-self._used // ALIGNMENT) * ALIGNMENT
            room = self._bucket_bytes - start
            taken = min(size - offset, room)
            if taken < size - offset:
                taken -= taken % BLOCK_BYTES  # a cut falls between two blocks of the digest
            if taken <= 0:
                self._bucket, self._used = self._bucket + 1, 0
                continue
            pieces.append(Piece(self._tensors, offset, self._bucket, start, taken))
            self._used = start + taken
            offset += taken
        self._tensors += 1
        return tuple(pieces)


@dataclass(frozen=True, slots=True)
class Bucket:
    """The pieces of one bucket, in the order in which they lie."""

    pieces: tuple[Piece, ...]

    @property
    def bytes(self) -> int:
        """Bytes in use, from the bucket's first to its last piece's end."""
        return self.pieces[-1].bucket_offset + self.pieces[-1].bytes


def pack(catalogue: Catalogue, bucket_bytes: int) -> tuple[Bucket, ...]:
    """The buckets of an update. ValueError as `check_bucket_bytes`."""
    packer = Packer(bucket_bytes)
    return buckets(piece for tensor in catalogue.tensors for piece in packer.place(tensor.bytes))


def buckets(pieces: Iterable[Piece]) -> tuple[Bucket, ...]:
    """Groups a packer's pieces by bucket."""
    grouped: list[list[Piece]] = []
    for piece in pieces:
        if piece.bucket == len(grouped):
            grouped.append([])
        grouped[piece.bucket].append(piece)
    return tuple(Bucket(tuple(group)) for group in grouped)
