"""Buffers are lent to one user at a time, and mapped memory is locked and unlocked exactly once."""

import ctypes
import gc
import logging
import mmap
import os
import threading
from contextlib import suppress

import pytest
import torch
from torch import Tensor

from weights import page_lock
from weights.errors import DeadlineExceeded, MessageError
from weights.page_lock import page_locked
from weights.pinned import PinnedRing
from weights.transports.locked_segments import LockedSegments
from weights.transports.segment import SharedSegment


def test_a_ring_makes_a_buffer_only_when_all_others_are_lent() -> None:
    ring = PinnedRing("cpu", buffers=2, buffer_bytes=64)
    with ring.lent() as first:
        assert first.shape == (64,)
        assert first.dtype == torch.uint8
        first_address = first.data_ptr()
        with ring.lent() as second:
            assert second.data_ptr() != first_address
    with ring.lent() as again:
        assert again.data_ptr() in (first_address, second.data_ptr())


def test_a_ring_that_is_all_lent_says_so_at_the_deadline() -> None:
    ring = PinnedRing("cpu", buffers=1, buffer_bytes=64)
    with (
        ring.lent(),
        pytest.raises(DeadlineExceeded, match=r"all 1 buffers on the way to cpu were lent, and none came .* 0\.01 s"),
        ring.lent(deadline_s=0.01),
    ):
        pass


def test_a_buffer_comes_back_from_a_user_that_failed_and_to_one_that_waits() -> None:
    ring = PinnedRing("cpu", buffers=1, buffer_bytes=64)
    lent, waiting = threading.Event(), threading.Event()

    def fail() -> None:
        with suppress(OSError), ring.lent():
            lent.set()
            waiting.wait(10)
            raise OSError

    user = threading.Thread(target=fail)
    user.start()
    assert lent.wait(10)
    waiting.set()
    with ring.lent(deadline_s=10):
        pass
    user.join()


def test_many_users_never_share_a_buffer() -> None:
    ring = PinnedRing("cpu", buffers=3, buffer_bytes=8)
    wrong: list[int] = []

    def use(mark: int) -> None:
        for _ in range(200):
            with ring.lent() as buffer:
                buffer.fill_(mark)
                if not bool((buffer == mark).all()):
                    wrong.append(mark)

    users = [threading.Thread(target=use, args=(mark,)) for mark in range(6)]
    for user in users:
        user.start()
    for user in users:
        user.join()
    assert wrong == []


@pytest.mark.parametrize(("buffers", "size"), [(0, 1), (1, 0)])
def test_a_ring_of_nothing_is_refused(buffers: int, size: int) -> None:
    with pytest.raises(ValueError, match="a ring has buffers of some bytes"):
        PinnedRing("cpu", buffers=buffers, buffer_bytes=size)


class Locks:
    """Stands in for CUDA's runtime: knows what is locked, and holds unlocking what is not against its caller."""

    def __init__(self, code: int = 0) -> None:
        self.code = code
        self.now: dict[int, int] = {}
        self.ever = 0

    def cudaHostRegister(self, address: int, size: int, _flags: int, /) -> int:  # noqa: N802
        if not self.code:
            assert address not in self.now
            self.now[address] = size
            for page in range(address, address + size, 4096):
                ctypes.memmove(page, page, 1)  # as the kernel does, which gives a private mapping pages of its own
            self.ever += 1
        return self.code

    def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
        del self.now[address]
        return 0


def mapping(size: int = 8192) -> mmap.mmap:
    return mmap.mmap(-1, size)


def test_a_mapping_is_locked_whole_until_its_last_view_dies() -> None:
    locks = Locks()
    data: Tensor | None = page_locked(mapping(), locks)
    assert data is not None
    assert list(locks.now.items()) == [(data.data_ptr(), 8192)]
    view: Tensor | None = data[4096:].view(torch.int32)
    data = None
    gc.collect()
    assert len(locks.now) == 1
    view = None
    gc.collect()
    assert view is None
    assert locks.now == {}
    assert locks.ever == 1


def test_it_is_unlocked_before_it_is_unmapped() -> None:
    order: list[str] = []

    class Told(mmap.mmap):
        def __del__(self) -> None:
            order.append("unmapped")

    class Telling(Locks):
        def cudaHostUnregister(self, address: int, /) -> int:  # noqa: N802
            order.append("unlocked")
            return super().cudaHostUnregister(address)

    data = page_locked(Told(-1, 4096), Telling())
    del data
    gc.collect()
    assert order == ["unlocked", "unmapped"]


def test_memory_that_cannot_be_locked_is_used_all_the_same_and_said_once(caplog: pytest.LogCaptureFixture) -> None:
    page_lock._say_once.cache_clear()
    locks = Locks(code=801)
    with caplog.at_level(logging.WARNING):
        kept = [page_locked(mapping(), locks) for _ in range(3)]
    assert [record.message for record in caplog.records] == [
        "mapped memory cannot be page-locked (CUDA error 801) and is copied twice on its way to the GPU"
    ]
    kept[0][:4] = torch.tensor([1, 2, 3, 4])
    assert kept[0][:4].tolist() == [1, 2, 3, 4]
    del kept
    gc.collect()


def test_segments_are_mapped_and_locked_once_however_often_they_come_and_show_what_is_written_later() -> None:
    locks = Locks()
    segments = LockedSegments(locks)
    owner = SharedSegment(8192)
    first = segments.map(os.dup(owner.descriptor))
    owner.data.copy_(torch.arange(8192) % 251)
    second = segments.map(os.dup(owner.descriptor))
    assert second is first
    assert torch.equal(second, owner.data)
    assert locks.ever == 1
    owner.close()


def test_a_sweep_lets_go_of_segments_that_the_last_update_did_not_use() -> None:
    locks = Locks()
    segments = LockedSegments(locks)
    owners = [SharedSegment(8192) for _ in range(2)]
    for owner in owners:
        segments.map(os.dup(owner.descriptor))
    segments.sweep()
    assert len(locks.now) == 2
    kept = segments.map(os.dup(owners[1].descriptor)).data_ptr()
    segments.sweep()
    gc.collect()
    assert list(locks.now) == [kept]
    segments.drop()
    gc.collect()
    assert locks.now == {}
    for owner in owners:
        owner.close()


def test_what_is_no_segment_is_not_mapped_and_its_descriptor_is_closed() -> None:
    descriptor = os.memfd_create("open", os.MFD_CLOEXEC)
    with pytest.raises(MessageError, match="a segment is sealed against shrinking"):
        LockedSegments(Locks()).map(descriptor)
    with pytest.raises(OSError):
        os.fstat(descriptor)
