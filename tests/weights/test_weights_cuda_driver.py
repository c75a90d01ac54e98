"""Device memory that two processes share: over a fake driver, and over a real one where there is a GPU."""

import ctypes
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.cuda_driver import FakeCuda, FakeMachine

from weights.cuda_driver import Allocation, DeviceBuffer, Opened, allocation_of, export
from weights.cuda_library import CudaFault, CudaLibrary, cuda_library
from weights.errors import DeviceFull, TransportError
from weights.foreign import borrow

DEVICE = torch.device("cpu", 0)
ROOT = Path(__file__).parents[2]


class Process:
    """A fake process: its driver, and the calls over it."""

    def __init__(self, machine: FakeMachine) -> None:
        self.cuda = FakeCuda(machine)
        self.library = CudaLibrary(self.cuda)


@pytest.fixture
def machine() -> FakeMachine:
    return FakeMachine()


@pytest.fixture
def learner(machine: FakeMachine) -> Process:
    return Process(machine)


@pytest.fixture
def host(machine: FakeMachine) -> Process:
    return Process(machine)


def test_a_tensors_allocation_is_found_from_any_address_in_it(learner: Process) -> None:
    address = learner.cuda.add(4096)
    assert allocation_of(address + 4095, 1, library=learner.library) == Allocation(address, 4096, 1, 1)
    assert learner.cuda.retained == [1]
    assert learner.cuda.current == []


def test_memory_that_took_an_address_over_has_another_identity(learner: Process) -> None:
    address = learner.cuda.add(4096)
    before = allocation_of(address, 0, library=learner.library)
    learner.cuda.replace(address)
    after = allocation_of(address, 0, library=learner.library)
    assert (after.address, after.bytes) == (before.address, before.bytes)
    assert after.identity != before.identity
    with pytest.raises(TransportError, match=f"it was freed: its address holds another, {after.identity}"):
        export(before, library=learner.library)


def test_an_address_of_no_device_memory_is_refused(learner: Process) -> None:
    with pytest.raises(
        TransportError, match=r"0x1234 is no address in device memory .* CUDA_ERROR_INVALID_VALUE \(1\)"
    ):
        allocation_of(0x1234, 0, library=learner.library)
    assert learner.cuda.current == []


def test_another_process_sees_the_bytes_without_a_copy(learner: Process, host: Process) -> None:
    address = learner.cuda.add(1000)
    kept = borrow(address, 1000, DEVICE)
    kept.copy_(torch.arange(1000, dtype=torch.int64).to(torch.uint8))
    handle = export(allocation_of(address + 8, 0, library=learner.library), library=learner.library)
    assert len(handle) == 128
    with Opened(handle, 1000, DEVICE, library=host.library) as opened:
        assert opened.bytes == 1000
        assert opened.address == opened.data.data_ptr() == address
        assert torch.equal(opened.data, kept)
        kept[999] = 77
        assert opened.data[999] == 77
        assert host.cuda.opened == [address]
    assert host.cuda.opened == []
    assert opened.data.numel() == 0
    opened.close()  # a second time: the fake would raise


def test_what_is_opened_again_is_closed_again(learner: Process, host: Process) -> None:
    address = learner.cuda.add(1000)
    handle = export(allocation_of(address, 0, library=learner.library), library=learner.library)
    first = Opened(handle, 1000, DEVICE, library=host.library)
    second = Opened(handle, 1000, DEVICE, library=host.library)
    first.close()
    assert host.cuda.opened == [address]
    second.close()
    assert host.cuda.opened == []


def test_memory_without_a_handle_is_refused_with_the_remedy(learner: Process) -> None:
    found = allocation_of(learner.cuda.add(64), 0, library=learner.library)
    learner.cuda.legacy = False
    with pytest.raises(
        TransportError, match=r"cannot be shared: .* without PYTORCH_CUDA_ALLOC_CONF=expandable_segments"
    ):
        export(found, library=learner.library)


def test_memory_that_is_gone_is_not_exported(learner: Process) -> None:
    address = learner.cuda.add(64)
    found = allocation_of(address, 0, library=learner.library)
    del learner.cuda.memory[address]
    with pytest.raises(TransportError, match=r"Allocation\(.*\) cannot be shared, it was freed"):
        export(found, library=learner.library)


def test_a_process_that_opens_its_own_memory_is_told_so(learner: Process) -> None:
    handle = export(allocation_of(learner.cuda.add(64), 0, library=learner.library), library=learner.library)
    with pytest.raises(TransportError, match=r"CUDA_ERROR_INVALID_CONTEXT \(201\).*: learner and host are one process"):
        Opened(handle, 64, DEVICE, library=learner.library)


def test_gpus_that_do_not_reach_each_other_are_told_the_other_way(learner: Process, host: Process) -> None:
    handle = export(allocation_of(learner.cuda.add(64), 0, library=learner.library), library=learner.library)
    host.cuda.open_code = 217
    with pytest.raises(TransportError, match="cannot reach each other's memory: use the transport nccl"):
        Opened(handle, 64, DEVICE, library=host.library)


def test_a_handle_of_nobody_names_what_may_be_wrong(host: Process, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    with pytest.raises(
        TransportError, match=r"cannot open .* \(64 bytes\) on cpu:0: .* \(CUDA_VISIBLE_DEVICES: 3; let"
    ):
        Opened("ab" * 64, 64, DEVICE, library=host.library)


@pytest.mark.parametrize("handle", ["", "ab", "zz" * 64, "ab" * 65])
def test_what_is_no_handle_is_refused(host: Process, handle: str) -> None:
    with pytest.raises(TransportError, match="128 hexadecimal digits, got"):
        Opened(handle, 64, DEVICE, library=host.library)


def test_memory_that_is_shorter_than_its_owner_said_is_closed_again(learner: Process, host: Process) -> None:
    handle = export(allocation_of(learner.cuda.add(64), 0, library=learner.library), library=learner.library)
    with pytest.raises(TransportError, match="has 64 bytes here, its owner says 65"):
        Opened(handle, 65, DEVICE, library=host.library)
    assert host.cuda.opened == []


def test_a_device_that_is_not_there_is_named(host: Process) -> None:
    with pytest.raises(CudaFault, match=r"cuDeviceGet answered CUDA_ERROR_INVALID_DEVICE \(101\): invalid device"):
        allocation_of(1, 5, library=host.library)


def test_a_device_without_an_index_is_a_mistake(host: Process) -> None:
    with pytest.raises(ValueError, match="named with its index, such as cuda:0, got cuda"):
        Opened("ab" * 64, 64, torch.device("cuda"), library=host.library)
    with pytest.raises(ValueError, match="named with its index"):
        DeviceBuffer(64, torch.device("cuda"), library=host.library)


def test_a_buffer_is_memory_of_its_own_that_others_can_open(learner: Process, host: Process) -> None:
    room = learner.cuda.machine.room
    with DeviceBuffer(4096, DEVICE, library=learner.library) as buffer:
        assert learner.cuda.machine.room == room - 4096
        buffer.data.fill_(9)
        found = buffer.allocation()
        assert (found.address, found.bytes, found.device) == (buffer.address, 4096, 0)
        with Opened(export(found, library=learner.library), 4096, DEVICE, library=host.library) as opened:
            assert torch.equal(opened.data, torch.full((4096,), 9, dtype=torch.uint8))
    assert learner.cuda.machine.room == room
    assert buffer.data.numel() == 0
    buffer.close()
    assert learner.cuda.machine.room == room


def test_a_full_device_says_what_is_free(learner: Process) -> None:
    learner.cuda.machine.room = 100
    with pytest.raises(DeviceFull, match="cpu:0 has no room for a buffer of 101 bytes, 100 are free"):
        DeviceBuffer(101, DEVICE, library=learner.library)
    assert learner.cuda.current == []


@pytest.mark.parametrize("size", [0, -1])
def test_a_buffer_has_at_least_a_byte(learner: Process, size: int) -> None:
    with pytest.raises(ValueError, match=f"at least a byte, got {size}"):
        DeviceBuffer(size, DEVICE, library=learner.library)


def test_the_drivers_errors_survive_pickling() -> None:
    for error in (CudaFault("a text", 217), DeviceFull("a text")):
        back = pickle.loads(pickle.dumps(error))
        assert (type(back), str(back), vars(back)) == (type(error), "a text", vars(error))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a driver")
def test_a_machine_without_a_driver_is_told_what_is_missing() -> None:
    with pytest.raises(
        TransportError, match=r"CUDA's driver library cannot be loaded .* use the transport shared_memory"
    ):
        cuda_library()


def test_borrowed_memory_is_seen_and_written_in_place() -> None:
    kept = (ctypes.c_ubyte * 300)(*range(200))
    tensor = borrow(ctypes.addressof(kept), 300, torch.device("cpu"))
    assert (tensor.dtype, tensor.shape, tensor.stride()) == (torch.uint8, (300,), (1,))
    assert tensor.data_ptr() == ctypes.addressof(kept)
    tensor[299] = 42
    assert kept[299] == 42
    assert torch.equal(
        tensor[:200].view(torch.int32), torch.tensor(list(range(200)), dtype=torch.uint8).view(torch.int32)
    )


def test_a_borrowed_tensor_leaves_nothing_behind_but_the_memory() -> None:
    kept = (ctypes.c_ubyte * 64)()
    tensor = borrow(ctypes.addressof(kept), 64, torch.device("cpu"))
    gone = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert gone() is None
    for turn in range(10_000):  # a description that were freed twice, or not by C, would not survive this
        borrow(ctypes.addressof(kept), 64, torch.device("cpu"))[0] = turn % 256
    assert kept[0] == 9999 % 256


@pytest.mark.parametrize(("address", "size", "device"), [(0, 8, "cpu"), (8, 0, "cpu"), (8, 8, "cuda"), (8, 8, "meta")])
def test_a_loan_that_cannot_be_is_refused(address: int, size: int, device: str) -> None:
    with pytest.raises(ValueError, match="memory"):
        borrow(address, size, torch.device(device))


# With a GPU: the owner is a process of its own.

GPU = 0


class Owner:
    def __init__(self, index: int = GPU, **environment: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "fakes.memory_owner", str(index)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", **environment},
        )
        self._hear()

    def tell(self, do: str, name: str = "a", **arguments: int) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"do": do, "name": name, **arguments}) + "\n")
        self._process.stdin.flush()
        return self._hear()

    def end(self) -> None:
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def _hear(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the owner of the memory has ended"
        return json.loads(line)


@pytest.fixture
def owner() -> Iterator[Owner]:
    process = Owner()
    yield process
    process.end()


def open_shared(said: Any, index: int = GPU) -> Opened:
    assert said["event"] == "shared", said
    return Opened(said["handle"], said["bytes"], torch.device("cuda", index))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tensor", "buffer"])
def test_a_gpus_memory_is_read_in_another_process(owner: Owner, kind: str) -> None:
    size = (32 << 20) + 12345
    said = owner.tell(kind, size=size, fill=7)
    with open_shared(said) as opened:
        part = opened.data[said["offset"] : said["offset"] + size]
        assert opened.data.device == torch.device("cuda", GPU)
        assert opened.data.data_ptr() == opened.address
        assert torch.equal(part, torch.full_like(part, 7))
        owner.tell("fill", fill=200)
        assert torch.equal(part, torch.full_like(part, 200))
    with open_shared(said) as again:
        assert int(again.data[said["offset"] + size - 1]) == 200


@pytest.mark.gpu
def test_a_thread_that_has_done_nothing_on_the_device_can_open_memory(owner: Owner) -> None:
    said = owner.tell("tensor", size=32 << 20, fill=7)
    seen: list[int] = []

    def look() -> None:
        with open_shared(said) as opened:
            seen.append(int(opened.data[said["offset"]]))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join(60)
    assert seen == [7]


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["tensor", "buffer"])
def test_memory_that_was_freed_and_taken_again_has_another_identity_and_handle(owner: Owner, kind: str) -> None:
    before = owner.tell(kind, size=64 << 20, fill=1)
    owner.tell("free")
    after = owner.tell(kind, size=64 << 20, fill=2)
    assert after["identity"] != before["identity"]
    assert after["handle"] != before["handle"]
    with open_shared(after) as opened:
        assert int(opened.data[after["offset"]]) == 2


@pytest.mark.gpu
def test_a_dead_owners_memory_can_be_read_until_it_is_closed(owner: Owner) -> None:
    said = owner.tell("tensor", size=64 << 20, fill=5)
    with open_shared(said) as opened:
        owner.end()
        part = opened.data[said["offset"] : said["offset"] + (64 << 20)]
        assert torch.equal(part, torch.full_like(part, 5))
    with pytest.raises(TransportError, match="its owner is gone"):
        open_shared(said)
    assert torch.ones(8, device="cuda").sum() == 8


@pytest.mark.gpu
def test_what_was_opened_returns_all_of_its_memory(owner: Owner) -> None:
    def used() -> int:
        free, total = torch.cuda.mem_get_info(GPU)
        return total - free

    said = owner.tell("tensor", size=64 << 20, fill=5)
    open_shared(said).close()
    before = used()
    for _ in range(200):
        open_shared(said).close()
    assert used() == before


@pytest.mark.gpu
def test_a_process_does_not_open_its_own_memory() -> None:
    with DeviceBuffer(1 << 21, torch.device("cuda", GPU)) as buffer:
        handle = export(buffer.allocation())
        with pytest.raises(TransportError, match="learner and host are one process"):
            Opened(handle, 1 << 21, torch.device("cuda", GPU))


@pytest.mark.gpu
def test_expandable_segments_cannot_be_shared_and_a_buffer_can() -> None:
    process = Owner(PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True", PYTORCH_ALLOC_CONF="expandable_segments:True")
    try:
        refused = process.tell("tensor", size=64 << 20, fill=5)
        assert refused["event"] == "refused"
        assert "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in refused["text"]
        said = process.tell("buffer", "b", size=64 << 20, fill=6)
        with open_shared(said) as opened:
            assert int(opened.data[-1]) == 6
    finally:
        process.end()


@pytest.mark.gpu
def test_more_than_the_device_has_is_refused_and_nothing_is_lost() -> None:
    _, total = torch.cuda.mem_get_info(GPU)
    with pytest.raises(DeviceFull, match=f"no room for a buffer of {2 * total} bytes"):
        DeviceBuffer(2 * total, torch.device("cuda", GPU))
    with DeviceBuffer(1 << 21, torch.device("cuda", GPU)) as buffer:
        buffer.data.fill_(3)
        assert int(buffer.data[-1]) == 3


@pytest.mark.gpu
def test_unused_memory_of_pytorch_makes_room_for_a_buffer() -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(GPU)
    large = torch.empty(int(free * 0.7), dtype=torch.uint8, device="cuda")
    del large  # PyTorch keeps it
    with DeviceBuffer(int(free * 0.7), torch.device("cuda", GPU)) as buffer:
        assert buffer.bytes == int(free * 0.7)


@pytest.mark.gpu
def test_memory_of_the_next_gpu_is_read_on_this_one_without_a_context_there() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    owner = Owner(1)
    try:
        said = owner.tell("tensor", size=256 << 20, fill=9)
        free_before, _ = torch.cuda.mem_get_info(1)
        owner.tell("fill", fill=9)
        with open_shared(said, GPU) as opened:
            part = opened.data[said["offset"] : said["offset"] + (256 << 20)]
            assert part.device == torch.device("cuda", GPU)
            copy = part.clone()
            assert torch.equal(copy, torch.full_like(copy, 9))
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            copy.copy_(part)
            end.record()
            end.synchronize()
            print(f"\nread from the next GPU: {part.numel() / start.elapsed_time(end) / 1e6:.0f} GB/s")
        free_after, _ = torch.cuda.mem_get_info(1)
        print(f"\nused on the owner's GPU meanwhile: {(free_before - free_after) >> 20} MiB")
    finally:
        owner.end()
