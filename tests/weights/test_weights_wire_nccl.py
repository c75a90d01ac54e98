"""The NCCL wire over a library that is faked function by function, and over GPUs where there are some."""

import ctypes
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from fakes.wire_rank import Rank, RankProcess

from weights.errors import DeadlineExceeded, TransportError
from weights.wire import ChannelWire, serve_store
from weights.wires.meeting import StoreServer
from weights.wires.nccl import NcclChannel
from weights.wires.nccl_library import ID_BYTES, Configuration, NcclLibrary

IN_PROGRESS = 7
LONG_S = 30.0
SHORT_S = 0.2


class FakeNccl:
    """NCCL's functions, as ctypes would find them. A call takes `slowness` questions to come to its end."""

    def __init__(self, *, version: int = 22809, slowness: int = 2) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.state = 0
        self.refuses: dict[str, int] = {}
        self.questions_after_abort = 0
        self._version = version
        self._slowness = slowness
        self._left = 0
        self._aborted = False

    def ncclGetVersion(self, version: Any) -> int:  # noqa: N802
        version._obj.value = self._version
        return 0

    def ncclGetErrorString(self, code: Any) -> bytes:  # noqa: N802
        return b"words for %d" % code.value

    def ncclGetLastError(self, handle: Any) -> bytes:  # noqa: N802
        return b"a socket closed\n"

    def ncclGetUniqueId(self, made: Any) -> int:  # noqa: N802
        ctypes.memset(ctypes.addressof(made._obj), 7, ID_BYTES)
        return self.refuses.get("ncclGetUniqueId", 0)

    def ncclCommInitRankConfig(self, handle: Any, size: Any, unique_id: Any, rank: Any, configuration: Any) -> int:  # noqa: N802
        given: Configuration = configuration._obj
        self.calls.append(("start", size.value, bytes(unique_id), rank.value, bytes(given)))
        handle._obj.value = 0xC0
        return self._begin("ncclCommInitRankConfig")

    def ncclBroadcast(  # noqa: N802
        self, source: Any, target: Any, count: Any, kind: Any, root: Any, handle: Any, stream: Any
    ) -> int:
        self.calls.append(
            ("broadcast", source.value, target.value, count.value, kind.value, root.value, handle.value, stream.value)
        )
        return self._begin("ncclBroadcast")

    def ncclCommGetAsyncError(self, handle: Any, state: Any) -> int:  # noqa: N802
        self.questions_after_abort += self._aborted
        self._left = max(self._left - 1, 0)
        state._obj.value = self.state or (IN_PROGRESS if self._left else 0)
        return 0

    def ncclCommAbort(self, handle: Any) -> int:  # noqa: N802
        self.calls.append(("abort", handle.value))
        self._aborted = True
        return self.refuses.get("ncclCommAbort", 0)

    def _begin(self, function: str) -> int:
        self._left = self._slowness
        return self.refuses.get(function, IN_PROGRESS)


class FakeLane:
    """A stream on the CPU whose work ends when the test says so."""

    def __init__(self) -> None:
        self.device = torch.device("cpu")
        self.stream = 0x57
        self.log: list[str] = []
        self.empty = threading.Event()
        self.fault: str | None = None

    def chosen(self) -> AbstractContextManager[object]:
        return nullcontext()

    def follow(self) -> None:
        self.log.append("follow")

    def mark(self) -> Callable[[], bool]:
        self.log.append("mark")

        def query() -> bool:
            if self.fault is not None:
                raise RuntimeError(self.fault)
            return self.empty.is_set()

        return query

    def close(self) -> None:
        self.log.append("close")


def connected(nccl: FakeNccl, lane: FakeLane) -> ChannelWire:
    channel = NcclChannel(NcclLibrary(nccl), lane, bytes(range(ID_BYTES)), rank=1, size=3)
    while not channel.idle():
        pass
    return ChannelWire(channel, name="wire 'a'", rank=1, size=3, stop_s=LONG_S)


def test_a_communicator_is_asked_for_that_never_blocks() -> None:
    nccl = FakeNccl(slowness=3)
    channel = NcclChannel(NcclLibrary(nccl), FakeLane(), bytes(range(ID_BYTES)), rank=1, size=3)
    assert [channel.idle() for _ in range(4)] == [False, False, True, True]
    [(what, size, unique_id, rank, raw)] = nccl.calls
    assert (what, size, unique_id, rank) == ("start", 3, bytes(range(ID_BYTES)), 1)
    given = Configuration.from_buffer_copy(raw)
    assert (given.size, given.magic, given.version, given.blocking) == (48, 0xCAFEBEEF, 21800, 0)
    unset = (given.cluster_size, given.fewest_blocks, given.most_blocks, given.split_share)
    assert unset == (-(2**31),) * 4
    assert given.network is None


def test_a_broadcast_goes_in_place_on_the_lane_after_the_callers_work() -> None:
    nccl, lane = FakeNccl(), FakeLane()
    wire = connected(nccl, lane)
    data = torch.zeros(1000, dtype=torch.uint8)
    sending = wire.post(data, 2, LONG_S)
    assert nccl.calls[1:] == [("broadcast", data.data_ptr(), data.data_ptr(), 1000, 1, 2, 0xC0, 0x57)]
    assert lane.log == ["follow", "mark"]
    lane.empty.set()
    sending.wait()
    assert wire.alive


def test_the_mark_stands_behind_the_broadcast_which_nccl_queues_later() -> None:
    nccl, lane = FakeNccl(slowness=3), FakeLane()
    channel = NcclChannel(NcclLibrary(nccl), lane, bytes(ID_BYTES), rank=1, size=3)
    while not channel.idle():
        pass
    transfer = channel.start(torch.zeros(8, dtype=torch.uint8), 0, LONG_S)
    lane.empty.set()
    assert not transfer.begun()
    assert not transfer.done()
    assert lane.log == ["follow"]
    assert transfer.begun()
    assert lane.log == ["follow", "mark"]
    assert transfer.done()


def test_a_deadline_aborts_and_returns_when_the_kernel_has_left() -> None:
    nccl, lane = FakeNccl(), FakeLane()
    wire = connected(nccl, lane)
    threading.Timer(3 * SHORT_S, lane.empty.set).start()
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"a broadcast of 8 bytes from rank 0 did not end within 0\.2 s"):
        wire.broadcast(torch.zeros(8, dtype=torch.uint8), 0, SHORT_S)
    assert time.monotonic() - began >= 3 * SHORT_S
    assert nccl.calls[-1] == ("abort", 0xC0)
    assert lane.log == ["follow", "mark", "mark", "close"]
    with pytest.raises(TransportError, match="has ended"):
        wire.broadcast(torch.zeros(8, dtype=torch.uint8), 0, SHORT_S)
    assert nccl.questions_after_abort == 0  # its memory is gone


def test_what_nccl_notices_of_a_peer_ends_the_broadcast_before_its_deadline() -> None:
    nccl, lane = FakeNccl(), FakeLane()
    wire = connected(nccl, lane)
    sending = wire.post(torch.zeros(8, dtype=torch.uint8), 0, LONG_S)
    nccl.state = 6
    began = time.monotonic()
    threading.Timer(SHORT_S, lane.empty.set).start()
    with pytest.raises(
        TransportError,
        match=r"failed: NCCL 2\.28\.9: a peer or the network failed with code 6: words for 6; a socket closed",
    ):
        sending.wait()
    assert time.monotonic() - began < LONG_S / 2
    assert nccl.calls[-1] == ("abort", 0xC0)


def test_a_device_in_trouble_ends_the_wire() -> None:
    lane = FakeLane()
    wire = connected(FakeNccl(), lane)
    sending = wire.post(torch.zeros(8, dtype=torch.uint8), 0, LONG_S)
    lane.fault = "an illegal memory access"
    with pytest.raises(TransportError, match=r"the device failed: an illegal memory access; stopping it failed"):
        sending.wait()
    assert not wire.alive


def test_a_refused_start_names_the_remedy_and_leaves_no_stream() -> None:
    nccl, lane = FakeNccl(), FakeLane()
    nccl.refuses["ncclCommInitRankConfig"] = 5
    with pytest.raises(TransportError, match="code 5: words for 5; a socket closed; NCCL takes one rank per GPU"):
        NcclChannel(NcclLibrary(nccl), lane, bytes(ID_BYTES), rank=0, size=2)
    assert lane.log == ["close"]
    assert nccl.calls[-1] == ("abort", 0xC0)


def test_a_unique_id_is_bytes_of_its_length() -> None:
    assert NcclLibrary(FakeNccl()).unique_id() == bytes([7]) * ID_BYTES


def test_an_old_library_is_refused() -> None:
    with pytest.raises(TransportError, match=r"needs NCCL 21800 or later, libnccl\.so\.2 is 21701"):
        NcclLibrary(FakeNccl(version=21701))


def test_an_environment_that_makes_nccl_block_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_COMM_BLOCKING", "1")
    with pytest.raises(TransportError, match=r"NCCL_COMM_BLOCKING=1 .* unset"):
        NcclLibrary(FakeNccl())


# With GPUs. Every rank has one of its own, in a process of its own.

DEADLINE_S = 2.0
SLACK_S = 1.0
MANY = 256 << 20


@pytest.fixture
def store() -> Iterator[StoreServer]:
    with serve_store() as server:
        yield server


@pytest.fixture
def gpus() -> Iterator[list[RankProcess]]:
    """A rank on each of two to four GPUs."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    processes = [RankProcess("nccl", rank) for rank in range(min(torch.cuda.device_count(), 4))]
    yield processes
    for process in processes:
        process.end()


def open_all(gpus: list[RankProcess], port: int, prefix: str) -> None:
    for gpu in gpus:
        gpu.tell(Rank.open, port, len(gpus), prefix, LONG_S)
    for gpu in gpus:
        kind, text, _ = gpu.answer()
        assert kind == "ok", text


def everywhere(gpus: list[RankProcess], command: Callable[..., Any], *arguments: Any) -> list[Any]:
    for gpu in gpus:
        gpu.tell(command, *arguments)
    answers = [gpu.answer() for gpu in gpus]
    assert all(kind == "ok" for kind, _, _ in answers), answers
    return [result for _, result, _ in answers]


@pytest.mark.gpu
def test_every_gpu_gets_the_roots_bytes(gpus: list[RankProcess], store: StoreServer) -> None:
    open_all(gpus, store.port, "first")
    for seed, size in enumerate((1, 17, 4096, 1_000_003, MANY + 5)):
        assert all(everywhere(gpus, Rank.broadcast, size, seed % len(gpus), seed, LONG_S))
    assert all(everywhere(gpus, Rank.pair, MANY, LONG_S))
    rates = everywhere(gpus, Rank.rate, 1 << 30, 40)
    print(f"\nnccl broadcast, {len(gpus)} GPUs, 1 GiB each, two in flight: {min(rates):.0f} GB/s")
    assert everywhere(gpus, Rank.close) == [False] * len(gpus)


@pytest.mark.gpu
@pytest.mark.parametrize("lost", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_gpu_lost_in_a_broadcast_costs_every_survivor_the_deadline(
    gpus: list[RankProcess], store: StoreServer, lost: int, number: signal.Signals
) -> None:
    open_all(gpus, store.port, "first")
    for gpu in gpus:
        gpu.tell(Rank.stream, MANY, DEADLINE_S)
    time.sleep(0.5)
    gpus[lost].signal(number)
    lost_at = time.monotonic()
    survivors = [gpu for place, gpu in enumerate(gpus) if place != lost]
    for gpu in survivors:
        kind, text, _ = gpu.answer()
        print(f"\nafter {time.monotonic() - lost_at:.2f} s {kind}: {text}")
        assert kind in ("DeadlineExceeded", "TransportError")
        assert "may still write" not in text
    assert time.monotonic() - lost_at < DEADLINE_S + SLACK_S
    if number == signal.SIGSTOP:
        gpus[lost].signal(signal.SIGCONT)
        assert gpus[lost].answer()[0] in ("DeadlineExceeded", "TransportError")
    else:
        gpus[lost].end()
        gpus[lost] = RankProcess("nccl", lost)
    assert all(everywhere(gpus, Rank.multiply))
    open_all(gpus, store.port, "second")
    assert all(everywhere(gpus, Rank.broadcast, MANY, 0, 5, LONG_S))


@pytest.mark.gpu
def test_a_gpu_that_dies_while_the_wire_is_opened_costs_the_deadline(
    gpus: list[RankProcess], store: StoreServer
) -> None:
    others = gpus[:-1]
    for gpu in others:
        gpu.tell(Rank.open, store.port, len(gpus), "first", DEADLINE_S)
    gpus[-1].ask(Rank.arrive, store.port, len(gpus), "first")
    gpus[-1].signal(signal.SIGKILL)
    for gpu in others:
        kind, text, seconds = gpu.answer()
        print(f"\nafter {seconds:.2f} s {kind}: {text}")
        assert kind in ("DeadlineExceeded", "TransportError")
        assert seconds < DEADLINE_S + 2 * SLACK_S
    gpus[-1].end()
    gpus[-1] = RankProcess("nccl", len(gpus) - 1)
    open_all(gpus, store.port, "second")
    assert all(everywhere(gpus, Rank.broadcast, MANY, 0, 6, LONG_S))


@pytest.mark.gpu
def test_wires_that_are_closed_leave_no_memory_behind(gpus: list[RankProcess], store: StoreServer) -> None:
    used = []
    for turn in range(8):
        open_all(gpus, store.port, f"turn {turn}")
        assert all(everywhere(gpus, Rank.broadcast, 1 << 20, 0, turn, LONG_S))
        during = everywhere(gpus, Rank.used_bytes)
        everywhere(gpus, Rank.close)
        used.append(everywhere(gpus, Rank.used_bytes))
        print(f"\nwire {turn}: {max(during) >> 20} MiB used while it is open, {max(used[-1]) >> 20} MiB after")
    assert max(used[-1]) - max(used[1]) < 16 << 20
