"""Spans are what their columns say, or refused; units cover them."""

import pytest
import torch
from device_spans import (
    DEVICE,
    column,
)
from hypothesis import given
from hypothesis import strategies as st

from weights.dtypes import WIRE_DTYPES, fits
from weights.kernel_copy import CopyTable
from weights.spans import Form, Spans, form_of, units


def test_a_form_is_known_for_whatever_fits_and_for_nothing_else() -> None:
    for wire in WIRE_DTYPES.values():
        for held in WIRE_DTYPES.values():
            if fits(wire, held):
                assert (form_of(wire, held) is Form.SAME) == (wire == held)
            else:
                with pytest.raises(ValueError, match="does not hold"):
                    form_of(wire, held)
    assert form_of(torch.bfloat16, torch.float32) is Form.BFLOAT16_IN_FLOAT32
    assert form_of(torch.float16, torch.float32) is Form.FLOAT16_IN_FLOAT32


@given(lengths=st.lists(st.integers(0, 50), max_size=20), unit=st.integers(1, 20))
def test_units_cover_every_row_once_and_in_order(lengths: list[int], unit: int) -> None:
    rows_U, first_R = units(column(lengths), unit)
    expected = [row for row, length in enumerate(lengths) for _ in range(0, length, unit)]
    assert rows_U.tolist() == expected
    assert rows_U.dtype == torch.int32
    assert [expected.index(row) for row, length in enumerate(lengths) if length] == [
        first for first, length in zip(first_R.tolist(), lengths, strict=True) if length
    ]


GOOD = {"address": [0, 4096], "wire_bytes": [4096, 10], "form": [0, 0], "tensor": [0, 0], "first_block": [0, 1]}


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"form": [0]}, r"flat int64 of one length.*form: torch.int64 \(1,\) on cpu"),
        ({"form": [0, 3]}, r"2 \(FLOAT16_IN_FLOAT32\), got other values in 1 rows: 1"),
        ({"wire_bytes": [-4096, 10]}, "0 or more bytes"),
        ({"wire_bytes": [4096, 11], "form": [0, 1]}, "whole elements of 2 bytes"),
        ({"address": [-1, 4]}, "got address below zero"),
        ({"tensor": [0, -1]}, "got tensor below zero"),
        ({"wire_bytes": [4000, 10]}, "only its last span may have another length, got other values in 1 rows: 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_spans_are_refused_with_what_is_wrong(changed: dict[str, list[int]], said: str) -> None:
    Spans(**{name: column(values) for name, values in GOOD.items()})
    with pytest.raises(ValueError, match=said):
        Spans(**{name: column(values) for name, values in (GOOD | changed).items()})


def test_columns_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"address: torch.int32 \(2,\) on cpu"):
        Spans(
            **({name: column(values) for name, values in GOOD.items()} | {"address": torch.zeros(2, dtype=torch.int32)})
        )
    with pytest.raises(ValueError, match="flat int64 of one length"):
        CopyTable(column([0]), column([0]), column([0, 1]), column([0]), device=DEVICE)
