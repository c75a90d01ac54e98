"""The reader of safetensors files takes what the library writes, and nothing that is not whole."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from weights.disk.tensor_file import TensorFile
from weights.dtypes import WIRE_DTYPES
from weights.errors import FolderError


@contextmanager
def opened(path: Path) -> Iterator[TensorFile]:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        yield TensorFile(descriptor, str(path))
    finally:
        os.close(descriptor)


def contents(path: Path) -> dict[str, Tensor]:
    with opened(path) as file:
        return {stored.name: file.read(stored) for stored in file.tensors}


def bits(tensor: Tensor) -> bytes:
    return bytes(tensor.reshape(-1).view(torch.uint8).tolist())


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    dtype = draw(st.sampled_from(sorted(WIRE_DTYPES)))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    count = int(torch.empty(shape).numel())
    limit = 1 if dtype == "bool" else 255
    data = draw(st.lists(st.integers(0, limit), min_size=count * 8, max_size=count * 8))
    flat = torch.tensor(data, dtype=torch.uint8)[: count * WIRE_DTYPES[dtype].itemsize]
    return flat.view(WIRE_DTYPES[dtype]).reshape(shape)


@given(state=st.dictionaries(st.text("abc.é", min_size=1, max_size=6), tensors(), max_size=5))
def test_it_reads_what_the_library_wrote_bit_for_bit(
    state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    save_file(state, path, metadata={"format": "pt"})
    found = contents(path)
    assert {name: (t.dtype, t.shape, bits(t)) for name, t in found.items()} == {
        name: (t.dtype, t.shape, bits(t)) for name, t in state.items()
    }


def framed(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(start: int = 0, stop: int = 4, *, shape: object = (1,), dtype: object = "F32", **more: object) -> object:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]} | more


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "a header of 0 bytes in a file of 0"),
        (b"\x05\x00\x00", "a header of 0 bytes in a file of 3"),
        ((1 << 60).to_bytes(8, "little") + b"{}", "a header of 1152921504606846976 bytes"),
        (framed(b"[]"), "not a JSON object"),
        (framed(b"{"), "not JSON"),
        (framed(b"\xff\xfe"), "not JSON"),
        (framed(b"[" * 100000), "not JSON"),
        (framed(b'{"a": 1, "a": 1}'), "'a' stands there twice"),
        (framed({"a": 3}), "'a': expected dtype, shape and data_offsets"),
        (framed({"a": entry(dtype="F128")}, b"1234"), "dtype 'F128'; known are F64"),
        (framed({"a": entry(shape=[1.0])}, b"1234"), "its shape is none that a tensor has"),
        (framed({"a": entry(0, 0, shape=[0, 1 << 62])}), "its shape is none that a tensor has"),
        (framed({"a": entry(shape=[-1])}, b"1234"), "none negative"),
        (framed({"a": entry(0, 8)}, b"12345678"), "its offsets hold 8 bytes, its shape and dtype take 4"),
        (framed({"a": entry(-4, 0)}, b"1234"), "'a'"),
        (framed({"a": entry(), "b": entry(2, 6)}, b"123456"), "'b' begins at byte"),
        (framed({"a": entry(), "b": entry(8, 12)}, b"123456789012"), "'b' begins at byte"),
        (framed({"a": entry()}, b"12345"), "its tensors end at byte"),
        (framed({"a": entry()}, b"123"), "its tensors end at byte"),
        (framed({"a\n": entry()}, b"1234"), "printable"),
    ],
)
def test_what_is_not_a_whole_file_is_refused_here_and_by_the_library(data: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(FolderError, match=says) as caught:
        contents(path)
    assert str(path) in str(caught.value)
    if says not in ("printable", "its shape is none that a tensor has", "stands there twice"):
        with pytest.raises((SafetensorError, ValueError, TypeError)):
            load_file(path)


@given(place=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_file_with_a_byte_changed_is_read_or_refused_and_never_worse(
    place: int, byte: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data = bytearray(framed({"a": entry(0, 8, shape=[2]), "b": entry(8, 12)}, bytes(range(12))))
    data[place % len(data)] = byte
    path = tmp_path_factory.mktemp("file") / "x.safetensors"
    path.write_bytes(data)
    try:
        contents(path)
    except FolderError as error:
        said = str(error)
    else:
        return
    assert str(path) in said


def test_a_file_that_is_cut_while_it_is_read_is_an_error_and_not_the_end_of_the_process(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(100_000)}, path)
    with opened(path) as file:
        os.truncate(path, 8192)
        with pytest.raises(FolderError, match="it ended at byte 8192 while it was read"):
            file.read(file.tensors[0])
