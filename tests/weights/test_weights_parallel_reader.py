"""Whatever is read in slices, by many threads and in any order, arrives bit for bit, or an error says what did not."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from weights.digest import BLOCK_BYTES
from weights.disk import write_step
from weights.disk.opened import OpenFolder
from weights.disk.reading import read_ahead, read_into
from weights.disk.step_folder import read_step
from weights.disk.tensor_file import TensorFile
from weights.errors import FolderError
from weights.parallel_reader import HostMemory, ParallelReader, Wanted

FILE = "model.safetensors"


@pytest.fixture(params=[True, False], ids=["straight", "through buffers"])
def reader(request: pytest.FixtureRequest) -> ParallelReader:
    """Small slices, so that tensors are cut. Through buffers is the way to a GPU."""
    return ParallelReader("cpu", threads=4, slice_bytes=BLOCK_BYTES, straight=request.param)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)

    def noise(*shape: int) -> Tensor:
        return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16, generator=generator)

    return {
        "large": noise(300, 101).view(torch.bfloat16),  # NaNs with payloads among them
        "narrow": noise(5000).view(torch.float16).nan_to_num(),
        "wide": torch.randn(3000, generator=generator),
        "odd": torch.arange(7777).to(torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 5),
    } | {f"small.{index}": noise(index).view(torch.bfloat16) for index in range(1, 40)}


def filled(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(shape, 1, dtype=dtype)


def read(folder: Path, targets: dict[str, Tensor], reader: ParallelReader, files: Sequence[str] = (FILE,)) -> int:
    with OpenFolder(folder) as opened:
        return read_into(opened, files, targets, reader).bytes


def test_every_tensor_arrives_bit_for_bit(tmp_path: Path, reader: ParallelReader) -> None:
    tensors = state()
    save_file(tensors, tmp_path / FILE)
    targets = {name: filled(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    assert read(tmp_path, targets, reader) == sum(tensor.nbytes for tensor in tensors.values())
    for name, target in targets.items():
        assert torch.equal(bits(target), bits(tensors[name])), name


def test_narrow_tensors_are_widened_exactly_however_they_are_cut(tmp_path: Path, reader: ParallelReader) -> None:
    tensors = {name: tensor for name, tensor in state().items() if tensor.dtype in (torch.bfloat16, torch.float16)}
    save_file(tensors, tmp_path / FILE)
    targets = {name: filled(tensor.shape, torch.float32) for name, tensor in tensors.items()}
    assert read(tmp_path, targets, reader) == sum(tensor.nbytes for tensor in tensors.values())
    for name, target in targets.items():
        assert torch.equal(bits(target), bits(tensors[name].float())), name


def test_tensors_of_several_files_go_to_rows_of_one_parameter_and_nothing_else_is_touched(
    tmp_path: Path, reader: ParallelReader
) -> None:
    parts = {name: torch.randn(rows, 333) for name, rows in (("q", 40), ("k", 7), ("v", 9))}
    for name, part in parts.items():
        save_file({name: part, f"{name}.other": torch.ones(3000)}, tmp_path / f"{name}.safetensors")
    fused = torch.full((60, 333), 7.0)
    targets = {"q": fused[:40], "k": fused[41:48], "v": fused[48:57]}
    read(tmp_path, targets, reader, [f"{name}.safetensors" for name in parts])
    sevens = torch.full((4, 333), 7.0)
    assert torch.equal(fused, torch.cat([parts["q"], sevens[:1], parts["k"], parts["v"], sevens[:3]]))


def test_parameters_made_for_inference_are_written_too(tmp_path: Path, reader: ParallelReader) -> None:
    save_file({"w": torch.arange(5000.0), "n": torch.arange(100).bfloat16()}, tmp_path / FILE)
    with torch.inference_mode():
        targets = {"w": torch.zeros(5000), "n": torch.zeros(100)}
    grown = torch.nn.Parameter(torch.zeros(5000))
    read(tmp_path, targets, reader)
    read(tmp_path, {"w": grown}, reader)
    assert torch.equal(targets["w"], torch.arange(5000.0))
    assert torch.equal(targets["n"], torch.arange(100.0))
    assert torch.equal(grown.detach(), torch.arange(5000.0))


@given(
    sizes=st.lists(st.integers(0, 9000), min_size=1, max_size=8),
    threads=st.integers(1, 5),
    blocks=st.integers(1, 4),
    straight=st.booleans(),
)
def test_memory_is_read_like_a_file(sizes: list[int], threads: int, blocks: int, straight: bool) -> None:
    data = torch.randint(0, 256, (sum(sizes) + 3,), dtype=torch.uint8)
    source = HostMemory(data)
    targets = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    starts = [3 + sum(sizes[:index]) for index in range(len(sizes))]
    reader = ParallelReader("cpu", threads=threads, slice_bytes=blocks * BLOCK_BYTES, straight=straight)
    found = reader.read(
        Wanted(source, start, torch.uint8, target) for start, target in zip(starts, targets, strict=True)
    )
    assert found.bytes == sum(sizes)
    assert torch.equal(torch.cat(targets), data[3:])


class Locked(HostMemory):
    """Memory that a device can read where it is."""

    def __init__(self, data: Tensor) -> None:
        super().__init__(data)
        self._locked = True

    def fill(self, places: Sequence[Tensor], start: int) -> None:
        raise AssertionError("locked memory is not copied on its way")


def test_page_locked_memory_goes_straight_to_its_place(reader: ParallelReader) -> None:
    data = torch.arange(20_000, dtype=torch.int32).view(torch.uint8)
    wide = torch.zeros(1000)
    target = torch.zeros(19_000, dtype=torch.int32)
    source = Locked(data)
    reader.read([Wanted(source, 4000, torch.int32, target), Wanted(source, 0, torch.bfloat16, wide)])
    assert torch.equal(target, torch.arange(1000, 20_000, dtype=torch.int32))
    assert torch.equal(bits(wide), bits(data[:2000].view(torch.bfloat16).float()))


def test_elements_at_an_odd_byte_are_widened_too(reader: ParallelReader) -> None:
    sent = torch.randn(5000).bfloat16()
    data = torch.cat([torch.zeros(1, dtype=torch.uint8), bits(sent)])
    target = torch.zeros(5000)
    reader.read([Wanted(HostMemory(data), 1, torch.bfloat16, target)])
    assert torch.equal(target, sent.float())


# What is refused before the first byte.


def test_everything_that_does_not_fit_is_named_and_nothing_is_written(tmp_path: Path, reader: ParallelReader) -> None:
    save_file({"a": torch.ones(3), "b": torch.ones(4), "c": torch.ones(5)}, tmp_path / FILE)
    targets = {
        "a": torch.zeros(3),
        "b": torch.zeros(2, 2),
        "c": torch.zeros(5, dtype=torch.bfloat16),
        "d": torch.zeros(1),
    }
    with pytest.raises(FolderError) as caught:
        read(tmp_path, targets, reader)
    assert str(caught.value).splitlines() == [
        f"{tmp_path} does not hold what is to be read:",
        "  d: missing",
        "  b: float32 [4], expected float32 [2, 2]",
        "  c: float32 [5], expected bfloat16 [5]",
    ]
    assert not any(bool(target.any()) for target in targets.values())


def test_targets_that_cannot_be_written_in_place_are_the_callers_mistake(reader: ParallelReader) -> None:
    source = HostMemory(torch.ones(64, dtype=torch.uint8))
    good = torch.zeros(4)
    wanted = [
        Wanted(source, 0, torch.float32, good),
        Wanted(source, 0, torch.float32, torch.zeros(4, 4).T),
        Wanted(source, 0, torch.float32, torch.zeros(4, dtype=torch.float16)),
        Wanted(source, 0, torch.float32, torch.zeros(4, device="meta")),
    ]
    with pytest.raises(ValueError, match="these targets cannot be read into") as caught:
        reader.read(wanted)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["1", "2", "3"]
    assert "float32 does not fit into float16 exactly" in lines[1]
    assert not good.any()


@pytest.mark.parametrize(("threads", "slice_bytes"), [(0, BLOCK_BYTES), (1, 0)])
def test_a_reader_of_nothing_is_refused(threads: int, slice_bytes: int) -> None:
    with pytest.raises(ValueError):
        ParallelReader("cpu", threads=threads, slice_bytes=slice_bytes)


# What goes wrong on the way.


def test_a_file_that_is_cut_while_it_is_read_is_named_with_the_byte(tmp_path: Path, reader: ParallelReader) -> None:
    path = tmp_path / FILE
    save_file({"a": torch.ones(100_000)}, path)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        file = TensorFile(descriptor, str(path))
        os.truncate(path, 8192)
        (stored,) = file.tensors
        target = torch.zeros(100_000)
        with pytest.raises(FolderError, match=rf"{path}: .*it ended at byte \d+ while it was read"):
            reader.read([Wanted(file, stored.start, stored.dtype, target)])
    finally:
        os.close(descriptor)


def test_a_disk_that_fails_is_named(tmp_path: Path, reader: ParallelReader, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(100_000)}, tmp_path / FILE)
    honest = os.preadv

    def broken(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        if offset > 200_000:
            raise OSError(5, os.strerror(5))
        return honest(descriptor, views, offset)

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(FolderError, match=f"{FILE}: cannot be read: Input/output error"):
        read(tmp_path, {"a": torch.zeros(100_000)}, reader)


def test_a_file_system_that_gives_a_few_bytes_at_a_time_is_read_to_the_end(
    tmp_path: Path, reader: ParallelReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = state()
    save_file(tensors, tmp_path / FILE)
    honest = os.preadv

    def stingy(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        few = (
            [view[: 1 + offset % 97] for view in views[:1]]
            if offset % 3
            else [*views[:1], *(v[:1] for v in views[1:2])]
        )
        return honest(descriptor, few, offset)

    monkeypatch.setattr(os, "preadv", stingy)
    targets = {name: filled(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    read(tmp_path, targets, reader)
    for name, target in targets.items():
        assert torch.equal(bits(target), bits(tensors[name])), name


class Slow:
    """A source that gives marks until it fails, and counts who is in it."""

    def __init__(self, fails_at: int) -> None:
        self.fails_at = fails_at
        self.inside = 0
        self.lock = threading.Lock()

    def fill(self, places: Sequence[Tensor], start: int) -> None:
        with self.lock:
            self.inside += 1
        try:
            if start == self.fails_at:
                raise FolderError("the disk is gone")
            time.sleep(0.01)
            for place in places:
                place.fill_(1)
        finally:
            with self.lock:
                self.inside -= 1

    def locked(self, start: int, size: int) -> None:
        return None


def test_after_an_error_nobody_writes_any_more_and_most_was_never_read(reader: ParallelReader) -> None:
    source = Slow(fails_at=8 * BLOCK_BYTES)
    target = torch.zeros(400 * BLOCK_BYTES, dtype=torch.uint8)
    with pytest.raises(FolderError, match="the disk is gone"):
        reader.read([Wanted(source, 0, torch.uint8, target)])
    assert source.inside == 0
    left = target.clone()
    assert int(left.sum()) < 100 * BLOCK_BYTES
    time.sleep(0.05)
    assert torch.equal(target, left)
    source.fails_at = -1
    reader.read([Wanted(source, 0, torch.uint8, target)])
    assert bool(target.all()), "the reader is as good as new"


def test_a_caller_that_is_interrupted_leaves_no_thread_behind(
    reader: ParallelReader, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Slow(fails_at=-1)
    target = torch.zeros(400 * BLOCK_BYTES, dtype=torch.uint8)
    join, interrupted = threading.Thread.join, []

    def interrupting(thread: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted:
            interrupted.append(thread)
            time.sleep(0.03)
            raise KeyboardInterrupt
        join(thread, timeout)

    monkeypatch.setattr(threading.Thread, "join", interrupting)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        reader.read([Wanted(source, 0, torch.uint8, target)])
    assert threading.active_count() == before
    assert 0 < int(target.sum()) < 100 * BLOCK_BYTES


# Folders.


def test_tensors_that_are_read_ahead_come_in_order_each_in_memory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weights.disk.reading.AHEAD_BYTES", 10_000)
    tensors = state()
    save_file(tensors, tmp_path / FILE)
    with OpenFolder(tmp_path) as folder, folder.opened([FILE]) as (file,):
        found = list(read_ahead(file, file.tensors))
        assert [stored for stored, _ in found] == list(file.tensors)
    assert len({tensor.untyped_storage().data_ptr() for _, tensor in found if tensor.numel()}) == len(tensors) - 1
    for stored, tensor in found:
        assert tensor.dtype == stored.dtype
        assert torch.equal(bits(tensor), bits(tensors[stored.name])), stored.name


def test_no_more_is_read_ahead_than_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weights.disk.reading.AHEAD_BYTES", 3 * 4096)
    save_file({f"w{index}": torch.ones(1024) for index in range(10)}, tmp_path / FILE)
    honest, asked = os.preadv, []

    def counting(descriptor: int, views: Sequence[memoryview], offset: int) -> int:
        asked.append(sum(len(view) for view in views))
        return honest(descriptor, views, offset)

    with OpenFolder(tmp_path) as folder, folder.opened([FILE]) as (file,):
        monkeypatch.setattr(os, "preadv", counting)
        ahead = iter(read_ahead(file, file.tensors))
        seen = []
        for taken in range(1, 11):
            next(ahead)
            seen.append(sum(asked) // 4096 - taken)
    assert max(seen) == 2
    assert seen[-1] == 0


@pytest.fixture
def step(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    tensors = {f"w{index}": torch.randn(50, 40) for index in range(9)}
    write_step(tensors, tmp_path, run="run", step=3, file_bytes=20_000)
    return tmp_path / "step-0000000003", tensors


def test_a_step_is_read_into_the_places_of_its_tensors(
    step: tuple[Path, dict[str, Tensor]], reader: ParallelReader
) -> None:
    path, tensors = step
    found = read_step(path, content=False)
    assert len(found.files) > 1
    targets = {name: torch.zeros(50, 40) for name in found.names}
    reading = found.read_into(targets, reader)
    assert reading.bytes == found.bytes
    assert reading.bytes_per_s == reading.bytes / reading.seconds > 0
    for name, tensor in tensors.items():
        assert torch.equal(targets[name], tensor)
