"""Digests of tensors: 128 bits over wire bytes, in blocks that may be hashed in any order and by anybody.

A tensor's wire bytes are cut into blocks of 4096 bytes (the last is padded with zeros: the length is bound by the
seed). With w the 1024 little-endian int32 words of a block and k fixed keys, a lane of a block is the NH hash (Black,
Halevi, Krawczyk, Krovetz, Rogaway: UMAC, CRYPTO 1999) of its words, paired half a block apart:

    nh = sum over i < 512 of int64(w[i] + k[i]) * int64(w[i + 512] + k[i + 512])      int32 sums and int64 sums wrap
    block = mix(nh + mix(seed + (index + 1) * GOLDEN))                                mix: the finaliser of splitmix64
    tensor = mix(seed) + sum of its blocks                                            mod 2^64

There are two lanes, each with its own keys, and a seed of two lanes: blake2b-128 of the tensor's name, shape and wire
dtype. Hence blocks may be hashed in any order and any partition, and still a byte that changes, an element that
moves, and a tensor that is renamed, reshaped or swapped with another all show. This finds accidents (64 bits against
any change that does not know the keys); it does not stop an adversary, and need not: whoever may write weights is
trusted with them.

Only int32 and int64 operations, so that every device gives the same value; about eight of them for eight bytes, in
one pass.

Legend: L lanes, B blocks, W words of a block.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from weights.dtypes import dtype_name, fits
from weights.split_mix import GOLDEN, mix, mix_tensor, signed

BLOCK_BYTES = 4096
"""Bytes that are hashed as one; a partition of a tensor's bytes is cut at multiples of it."""

_WORDS = BLOCK_BYTES // 4
_PAIRS = _WORDS // 2
_MASK = (1 << 64) - 1
_KEY_STREAM = b"moe-rollout weight digest, keys of lane %d"

_CPU_CHUNK_BLOCKS = 64  # 256 KiB: the words, their sums and their products stay in a core's cache
_GPU_CHUNK_BLOCKS = 1 << 14


@dataclass(frozen=True, slots=True)
class Digest:
    """128 bits as two lanes of 64; digests of disjoint content are added, lane by lane, mod 2^64."""

    first: int
    second: int

    def __post_init__(self) -> None:
        if not (0 <= self.first <= _MASK and 0 <= self.second <= _MASK):
            raise ValueError(f"a digest's lanes are in [0, 2^64), got {self.first} and {self.second}")

    def __add__(self, other: "Digest") -> "Digest":
        return Digest((self.first + other.first) & _MASK, (self.second + other.second) & _MASK)

    def __sub__(self, other: "Digest") -> "Digest":
        return Digest((self.first - other.first) & _MASK, (self.second - other.second) & _MASK)

    def __str__(self) -> str:
        return self.hex

    @property
    def hex(self) -> str:
        """32 lower-case hexadecimal digits, the first lane first."""
        return f"{self.first:016x}{self.second:016x}"

    @classmethod
    def from_hex(cls, text: str) -> "Digest":
        """The inverse of `hex`. ValueError for anything but its exact form."""
        if not re.fullmatch(r"[0-9a-f]{32}", text):
            raise ValueError(f"a digest is 32 lower-case hexadecimal digits, got {text!r}")
        return cls(int(text[:16], 16), int(text[16:], 16))

    @classmethod
    def total(cls, digests: Iterable["Digest"]) -> "Digest":
        """The sum of `digests`; zero for none."""
        first = second = 0
        for digest in digests:
            first += digest.first
            second += digest.second
        return cls(first & _MASK, second & _MASK)


ZERO = Digest(0, 0)
"""The digest of nothing at all."""


class TensorHash:
    """The hash function of one tensor, keyed by its name, shape and wire dtype.

    The tensor's digest is `header` plus the digests of all of its blocks.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        sizes = ",".join(str(int(size)) for size in shape)
        # The name goes last and the other two hold no newline, so no two tensors share this text.
        identity = f"{dtype_name(dtype)}\n{sizes}\n{name}".encode()
        seed = hashlib.blake2b(identity, digest_size=16).digest()
        self._seeds = (int.from_bytes(seed[:8], "little"), int.from_bytes(seed[8:], "little"))
        self.header = Digest(mix(self._seeds[0]), mix(self._seeds[1]))
        """What the tensor contributes besides its bytes: it makes even an empty tensor's name and shape count."""

    @property
    def seeds(self) -> tuple[int, int]:
        """The seeds of both lanes, as the signed patterns that torch takes."""
        return signed(self._seeds[0]), signed(self._seeds[1])

    def blocks(self, data: Tensor, first_block: int = 0) -> Digest:
        """Digest of consecutive blocks.

        `data`: flat uint8, from byte `first_block * 4096` of the tensor on; only the tensor's last block is
        short.
        """
        return _as_digest(self.lanes(data, first_block))

    def narrowed(self, tensor: Tensor, wire_dtype: torch.dtype) -> Digest:
        """Digest of all blocks of a contiguous `tensor` of a dtype that widens `wire_dtype`, as it was on the wire.

        An element that is not the widening of any wire element counts as a difference: the result then equals no wire
        tensor's digest.
        """
        flat = tensor.reshape(-1)
        step = _chunk_blocks(tensor.device) * BLOCK_BYTES // wire_dtype.itemsize
        total = torch.zeros(2, dtype=torch.int64, device=tensor.device)
        for start in range(0, flat.numel(), step):
            chunk = flat[start : start + step]
            narrow = narrowed(chunk, wire_dtype)
            strays = (narrow.to(chunk.dtype).view(torch.int32) != chunk.view(torch.int32)).sum()
            total += self.lanes(narrow.view(torch.uint8), start * wire_dtype.itemsize // BLOCK_BYTES)
            total += strays * signed(GOLDEN)
        return _as_digest(total)

    def lanes(self, data: Tensor, first_block: int) -> Tensor:
        """As `blocks`, not waited for: int64 [2], both lanes, on the data's device."""
        if data.dtype != torch.uint8 or data.dim() != 1:
            raise ValueError(f"blocks are hashed from flat uint8 bytes, got {data.dtype} of shape {tuple(data.shape)}")
        total = torch.zeros(2, dtype=torch.int64, device=data.device)
        keys = lane_keys(data.device)
        seeds_L1 = torch.tensor([[signed(seed)] for seed in self._seeds], dtype=torch.int64, device=data.device)
        step = _chunk_blocks(data.device)
        for start in range(0, data.numel(), step * BLOCK_BYTES):
            words_BW = _words(data[start : start + step * BLOCK_BYTES])
            first = first_block + start // BLOCK_BYTES + 1
            index_B = torch.arange(first, first + words_BW.shape[0], dtype=torch.int64, device=data.device)
            salts_LB = mix_tensor(index_B * signed(GOLDEN) + seeds_L1)
            for lane in range(2):
                sums_BW = words_BW + keys[lane]
                salts_LB[lane] += sums_BW[:, :_PAIRS].long().mul_(sums_BW[:, _PAIRS:]).sum(1)
            total += mix_tensor(salts_LB).sum(1)
        return total


def tensor_digest(name: str, tensor: Tensor, wire_dtype: torch.dtype | None = None) -> Digest:
    """Digest of a whole tensor as `name` on the wire, on whatever device it lies.

    wire_dtype: what it is on the wire, where the hosted dtype is a wider one; left out, the tensor's own. ValueError
    if the hosted dtype does not widen it exactly.
    """
    wire = tensor.dtype if wire_dtype is None else wire_dtype
    if not fits(wire, tensor.dtype):
        raise ValueError(f"{name}: {tensor.dtype} does not hold {wire} exactly, so its wire bytes cannot be told")
    tensor = tensor.detach().contiguous()
    function = TensorHash(name, tensor.shape, wire)
    if wire == tensor.dtype:
        return function.header + function.blocks(wire_bytes(tensor))
    return function.header + function.narrowed(tensor, wire)


def wire_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor as flat uint8, without a copy."""
    return tensor.reshape(-1).view(torch.uint8)


def narrowed(chunk: Tensor, wire_dtype: torch.dtype) -> Tensor:
    """Undoes a widening to float32.

    bfloat16 is its upper half, taken as bits: a rounding cast would rewrite the payloads of NaNs.
    """
    if wire_dtype == torch.bfloat16:
        return (chunk.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)
    return chunk.to(wire_dtype)


def _words(data: Tensor) -> Tensor:
    """Flat bytes as int32 [B, W].

    A view where it can be; a copy, padded with zeros, where the last block is short or the address is odd.
    """
    blocks = -(-data.numel() // BLOCK_BYTES)
    if data.numel() != blocks * BLOCK_BYTES or data.storage_offset() % 4 or data.data_ptr() % 4:
        padded = torch.zeros(blocks * BLOCK_BYTES, dtype=torch.uint8, device=data.device)
        padded[: data.numel()] = data
        data = padded
    return data.view(torch.int32).view(blocks, _WORDS)


def _chunk_blocks(device: torch.device) -> int:
    return _CPU_CHUNK_BLOCKS if device.type == "cpu" else _GPU_CHUNK_BLOCKS


@lru_cache(maxsize=16)
def lane_keys(device: torch.device) -> Tensor:
    """int32 [2, W] on `device`: the fixed keys of both lanes."""
    streams = b"".join(hashlib.shake_256(_KEY_STREAM % lane).digest(BLOCK_BYTES) for lane in range(2))
    words = [int.from_bytes(streams[i : i + 4], "little", signed=True) for i in range(0, len(streams), 4)]
    return torch.tensor(words, dtype=torch.int32).view(2, _WORDS).to(device)


def _as_digest(lanes: Tensor) -> Digest:
    first, second = lanes.tolist()
    return Digest(first & _MASK, second & _MASK)
