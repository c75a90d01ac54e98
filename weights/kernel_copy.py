# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Thousands of copies in a launch, at the memory's speed: wire bytes into hosted parameters, masters into wire bytes.

A program takes one unit of a row, tile after tile, in 16-byte vectors. Where source or target does not start at a
multiple of 16 bytes, and for the last bytes that fill no vector, single bytes are moved. Nothing outside a row is read
or written.

Legend: R rows of the table, U units.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from weights.kernel_device import check_device, device_of
from weights.kernel_forms import rounded, widened
from weights.spans import VECTOR_BYTES, Form, check_columns, check_forms, units

_COLUMNS = tl.constexpr(4)  # of the table: source, target, wire bytes, first unit


@dataclass(frozen=True, slots=True)
class CopyTile:
    """How the work is cut. Every choice copies the same."""

    tile_bytes: int = 1 << 15
    """Wire bytes that a program loads at once; a power of two."""
    unit_bytes: int = 1 << 17
    """Wire bytes that a program copies; a multiple of its tile."""
    warps: int = 16
    is_streamed: bool = False
    """Whether to ask the caches to keep neither what is read nor what is written."""


DEFAULT_COPY_TILE = CopyTile()
BYTEWISE_COPY_TILE = CopyTile(tile_bytes=1 << 11, unit_bytes=1 << 15, warps=4)


@triton.jit
def _load_bytes(pointer, offsets, mask, BYTES: tl.constexpr):
    """The little-endian int32 of BYTES bytes, at element `offsets` of any address."""
    value = tl.zeros_like(offsets)
    for byte in tl.static_range(BYTES):
        value |= tl.load(pointer + offsets * BYTES + byte, mask=mask, other=0).to(tl.int32) << (8 * byte)
    return value


@triton.jit
def _store_bytes(pointer, offsets, value, mask, BYTES: tl.constexpr):
    """Writes the lowest BYTES bytes of int32 values, at element `offsets` of any address."""
    for byte in tl.static_range(BYTES):
        tl.store(pointer + offsets * BYTES + byte, ((value >> (8 * byte)) & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def _copy_kernel(
    table_ptr, rows_ptr,
    FORM: tl.constexpr, IS_ROUNDED: tl.constexpr, IS_ALIGNED: tl.constexpr,
    TILE_BYTES: tl.constexpr, UNIT_BYTES: tl.constexpr, LOADED: tl.constexpr, STORED: tl.constexpr,
):  # fmt: skip
    # An element: 16 bits on the wire where FORM converts, else a word of a vector or a single byte.
    WIRE: tl.constexpr = 2 if FORM != 0 else (4 if IS_ALIGNED else 1)
    HELD: tl.constexpr = 4 if FORM != 0 else WIRE
    SOURCE: tl.constexpr = HELD if IS_ROUNDED else WIRE
    TARGET: tl.constexpr = WIRE if IS_ROUNDED else HELD

    unit = tl.program_id(0)
    row_ptr = table_ptr + tl.load(rows_ptr + unit).to(tl.int64) * _COLUMNS
    start = (unit - tl.load(row_ptr + 3)) * (UNIT_BYTES // WIRE)  # in the row, in elements
    elements = tl.minimum(tl.load(row_ptr + 2) // WIRE - start, UNIT_BYTES // WIRE).to(tl.int32)
    source = tl.load(row_ptr) + start * SOURCE
    target = tl.load(row_ptr + 1) + start * TARGET
    if IS_ALIGNED:
        elements = tl.multiple_of(elements, 16 // WIRE)  # what the host has cut the row to
        source_ptr = tl.multiple_of(source.to(tl.pointer_type(tl.int16 if SOURCE == 2 else tl.int32)), 16)
        target_ptr = tl.multiple_of(target.to(tl.pointer_type(tl.int16 if TARGET == 2 else tl.int32)), 16)
    else:
        source_ptr = source.to(tl.pointer_type(tl.uint8))
        target_ptr = target.to(tl.pointer_type(tl.uint8))
    i = tl.arange(0, TILE_BYTES // WIRE)
    done = tl.zeros([], tl.int32)
    while done < elements:
        at = done + i
        is_in = at < elements
        if IS_ALIGNED:
            bits = tl.load(source_ptr + at, mask=is_in, eviction_policy=LOADED).to(tl.int32)
        else:
            bits = _load_bytes(source_ptr, at, is_in, SOURCE)
        if FORM != 0:
            if IS_ROUNDED:
                bits = rounded(bits, FORM)
            else:
                bits = widened(bits, FORM)
        if IS_ALIGNED:
            tl.store(target_ptr + at, bits.to(target_ptr.dtype.element_ty), mask=is_in, cache_modifier=STORED)
        else:
            _store_bytes(target_ptr, at, bits, is_in, TARGET)
        done += TILE_BYTES // WIRE


@dataclass(frozen=True, slots=True)
class _Launch:
    """The rows that one launch serves."""

    form: int
    is_aligned: bool
    """Vectors may be moved, and every row is whole vectors."""
    table_RC: Tensor
    """int64 [R, 4]: source, target, wire bytes, first unit."""
    rows_U: Tensor
    """int32 [U]: the row of every unit."""
    tile: CopyTile


class _Table:
    """Rows in a table on their device, one launch for each form and alignment that there is."""

    _is_rounded: bool

    def __init__(
        self,
        source: Tensor,
        target: Tensor,
        wire_bytes: Tensor,
        form: Tensor,
        *,
        device: torch.device,
        tile: CopyTile = DEFAULT_COPY_TILE,
    ) -> None:
        """The columns are int64 [R] on the CPU: addresses on `device`, lengths in wire bytes, a Form of every row.

        The memory must stay where it is for as long as the table is used, and no target may touch another row.
        ValueError for columns that are none, or a device without the kernel.
        """
        check_device(device)
        check_columns({"source": source, "target": target, "wire_bytes": wire_bytes, "form": form})
        check_forms(form, wire_bytes)
        self.bytes = int(wire_bytes.sum())
        """Wire bytes of all rows."""
        self._device = device
        rows_RC = torch.stack([source, target, wire_bytes], dim=1)
        self._launches = [
            launch
            for one in Form
            for is_aligned, of_form_RC in zip((True, False), self._cut(rows_RC[form == one], one), strict=True)
            if (launch := _launch(one, is_aligned, of_form_RC, device, tile)) is not None
        ]

    def run(self) -> None:
        """Launches the copies on the device's current stream and waits for nothing.

        A CUDA graph can capture any call after `load` or another call.
        """
        for launch in self._launches:
            self._run(launch, launch.table_RC, launch.rows_U)

    def load(self) -> None:
        """Compiles and loads the kernels, and copies nothing: whoever is paused for `run` does not wait for that."""
        nothing_RC = torch.zeros(1, 4, dtype=torch.int64, device=self._device)
        first_U = torch.zeros(1, dtype=torch.int32, device=self._device)
        for launch in self._launches:
            self._run(launch, nothing_RC, first_U)

    def _run(self, launch: _Launch, table_RC: Tensor, rows_U: Tensor) -> None:
        with device_of(self._device):
            _copy_kernel[(rows_U.numel(),)](
                table_RC, rows_U,
                FORM=launch.form, IS_ROUNDED=self._is_rounded, IS_ALIGNED=launch.is_aligned,
                TILE_BYTES=launch.tile.tile_bytes, UNIT_BYTES=launch.tile.unit_bytes,
                LOADED="evict_first" if launch.tile.is_streamed else "",
                STORED=".cs" if launch.tile.is_streamed else "",
                num_warps=launch.tile.warps,
            )  # fmt: skip

    def _cut(self, rows_RC: Tensor, form: Form) -> tuple[Tensor, Tensor]:
        """int64 [R, 3] twice: the whole vectors of rows where they can be moved, and everything else."""
        rows_RC = rows_RC[rows_RC[:, 2] > 0]
        is_aligned = (rows_RC[:, :2] % VECTOR_BYTES == 0).all(dim=1)
        whole_RC, others_RC = rows_RC[is_aligned], rows_RC[~is_aligned]
        whole_bytes = whole_RC[:, 2] // VECTOR_BYTES * VECTOR_BYTES
        held_bytes = whole_bytes if form is Form.SAME else 2 * whole_bytes
        ends = (held_bytes, whole_bytes) if self._is_rounded else (whole_bytes, held_bytes)
        tails_RC = whole_RC + torch.stack([*ends, -whole_bytes], dim=1)
        whole_RC[:, 2] = whole_bytes
        return whole_RC[whole_bytes > 0], torch.cat([others_RC, tails_RC[tails_RC[:, 2] > 0]])


class CopyTable(_Table):
    """Copies of plain wire bytes to where a host holds them, in the form in which it does.

    bfloat16 is widened by moving its bits, so that NaNs keep their payloads; float16 as Tensor.to(float32) does on
    CUDA.
    """

    _is_rounded = False


class PackTable(_Table):
    """Copies of what a learner holds, in the form in which it does, to plain wire bytes.

    float32 is rounded to the wire's 16 bits, to nearest with ties to even, as Tensor.to does on CUDA: a learner's
    masters need not be exact widenings.
    """

    _is_rounded = True


def _launch(form: Form, is_aligned: bool, rows_RC: Tensor, device: torch.device, tile: CopyTile) -> _Launch | None:
    """None for no rows."""
    if rows_RC.shape[0] == 0:
        return None
    tile = tile if is_aligned else BYTEWISE_COPY_TILE
    rows_U, first_R = units(rows_RC[:, 2], tile.unit_bytes)
    table_RC = torch.cat([rows_RC, first_R[:, None]], dim=1)
    return _Launch(form.value, is_aligned, table_RC.to(device), rows_U.to(device), tile)
