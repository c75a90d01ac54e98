"""On a GPU: page-locked buffers are not overwritten under a copy, locked mappings are read where they are, and what is
read there has the bits that a CPU reads.
"""

import gc
import logging
import mmap
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from weights import page_lock
from weights.disk.opened import OpenFolder
from weights.disk.reading import read_into
from weights.page_lock import page_locked
from weights.parallel_reader import HostMemory, ParallelReader, Wanted
from weights.pinned import PinnedRing
from weights.transports.locked_segments import LockedSegments
from weights.transports.segment import SharedSegment

pytestmark = pytest.mark.gpu

MEBI = 1 << 20


def random_bytes(size: int) -> Tensor:
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(size))


def private_bytes() -> int:
    """Of this process's memory that no other process has: what copying a page on its first write adds to."""
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Anonymous:"))


def test_a_buffer_is_not_lent_again_before_its_copy_has_ended() -> None:
    ring = PinnedRing("cuda", buffers=2, buffer_bytes=MEBI)
    assert ring.stream is not None
    targets = torch.zeros(20, MEBI, dtype=torch.uint8, device="cuda")
    torch.cuda.synchronize()
    for mark, target in enumerate(targets, start=1):
        with ring.lent() as buffer:
            assert buffer.is_pinned()
            buffer.fill_(mark)
            with torch.cuda.stream(ring.stream):
                torch.cuda._sleep(20_000_000)  # some ms in which the buffer must not change
                target.copy_(buffer, non_blocking=True)
    ring.stream.synchronize()
    assert targets.amin(1).tolist() == targets.amax(1).tolist() == list(range(1, 21))


@pytest.mark.parametrize("threads", [1, 16])
def test_files_are_read_bit_for_bit_and_widened_exactly(tmp_path: Path, threads: int) -> None:
    tensors = {f"w{index}": random_bytes(2 * (index * 300_007 + 1)).view(torch.bfloat16) for index in range(20)}
    tensors |= {"master": torch.randn(1_000_003), "empty": torch.empty(0, 3), "scalar": torch.tensor(2.5)}
    save_file(tensors, tmp_path / "x.safetensors")
    reader = ParallelReader("cuda", threads=threads, slice_bytes=MEBI)
    for wide in (False, True):
        with torch.inference_mode():
            targets = {
                name: torch.full(tensor.shape, 7, dtype=torch.float32 if wide else tensor.dtype, device="cuda")
                for name, tensor in tensors.items()
            }
        with OpenFolder(tmp_path) as folder:
            read_into(folder, ["x.safetensors"], targets, reader)
        for name, target in targets.items():
            expected = tensors[name].to(target.dtype).reshape(-1).view(torch.uint8)
            assert torch.equal(target.cpu().reshape(-1).view(torch.uint8), expected), (name, wide)


def test_what_was_launched_before_a_read_does_not_overwrite_it() -> None:
    data = random_bytes(8 * MEBI)
    target = torch.zeros(8 * MEBI, dtype=torch.uint8, device="cuda")
    torch.cuda._sleep(200_000_000)
    target.fill_(9)
    ParallelReader("cuda", threads=2, slice_bytes=MEBI).read([Wanted(HostMemory(data), 0, torch.uint8, target)])
    assert torch.equal(target.cpu(), data)


@pytest.mark.parametrize("locked", [True, False])
def test_a_segment_is_read_through_buffers_or_where_it_is_locked(locked: bool) -> None:
    owner = SharedSegment(64 * MEBI)
    owner.data.copy_(random_bytes(64 * MEBI))
    segments = LockedSegments()
    target = torch.zeros(64 * MEBI - 5, dtype=torch.uint8, device="cuda")
    reader = ParallelReader("cuda", threads=4, slice_bytes=MEBI)
    before = private_bytes()
    data = segments.map(os.dup(owner.descriptor)) if locked else owner.data
    assert data.is_pinned() == locked
    for _ in range(2):
        reader.read([Wanted(HostMemory(data), 5, torch.uint8, target)])
        assert torch.equal(target.cpu(), owner.data[5:])
        owner.data.add_(1)  # the next update, in the same segment
    if locked:
        assert private_bytes() - before < 32 * MEBI, "locking made copies of the pages"
    owner.close()


def test_memory_is_unlocked_when_its_last_view_dies_and_can_be_locked_again() -> None:
    mapping = mmap.mmap(-1, MEBI)
    for _ in range(3):
        data = page_locked(mapping)
        view = data[100:]
        del data
        assert view.is_pinned()
        del view
        gc.collect()
        assert not torch.frombuffer(mapping, dtype=torch.uint8).is_pinned()


def test_a_mapping_that_cannot_be_locked_is_said_once_and_spoils_no_later_launch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    page_lock._say_once.cache_clear()
    mapping = mmap.mmap(-1, MEBI)
    first = page_locked(mapping)
    with caplog.at_level(logging.WARNING):
        again = [page_locked(mapping) for _ in range(2)]  # is locked already: CUDA refuses
    assert [record.message[:41] for record in caplog.records] == ["mapped memory cannot be page-locked (CUDA"]
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert torch.equal(again[1], first)
