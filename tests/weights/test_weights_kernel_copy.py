"""Copying and packing tables move every bit as Tensor.to does, wherever rows lie, and touch nothing else.

Under Triton's interpreter on a CPU, for real on a GPU.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from device_spans import (
    DEVICE,
    POISON,
    SIZES,
    WIDENED,
    column,
    digests,
    placed,
    random_bytes,
    spans_of,
    unaligned,
    wire_elements,
)
from torch import Tensor

from weights.digest import TensorHash
from weights.kernel_copy import CopyTable, CopyTile, PackTable
from weights.spans import form_of

HERE = Path(__file__).resolve().parent


def copy_same(table: type[CopyTable | PackTable], offsets: tuple[int, int], tile: CopyTile | None = None) -> None:
    """Copies spans of every size between two memories and looks at all that lies around them."""
    sources, targets = placed(SIZES, offsets[0]), placed(SIZES, offsets[1])
    memory = targets[0]._base
    memory.fill_(POISON)
    before = memory.clone()
    columns = [column([span.data_ptr() for span in spans]) for spans in (sources, targets)]
    choice = {} if tile is None else {"tile": tile}
    copies = table(*columns, column(SIZES), torch.zeros(len(SIZES), dtype=torch.int64), device=DEVICE, **choice)
    assert copies.bytes == sum(SIZES)
    copies.load()
    assert torch.equal(memory, before), "kernels are loaded without copying"
    copies.run()
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source, target)
        target.fill_(POISON)
    assert torch.equal(memory, before)


@pytest.mark.parametrize("offsets", [(0, 0), (1, 0), (0, 2), (4, 4), (7, 9)], ids=str)
def test_spans_of_any_length_at_any_address_are_copied_and_nothing_else_is(offsets: tuple[int, int]) -> None:
    copy_same(CopyTable, offsets)
    copy_same(PackTable, offsets)


@pytest.mark.parametrize(
    "tile",
    [
        CopyTile(tile_bytes=1024, unit_bytes=1024, warps=1),
        CopyTile(tile_bytes=4096, unit_bytes=1 << 15, warps=4, is_streamed=True),
        CopyTile(tile_bytes=1 << 15, unit_bytes=1 << 17),
    ],
    ids=str,
)
def test_every_tile_copies_the_same(tile: CopyTile) -> None:
    copy_same(CopyTable, (0, 0), tile)


@pytest.mark.parametrize("offsets", [(0, 0), (2, 0), (0, 4), (5, 3)], ids=str)
@pytest.mark.parametrize("dtype", WIDENED, ids=str)
def test_widening_copies_give_every_float32_its_bits(dtype: torch.dtype, offsets: tuple[int, int]) -> None:
    wire = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).to(DEVICE)
    if DEVICE.type == "cpu" and dtype == torch.float16:
        wire = wire[~wire.isnan()]  # CPUs differ in what a signalling NaN becomes
    wire = wire[:-3]
    source = unaligned(wire, offsets[0])
    target = unaligned(torch.full((wire.numel() + 4,), 7.0), offsets[1])
    CopyTable(
        column([source.data_ptr()]), column([target.data_ptr()]), column([wire.nbytes]),
        column([form_of(dtype, torch.float32)]), device=DEVICE,
    ).run()  # fmt: skip
    expected = torch.cat([wire.to(torch.float32), torch.full((4,), 7.0, device=DEVICE)])
    assert torch.equal(target, expected.view(torch.uint8))


def masters() -> Tensor:
    """float32 that need rounding: random bits, ties, the edges of both formats."""
    random = random_bytes(4 * 50_001, 3).view(torch.float32)
    upper = torch.arange(0, 2**16, 7, dtype=torch.int64)[:, None] << 16
    ties = (upper + torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])).flatten()
    halves = torch.arange(2**15 - 2**10, dtype=torch.int32).to(torch.int16).view(torch.float16).to(torch.float32)
    between = (halves[1:] + halves[:-1]) / 2
    edges = torch.tensor(
        [65504.0, 65519.996, 65520.0, 65535.0, 3.4e38, float("inf"), 2**-24, 2**-25, 1.5 * 2**-25, 2**-149]
    )
    small = torch.cat([between, edges])
    ties_32 = torch.where(ties >= 2**31, ties - 2**32, ties).to(torch.int32).view(torch.float32)
    return torch.cat([random, ties_32.to(DEVICE), small.to(DEVICE), -small.to(DEVICE)])


@pytest.mark.parametrize("offsets", [(0, 0), (4, 0), (0, 2), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", WIDENED, ids=str)
def test_packing_rounds_masters_as_tensor_to_does(dtype: torch.dtype, offsets: tuple[int, int]) -> None:
    held = masters()
    source = unaligned(held, offsets[0])
    target = unaligned(torch.full((held.numel() + 4,), 7.0, dtype=dtype), offsets[1])
    PackTable(
        column([source.data_ptr()]), column([target.data_ptr()]), column([2 * held.numel()]),
        column([form_of(dtype, torch.float32)]), device=DEVICE,
    ).run()  # fmt: skip
    found, beyond = unaligned(target, 0).view(dtype).split([held.numel(), 4])
    assert beyond.tolist() == [7.0] * 4
    expected = held.to(dtype)
    assert found.isnan().tolist() == expected.isnan().tolist()
    is_compared = torch.ones_like(held, dtype=torch.bool) if DEVICE.type == "cuda" else ~held.isnan()
    assert is_compared.sum() > 0.9 * held.numel()
    assert torch.equal(found.view(torch.int16)[is_compared], expected.view(torch.int16)[is_compared])


def test_rows_of_every_form_in_one_table_go_where_they_belong() -> None:
    """q, k and v into blocks of rows of one parameter, a bias into float32, another from an odd address."""
    qkv = torch.zeros(6 + 2 + 2, 8, dtype=torch.bfloat16, device=DEVICE)
    bias = torch.zeros(11, device=DEVICE)
    scale = torch.zeros(3, dtype=torch.float64, device=DEVICE)
    parts = [
        wire_elements(torch.bfloat16, 48).view(6, 8),
        wire_elements(torch.bfloat16, 16).view(2, 8) * 1,
        wire_elements(torch.bfloat16, 16).view(2, 8).flip(0).contiguous(),
        wire_elements(torch.bfloat16, 11),
        torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64, device=DEVICE),
    ]
    sources = [unaligned(part, offset) for part, offset in zip(parts, (0, 0, 6, 2, 1), strict=True)]
    targets = [qkv[:6], qkv[6:8], qkv[8:], bias, scale]
    forms = [form_of(part.dtype, target.dtype) for part, target in zip(parts, targets, strict=True)]
    CopyTable(
        column([source.data_ptr() for source in sources]), column([target.data_ptr() for target in targets]),
        column([source.numel() for source in sources]), column(forms), device=DEVICE,
    ).run()  # fmt: skip
    assert torch.equal(qkv.view(torch.int16), torch.cat(parts[:3]).view(torch.int16))
    assert torch.equal(bias.view(torch.int32), parts[3].to(torch.float32).view(torch.int32))
    assert scale.tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("dtype", WIDENED, ids=str)
def test_packed_copied_and_verified_a_master_keeps_one_digest(dtype: torch.dtype) -> None:
    master = torch.randn(9001, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    bucket = torch.zeros(9001, dtype=dtype, device=DEVICE)
    hosted = torch.zeros(9001, device=DEVICE)
    addresses = [column([tensor.data_ptr()]) for tensor in (master, bucket, hosted)]
    form = column([form_of(dtype, torch.float32)])
    PackTable(*addresses[:2], column([bucket.nbytes]), form, device=DEVICE).run()
    CopyTable(*addresses[1:], column([bucket.nbytes]), form, device=DEVICE).run()
    function = TensorHash("w", master.shape, dtype)
    expected = [function.blocks(master.to(dtype).view(torch.uint8))]
    assert digests(spans_of([bucket]), [function]) == expected
    assert digests(spans_of([hosted], form_of(dtype, torch.float32)), [function]) == expected


def test_nothing_to_copy_is_no_launch() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    CopyTable(empty, empty, empty, empty, device=DEVICE).run()
    nowhere = column([0])
    PackTable(nowhere, nowhere, column([0]), column([1]), device=DEVICE).run()


def test_kernels_touch_no_byte_outside_a_span() -> None:
    """Every span ends, or begins, at a page that may not be touched: in a process of its own, which would die of it."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(HERE / "guarded_spans.py")], env=environment, capture_output=True, text=True, timeout=240
    )
    assert (done.returncode, done.stdout) == (0, "untouched\n"), done.stderr
