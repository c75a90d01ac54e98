"""Spans: stretches of device memory that hold wire bytes, as columns of numbers, so that one launch serves thousands.

A kernel is given rows of unequal length. They are cut into units of equal length, and a program of the kernel takes one
unit: `units` says which rows it belongs to.

Legend: R rows, U units.
"""

from dataclasses import dataclass
from enum import IntEnum

import torch
from torch import Tensor

from weights.digest import BLOCK_BYTES
from weights.dtypes import fits

VECTOR_BYTES = 16
"""What a GPU's thread loads at once; memory that starts at a multiple of it is read and written fastest."""


class Form(IntEnum):
    """How the bytes of a wire tensor are held in memory."""

    SAME = 0
    BFLOAT16_IN_FLOAT32 = 1
    FLOAT16_IN_FLOAT32 = 2


_WIDENINGS = {
    (torch.bfloat16, torch.float32): Form.BFLOAT16_IN_FLOAT32,
    (torch.float16, torch.float32): Form.FLOAT16_IN_FLOAT32,
}


def form_of(wire: torch.dtype, held: torch.dtype) -> Form:
    """How memory of dtype `held` holds a tensor that is `wire` on the wire. ValueError where it cannot, exactly."""
    if not fits(wire, held):
        raise ValueError(f"{held} does not hold {wire} exactly; a host stores {wire} or a float32 that widens it")
    return Form.SAME if wire == held else _WIDENINGS[wire, held]


@dataclass(frozen=True, slots=True)
class Spans:
    """R stretches of memory, each with consecutive wire bytes of one tensor from one of its blocks on.

    The columns are int64 [R] on the CPU. ValueError if they are not, or if a row is impossible.
    """

    address: Tensor
    """Of the first byte that is held; the memory must stay where it is for as long as the spans are used."""
    wire_bytes: Tensor
    """Length in wire bytes: what FLOAT32 holds takes twice as many. Zero is a row without content."""
    form: Tensor
    """A Form."""
    tensor: Tensor
    """Row of the digests to which it belongs."""
    first_block: Tensor
    """Index in its tensor of its first block of 4096 wire bytes."""

    def __post_init__(self) -> None:
        columns = {name: getattr(self, name) for name in ("address", "wire_bytes", "form", "tensor", "first_block")}
        check_columns(columns)
        check_forms(self.form, self.wire_bytes)
        negative = [name for name in ("address", "tensor", "first_block") if bool((columns[name] < 0).any())]
        if negative:
            raise ValueError(f"columns of spans are not negative, got {', '.join(negative)} below zero")
        self._check_cuts()

    def __len__(self) -> int:
        return self.address.numel()

    def _check_cuts(self) -> None:
        """ValueError unless every span but its tensor's last ends with a whole block."""
        short = (self.wire_bytes % BLOCK_BYTES != 0).nonzero().flatten()
        if short.numel() == 0:
            return
        ends = self.first_block + (self.wire_bytes + BLOCK_BYTES - 1) // BLOCK_BYTES
        last = torch.zeros(int(self.tensor.max()) + 1, dtype=torch.int64)
        last.scatter_reduce_(0, self.tensor, ends, "amax")
        wrong = short[ends[short] != last[self.tensor[short]]]
        if wrong.numel():
            raise ValueError(
                f"a tensor is cut at multiples of {BLOCK_BYTES} bytes: only its last span may have another length, "
                f"got {_listed(wrong)}"
            )


def check_columns(columns: dict[str, Tensor]) -> None:
    """ValueError unless all of them, by name, are int64 of one length, flat, on the CPU."""
    got = {name: f"{column.dtype} {tuple(column.shape)} on {column.device}" for name, column in columns.items()}
    lengths = {column.shape for column in columns.values()}
    is_good = all(c.dtype == torch.int64 and c.dim() == 1 and c.device.type == "cpu" for c in columns.values())
    if not is_good or len(lengths) > 1:
        listed = ", ".join(f"{name}: {text}" for name, text in got.items())
        raise ValueError(f"columns are flat int64 of one length on the CPU, got {listed}")


def check_forms(form: Tensor, wire_bytes: Tensor) -> None:
    """ValueError unless every row has a Form and a length that is possible in it."""
    unknown = ((form < 0) | (form >= len(Form))).nonzero().flatten()
    if unknown.numel():
        raise ValueError(f"a form is one of {', '.join(f'{f.value} ({f.name})' for f in Form)}, got {_listed(unknown)}")
    wrong = ((wire_bytes < 0) | ((form != Form.SAME) & (wire_bytes % 2 != 0))).nonzero().flatten()
    if wrong.numel():
        raise ValueError(
            f"lengths are 0 or more bytes, and whole elements of 2 bytes where a row is widened, got {_listed(wrong)}"
        )


def units(lengths: Tensor, unit: int) -> tuple[Tensor, Tensor]:
    """Cuts rows into units of equal length: (row of every unit, int32 [U]; first unit of every row, int64 [R]).

    lengths: int64 [R]. A row of length 0 has no unit, and a row's last unit may be short.
    """
    counts = (lengths + unit - 1) // unit
    first = counts.cumsum(0) - counts
    return torch.arange(lengths.numel(), dtype=torch.int32).repeat_interleave(counts), first


def _listed(rows: Tensor) -> str:
    return f"other values in {rows.numel()} rows: {', '.join(map(str, rows.tolist()))}"
