# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Digests of thousands of spans in a launch, at the memory's speed: weights.digest has the definition.

A warp walks one unit of a span. It holds the keys of both lanes in registers (64 of each thread's), takes 4 KiB blocks
in 16-byte vectors, a few at once, and reduces each over its 32 threads, so that nothing is shared between warps but the
sums in the end: atomic additions mod 2^64, which give the same value in any order.

Where the memory does not start at a multiple of 16 bytes, and in a span's short last block, words are put together from
single bytes, each of them read only if it belongs to the span.

Legend: N tensors, R rows of the table, U units, T blocks at once, W words of half a block.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from weights.digest import BLOCK_BYTES, lane_keys
from weights.kernel_device import check_device, device_of
from weights.kernel_forms import narrowed
from weights.spans import VECTOR_BYTES, Form, Spans, units
from weights.split_mix import FIRST_FACTOR, GOLDEN, SECOND_FACTOR

_COLUMNS = tl.constexpr(5)  # of the table: address, wire bytes, tensor, first block, first unit
_BLOCK_BYTES = tl.constexpr(BLOCK_BYTES)
_WORDS = tl.constexpr(BLOCK_BYTES // 8)  # in each half of a block
_GOLDEN = tl.constexpr(GOLDEN)
_FIRST = tl.constexpr(FIRST_FACTOR)
_SECOND = tl.constexpr(SECOND_FACTOR)


@dataclass(frozen=True, slots=True)
class DigestTile:
    """How the work is cut. Every choice gives the same digests."""

    blocks: int = 1
    """4 KiB blocks that a program loads at once; a power of two."""
    unit_blocks: int = 64
    """Blocks that a program walks."""
    warps: int = 1


DEFAULT_TILE = DigestTile()
_BYTEWISE_TILE = DigestTile(blocks=1, unit_blocks=8, warps=4)


@triton.jit
def _mix(z):
    """The finaliser of splitmix64, on uint64."""
    z = (z ^ (z >> 30)) * _FIRST
    z = (z ^ (z >> 27)) * _SECOND
    return z ^ (z >> 31)


@triton.jit
def _word(low, high, FORM: tl.constexpr):
    """(wire word, strays) of two neighbouring float32 given as their int32 bits."""
    low_bits, low_stray = narrowed(low, FORM)
    high_bits, high_stray = narrowed(high, FORM)
    return low_bits | (high_bits << 16), low_stray + high_stray


@triton.jit
def _vector_words(address, offsets, FORM: tl.constexpr):
    """(words, strays) at word `offsets` from an address at a multiple of 16 bytes."""
    if FORM == 0:
        words = tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.int32)), 16) + offsets)
        strays = tl.zeros_like(words)
    else:
        pairs = tl.load(tl.multiple_of(address.to(tl.pointer_type(tl.int64)), 16) + offsets)
        words, strays = _word(pairs.to(tl.int32), (pairs >> 32).to(tl.int32), FORM)
    return words, strays


@triton.jit
def _int32_of_bytes(pointer, offsets, limit):
    """The little-endian int32 at byte `offsets` of any address; bytes from `limit` on are not read and count as 0."""
    value = tl.zeros_like(offsets)
    for byte in tl.static_range(4):
        at = offsets + byte
        value |= tl.load(pointer + at, mask=at < limit, other=0).to(tl.int32) << (8 * byte)
    return value


@triton.jit
def _byte_words(address, offsets, held_bytes, FORM: tl.constexpr):
    """(words, strays) at word `offsets` from any address, of which `held_bytes` may be read."""
    pointer = address.to(tl.pointer_type(tl.uint8))
    if FORM == 0:
        words = _int32_of_bytes(pointer, offsets * 4, held_bytes)
        strays = tl.zeros_like(words)
    else:
        low = _int32_of_bytes(pointer, offsets * 8, held_bytes)
        high = _int32_of_bytes(pointer, offsets * 8 + 4, held_bytes)
        words, strays = _word(low, high, FORM)
    return words, strays


@triton.jit
def _lane(front, back, front_keys, back_keys, seed, index):
    """uint64 [T]: one lane of T blocks, from the words [T, W] of their halves and their index in the tensor [T]."""
    products = (front + front_keys).to(tl.int64) * (back + back_keys).to(tl.int64)
    salt = _mix(seed + (index + 1).to(tl.uint64) * _GOLDEN)
    return _mix(tl.sum(products, axis=1).to(tl.uint64) + salt)


@triton.jit
def _digest_kernel(
    table_ptr, rows_ptr, keys_ptr, seeds_ptr, sums_ptr,
    FORM: tl.constexpr, IS_ALIGNED: tl.constexpr,
    BLOCKS: tl.constexpr, UNIT_BLOCKS: tl.constexpr,
):  # fmt: skip
    unit = tl.program_id(0)
    row_ptr = table_ptr + tl.load(rows_ptr + unit).to(tl.int64) * _COLUMNS
    tensor = tl.load(row_ptr + 2)
    start = (unit - tl.load(row_ptr + 4)) * UNIT_BLOCKS  # in the span, in blocks
    index = tl.load(row_ptr + 3) + start  # in the tensor
    wire_bytes = tl.minimum(tl.load(row_ptr + 1) - start * _BLOCK_BYTES, UNIT_BLOCKS * _BLOCK_BYTES).to(tl.int32)
    SCALE: tl.constexpr = 1 if FORM == 0 else 2
    address = tl.load(row_ptr) + start * (_BLOCK_BYTES * SCALE)

    w = tl.arange(0, _WORDS)[None, :]
    first_front, first_back = tl.load(keys_ptr + w), tl.load(keys_ptr + _WORDS + w)
    second_front, second_back = tl.load(keys_ptr + 2 * _WORDS + w), tl.load(keys_ptr + 3 * _WORDS + w)
    first_seed = tl.load(seeds_ptr + 2 * tensor).to(tl.uint64)
    second_seed = tl.load(seeds_ptr + 2 * tensor + 1).to(tl.uint64)

    t = tl.arange(0, BLOCKS)
    first_T = tl.zeros([BLOCKS], tl.uint64)
    second_T = tl.zeros([BLOCKS], tl.uint64)
    strays_T = tl.zeros([BLOCKS], tl.int32)
    blocks = (wire_bytes + (_BLOCK_BYTES - 1)) // _BLOCK_BYTES
    done = tl.zeros([], tl.int32)
    while done < blocks:
        # Past the last block the last is taken again, and not counted: masked loads would cost more.
        at = tl.minimum(done + t, blocks - 1)
        is_in = done + t < blocks
        offsets = at[:, None] * (2 * _WORDS) + w
        if IS_ALIGNED:
            front, front_strays = _vector_words(address, offsets, FORM)
            back, back_strays = _vector_words(address, offsets + _WORDS, FORM)
        else:
            front, front_strays = _byte_words(address, offsets, wire_bytes * SCALE, FORM)
            back, back_strays = _byte_words(address, offsets + _WORDS, wire_bytes * SCALE, FORM)
        first_T += tl.where(is_in, _lane(front, back, first_front, first_back, first_seed, index + at), 0)
        second_T += tl.where(is_in, _lane(front, back, second_front, second_back, second_seed, index + at), 0)
        if FORM != 0:
            strays_T += tl.where(is_in, tl.sum(front_strays + back_strays, axis=1), 0)
        done += BLOCKS
    first = tl.sum(first_T, axis=0)
    second = tl.sum(second_T, axis=0)
    if FORM != 0:
        strays = tl.sum(strays_T, axis=0)
        first += strays.to(tl.uint64) * _GOLDEN
        second += strays.to(tl.uint64) * _GOLDEN
    tl.atomic_add(sums_ptr + 2 * tensor, first.to(tl.int64), sem="relaxed")
    tl.atomic_add(sums_ptr + 2 * tensor + 1, second.to(tl.int64), sem="relaxed")


def tile_for(form: Form, is_aligned: bool, tile: DigestTile) -> DigestTile:
    """How the spans of a form are cut, given the tile that serves aligned memory of the wire's own dtype."""
    if not is_aligned:
        return _BYTEWISE_TILE
    if form is Form.SAME:
        return tile
    return replace(tile, blocks=max(1, tile.blocks // 2))  # a block takes twice the registers


@dataclass(frozen=True, slots=True)
class _Launch:
    """The rows that one launch serves."""

    form: int
    is_aligned: bool
    """Vectors may be loaded, and every row is whole blocks."""
    table_RC: Tensor
    """int64 [R, 5]: address, wire bytes, tensor, first block, first unit."""
    rows_U: Tensor
    """int32 [U]: the row of every unit."""
    tile: DigestTile


class DigestTable:
    """Spans in a table on their device, hashed as often as their content changes. The addresses must stay valid."""

    def __init__(self, spans: Spans, *, tensors: int, device: torch.device, tile: DigestTile = DEFAULT_TILE) -> None:
        """tensors: N, how many digests there are; `spans.tensor` is below it. device: where the spans' memory lies.

        Tensors without spans have the digest 0. ValueError for a device without the kernel.
        """
        check_device(device)
        outside = (spans.tensor >= tensors).nonzero().flatten().tolist()
        if outside:
            raise ValueError(f"spans belong to one of {tensors} tensors, rows {outside} to others")
        self.tensors = tensors
        self._device = device
        self._keys = lane_keys(device)
        self._launches = [
            launch
            for form in Form
            for is_aligned, rows_RC in zip((True, False), _aligned_and_not(spans, form), strict=True)
            if (launch := _launch(form, is_aligned, rows_RC, device, tile)) is not None
        ]

    def digests(self, seeds_N2: Tensor) -> Tensor:
        """int64 [N, 2] on the device: of every tensor the sum of its blocks' hashes, both lanes, mod 2^64.

        seeds_N2: int64 [N, 2] on the device, contiguous, `TensorHash.seeds` of every tensor. Headers are not in it. One
        launch for each form and alignment that there is; nothing is waited for. A CUDA graph can capture any call but
        the first, which loads the kernels.
        """
        if (seeds_N2.shape, seeds_N2.dtype) != ((self.tensors, 2), torch.int64) or not seeds_N2.is_contiguous():
            raise ValueError(
                f"seeds are contiguous int64 [{self.tensors}, 2], got {seeds_N2.dtype} {tuple(seeds_N2.shape)}"
            )
        if seeds_N2.device.type != self._device.type:
            raise ValueError(f"seeds are on {self._device} as the spans are, got {seeds_N2.device}")
        sums_N2 = torch.zeros_like(seeds_N2)
        with device_of(self._device):
            for launch in self._launches:
                _digest_kernel[(launch.rows_U.numel(),)](
                    launch.table_RC, launch.rows_U, self._keys, seeds_N2, sums_N2,
                    FORM=launch.form, IS_ALIGNED=launch.is_aligned,
                    BLOCKS=launch.tile.blocks, UNIT_BLOCKS=launch.tile.unit_blocks, num_warps=launch.tile.warps,
                )  # fmt: skip
        return sums_N2


def _aligned_and_not(spans: Spans, form: Form) -> tuple[Tensor, Tensor]:
    """int64 [R, 4] twice: the whole blocks of a form's spans where vectors can be loaded, and everything else of it.

    Columns: address, wire bytes, tensor, first block.
    """
    columns = torch.stack([spans.address, spans.wire_bytes, spans.tensor, spans.first_block], dim=1)
    rows_RC = columns[(spans.form == form) & (spans.wire_bytes > 0)]
    is_aligned = rows_RC[:, 0] % VECTOR_BYTES == 0
    whole_RC, others_RC = rows_RC[is_aligned], rows_RC[~is_aligned]
    blocks = whole_RC[:, 1] // BLOCK_BYTES
    whole_bytes = blocks * BLOCK_BYTES
    held_bytes = whole_bytes if form is Form.SAME else 2 * whole_bytes
    tails_RC = whole_RC + torch.stack([held_bytes, -whole_bytes, torch.zeros_like(blocks), blocks], dim=1)
    whole_RC[:, 1] = whole_bytes
    return whole_RC[whole_bytes > 0], torch.cat([others_RC, tails_RC[tails_RC[:, 1] > 0]])


def _launch(form: Form, is_aligned: bool, rows_RC: Tensor, device: torch.device, tile: DigestTile) -> _Launch | None:
    """None for no rows."""
    if rows_RC.shape[0] == 0:
        return None
    tile = tile_for(form, is_aligned, tile)
    rows_U, first_R = units(rows_RC[:, 1], tile.unit_blocks * BLOCK_BYTES)
    table_RC = torch.cat([rows_RC, first_R[:, None]], dim=1)
    return _Launch(form.value, is_aligned, table_RC.to(device), rows_U.to(device), tile)
