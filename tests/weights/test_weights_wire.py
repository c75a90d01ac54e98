"""A wire: its deadlines over a fake channel, and gloo between threads and between processes that are killed and
stopped."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from fakes.wire_rank import Rank, RankProcess, contents
from torch import Tensor

from weights.errors import DeadlineExceeded, TransportError
from weights.wire import ChannelWire, Wire, open_wire, serve_store
from weights.wires.limit import Errand
from weights.wires.meeting import Meeting, StoreServer

pytestmark = pytest.mark.processes

CPU = torch.device("cpu")
LONG_S = 30.0
SHORT_S = 0.2
SLACK_S = 2.5
"""What a machine with two busy cores may add to a deadline."""
LARGE = 192 << 20
"""More than the sockets between two processes hold, so that a root depends on its peers."""


class FakeTransfer:
    def __init__(self) -> None:
        self.starts = True
        self.ends = False
        self.fault: str | None = None

    def begun(self) -> bool:
        self._raise()
        return self.starts

    def done(self) -> bool:
        self._raise()
        return self.ends

    def _raise(self) -> None:
        if self.fault is not None:
            raise TransportError(self.fault)


class FakeChannel:
    """Its transfers end when the test says so."""

    def __init__(self, transfers: list[FakeTransfer], stopping: Callable[[], None] = lambda: None) -> None:
        self.device = CPU
        self.transfers = transfers
        self.started: list[tuple[int, int]] = []
        self.stops = 0
        self.refusal: str | None = None
        self._stopping = stopping

    def start(self, data: Tensor, root: int, deadline_s: float) -> FakeTransfer:
        if self.refusal is not None:
            raise TransportError(self.refusal)
        self.started.append((data.numel(), root))
        return self.transfers[len(self.started) - 1]

    def stop(self) -> None:
        self._stopping()
        self.stops += 1


def wire_over(channel: FakeChannel, *, stop_s: float = LONG_S) -> ChannelWire:
    return ChannelWire(channel, name="wire 'a'", rank=1, size=3, stop_s=stop_s)


def some_bytes() -> Tensor:
    return torch.zeros(100, dtype=torch.uint8)


def test_two_broadcasts_are_in_flight_before_the_first_has_ended() -> None:
    first, second = FakeTransfer(), FakeTransfer()
    channel = FakeChannel([first, second])
    wire = wire_over(channel)
    posted = [wire.post(some_bytes(), 0, LONG_S), wire.post(some_bytes()[:7], 2, LONG_S)]
    assert channel.started == [(100, 0), (7, 2)]
    first.ends = second.ends = True
    for sending in posted:
        sending.wait()
    assert wire.alive
    assert channel.stops == 0


def test_a_broadcast_that_does_not_end_is_named_at_its_deadline_and_ends_the_wire() -> None:
    channel = FakeChannel([FakeTransfer()])
    wire = wire_over(channel)
    began = time.monotonic()
    with pytest.raises(
        DeadlineExceeded, match=r"rank 1 of wire 'a': a broadcast of 100 bytes from rank 2 did not end within 0\.2 s"
    ):
        wire.broadcast(some_bytes(), 2, SHORT_S)
    assert SHORT_S <= time.monotonic() - began < SHORT_S + SLACK_S
    assert channel.stops == 1
    assert not wire.alive
    with pytest.raises(TransportError, match=r"wire 'a' has ended \(rank 1 .* did not end .*\): open another one"):
        wire.broadcast(some_bytes(), 0, LONG_S)
    assert len(channel.started) == 1
    assert channel.stops == 1


def test_a_broadcast_that_does_not_even_begin_has_the_same_deadline() -> None:
    transfer = FakeTransfer()
    transfer.starts = False
    channel = FakeChannel([transfer])
    with pytest.raises(DeadlineExceeded, match="did not end within"):
        wire_over(channel).post(some_bytes(), 0, SHORT_S)
    assert channel.stops == 1


def test_the_deadline_of_a_posted_broadcast_counts_from_its_posting() -> None:
    wire = wire_over(FakeChannel([FakeTransfer()]))
    sending = wire.post(some_bytes(), 0, SHORT_S)
    time.sleep(2 * SHORT_S)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        sending.wait()
    assert time.monotonic() - began < SHORT_S


def test_what_the_channel_says_of_a_failure_is_passed_on_and_ends_the_wire() -> None:
    transfer = FakeTransfer()
    transfer.fault = "rank 2 is gone"
    channel = FakeChannel([transfer])
    wire = wire_over(channel)
    with pytest.raises(TransportError, match="a broadcast of 100 bytes from rank 0 failed: rank 2 is gone"):
        wire.broadcast(some_bytes(), 0, LONG_S)
    assert not wire.alive
    assert channel.stops == 1


def test_a_broadcast_that_the_channel_refuses_ends_the_wire_too() -> None:
    channel = FakeChannel([])
    channel.refusal = "no more"
    wire = wire_over(channel)
    with pytest.raises(TransportError, match="cannot begin: no more"):
        wire.broadcast(some_bytes(), 0, LONG_S)
    assert channel.stops == 1


def test_who_waits_while_the_wire_is_aborted_hears_it_once_nothing_writes_any_more() -> None:
    held, stopping = threading.Event(), threading.Event()

    def stop() -> None:
        stopping.set()
        assert held.wait(LONG_S)

    channel = FakeChannel([FakeTransfer()], stop)
    wire = wire_over(channel)
    sending = wire.post(some_bytes(), 0, LONG_S)
    with ThreadPoolExecutor(2) as threads:
        waiting = threads.submit(sending.wait)
        aborting = threads.submit(wire.abort)
        assert stopping.wait(LONG_S)
        time.sleep(SHORT_S)
        assert not waiting.done()
        held.set()
        aborting.result(LONG_S)
        with pytest.raises(TransportError, match=r"wire 'a' has ended \(it was aborted\)"):
            waiting.result(LONG_S)
    assert channel.stops == 1


def test_a_wire_that_cannot_be_stopped_says_that_it_may_still_write() -> None:
    forever = threading.Event()
    channel = FakeChannel([FakeTransfer()], lambda: bool(forever.wait(LONG_S)) and None)
    wire = wire_over(channel, stop_s=SHORT_S)
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"could not be stopped within 0\.2 s, and may still write"):
        wire.broadcast(some_bytes(), 0, SHORT_S)
    assert time.monotonic() - began < 2 * SHORT_S + SLACK_S
    forever.set()


def test_a_wire_that_fails_to_stop_says_that_it_may_still_write() -> None:
    def stop() -> None:
        raise TransportError("the device is lost")

    with pytest.raises(DeadlineExceeded, match="may still write to its tensors: the device is lost"):
        wire_over(FakeChannel([FakeTransfer()], stop)).broadcast(some_bytes(), 0, SHORT_S)


def test_a_wire_is_closed_once_and_is_of_no_use_then() -> None:
    channel = FakeChannel([])
    wire = wire_over(channel)
    wire.close()
    wire.close()
    assert channel.stops == 1
    assert not wire.alive
    with pytest.raises(TransportError, match=r"has ended \(it was closed\)"):
        wire.post(some_bytes(), 0, LONG_S)


def test_no_bytes_need_no_peers() -> None:
    channel = FakeChannel([])
    wire_over(channel).broadcast(some_bytes()[:0], 0, SHORT_S)
    assert channel.started == []


@pytest.mark.parametrize(
    ("data", "root", "deadline_s", "said"),
    [
        (torch.zeros(4), 0, 1.0, r"flat, contiguous uint8, got torch.float32 of shape \(4,\)"),
        (torch.zeros(2, 2, dtype=torch.uint8), 0, 1.0, r"got torch.uint8 of shape \(2, 2\)"),
        (torch.zeros(8, dtype=torch.uint8)[::2], 0, 1.0, "contiguous"),
        (torch.zeros(4, dtype=torch.uint8, device="meta"), 0, 1.0, "carries bytes on cpu, got a tensor on meta"),
        (torch.zeros(4, dtype=torch.uint8), 3, 1.0, "has ranks 0 to 2, got root 3"),
        (torch.zeros(4, dtype=torch.uint8), -1, 1.0, "got root -1"),
        (torch.zeros(4, dtype=torch.uint8), 0, 0.0, "got a deadline of 0.0 s"),
    ],
)
def test_a_mistaken_broadcast_is_refused_and_the_wire_lives_on(
    data: Tensor, root: int, deadline_s: float, said: str
) -> None:
    wire = wire_over(FakeChannel([]))
    with pytest.raises(ValueError, match=said):
        wire.broadcast(data, root, deadline_s)
    assert wire.alive


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"backend": "mpi"}, "nccl or gloo, got 'mpi'"),
        ({"size": 1}, "got rank 0 of 1"),
        ({"rank": 2}, "got rank 2 of 2"),
        ({"rank": -1}, "got rank -1 of 2"),
        ({"device": torch.device("cuda", 0)}, "gloo works on the CPU, got cuda:0"),
        ({"backend": "nccl"}, "nccl works on a GPU with its index, got cpu"),
        ({"backend": "nccl", "device": torch.device("cuda")}, "a GPU with its index, got cuda"),
        ({"deadline_s": 0.0}, "got a deadline of 0.0 s"),
    ],
)
def test_a_wire_that_cannot_be_is_refused_at_once(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        open_rank(0, 1, **({"size": 2} | changed))


@pytest.fixture
def store() -> Iterator[StoreServer]:
    with serve_store() as server:
        yield server


def open_rank(number: int, port: int, **changed: Any) -> Wire:
    known: dict[str, Any] = {"backend": "gloo", "store_host": "127.0.0.1", "store_port": port, "rank": number}
    known |= {"size": 3, "device": CPU, "deadline_s": LONG_S, "prefix": "a"}
    return open_wire(**(known | changed))


def test_a_rank_that_finds_nobody_says_who_did_not_come(store: StoreServer) -> None:
    began = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"rank 1 waited 0\.2 s for the wire 'a' .* did not come: 0, 2"):
        open_rank(1, store.port, deadline_s=SHORT_S)
    assert time.monotonic() - began < SHORT_S + SLACK_S


def test_a_wire_without_a_store_is_refused_by_the_deadline() -> None:
    with serve_store() as server:
        port = server.port
    began = time.monotonic()
    with pytest.raises(TransportError, match=f"the store at 127.0.0.1:{port} "):
        open_rank(0, port, deadline_s=1.0)
    assert time.monotonic() - began < 1.0 + SLACK_S


def test_a_port_that_is_taken_is_refused(store: StoreServer) -> None:
    with pytest.raises(TransportError, match=f"cannot serve a store on port {store.port}"):
        serve_store(store.port)


def test_ranks_broadcast_in_turn_and_a_used_name_is_refused(store: StoreServer) -> None:
    sizes = [1, 4095, 1_000_003]

    def rank(number: int) -> None:
        wire = open_rank(number, store.port)
        assert (wire.rank, wire.size, wire.alive) == (number, 3, True)
        for turn, size in enumerate(sizes):
            data = contents(size, turn) if number == turn else torch.full((size,), 255, dtype=torch.uint8)
            wire.broadcast(data, turn, LONG_S)
            assert torch.equal(data, contents(size, turn))
        parts = [contents(5000, part) if number == 0 else torch.zeros(5000, dtype=torch.uint8) for part in range(2)]
        posted = [wire.post(part, 0, LONG_S) for part in parts]
        for sending in posted:
            sending.wait()
        assert all(torch.equal(part, contents(5000, number)) for number, part in enumerate(parts))
        wire.close()

    with ThreadPoolExecutor(3) as threads:
        for opened in [threads.submit(rank, number) for number in range(3)]:
            opened.result(LONG_S)
    with pytest.raises(ValueError, match="rank 0 came to the meeting 'a' before"):
        open_rank(0, store.port)


def test_an_errand_that_nobody_waits_for_any_more_hands_its_result_over() -> None:
    go, handed = threading.Event(), threading.Event()
    got: list[int] = []

    def call() -> int:
        assert go.wait(LONG_S)
        return 7

    def unclaimed(result: int) -> None:
        got.append(result)
        handed.set()

    errand = Errand(call, "a test's", unclaimed=unclaimed)
    with pytest.raises(TimeoutError):
        errand.result(0.01)
    go.set()
    assert handed.wait(LONG_S)
    assert got == [7]


def test_an_errand_returns_and_raises_what_its_call_does() -> None:
    def fails() -> None:
        raise TransportError("no")

    assert Errand(lambda: 5, "a test's", unclaimed=lambda result: pytest.fail("it was claimed")).result(LONG_S) == 5
    with pytest.raises(TransportError, match="no"):
        Errand(fails, "a test's").result(LONG_S)


@pytest.fixture
def ranks() -> Iterator[list[RankProcess]]:
    processes = [RankProcess("gloo", rank) for rank in range(3)]
    yield processes
    for process in processes:
        process.end()


def open_all(ranks: list[RankProcess], port: int, prefix: str) -> None:
    for rank in ranks:
        rank.tell(Rank.open, port, len(ranks), prefix, LONG_S)
    for rank in ranks:
        kind, text, _ = rank.answer()
        assert kind == "ok", text


def all_broadcast(ranks: list[RankProcess], seed: int) -> None:
    for rank in ranks:
        rank.tell(Rank.broadcast, 100_000, 0, seed, LONG_S)
    for rank in ranks:
        assert rank.answer()[:2] == ("ok", True)


@pytest.mark.parametrize("lost", [0, 2])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_a_peer_lost_in_a_broadcast_costs_every_survivor_no_more_than_the_deadline(
    ranks: list[RankProcess], store: StoreServer, lost: int, number: signal.Signals
) -> None:
    deadline_s = 2.0
    open_all(ranks, store.port, "first")
    all_broadcast(ranks, 1)
    for rank in ranks:
        rank.tell(Rank.stream, LARGE, deadline_s)
    time.sleep(1.0)
    ranks[lost].signal(number)
    survivors = [rank for place, rank in enumerate(ranks) if place != lost]
    lost_at = time.monotonic()
    for rank in survivors:
        kind, text, _ = rank.answer()
        assert kind in ("DeadlineExceeded", "TransportError"), text
        assert "of wire 'first': a broadcast of" in text
        assert "may still write" not in text
    assert time.monotonic() - lost_at < deadline_s + SLACK_S
    if number == signal.SIGSTOP:
        ranks[lost].signal(signal.SIGCONT)  # it wakes to a wire of which all others are gone
        assert ranks[lost].answer()[0] in ("DeadlineExceeded", "TransportError")
    else:
        ranks[lost].end()
        ranks[lost] = RankProcess("gloo", lost)
    open_all(ranks, store.port, "second")
    all_broadcast(ranks, 2)


def test_a_peer_that_takes_no_part_is_waited_for_until_the_deadline(
    ranks: list[RankProcess], store: StoreServer
) -> None:
    open_all(ranks, store.port, "first")
    ranks[1].tell(Rank.broadcast, 1000, 0, 1, 1.0)
    kind, text, seconds = ranks[1].answer()
    assert kind == "DeadlineExceeded"
    assert "rank 1 of wire 'first'" in text
    assert 1.0 <= seconds < 1.0 + SLACK_S


def test_a_peer_that_dies_while_the_wire_is_opened_costs_the_deadline(
    ranks: list[RankProcess], store: StoreServer
) -> None:
    deadline_s = 3.0
    for rank in ranks[:2]:
        rank.tell(Rank.open, store.port, 3, "first", deadline_s)
    ranks[2].ask(Rank.arrive, store.port, 3, "first")
    ranks[2].signal(signal.SIGKILL)
    for rank in ranks[:2]:
        kind, text, seconds = rank.answer()
        assert kind in ("DeadlineExceeded", "TransportError"), text
        assert seconds < deadline_s + SLACK_S
    ranks[2].end()
    ranks[2] = RankProcess("gloo", 2)
    open_all(ranks, store.port, "second")
    all_broadcast(ranks, 3)


def test_a_store_whose_process_is_stopped_costs_the_deadline(ranks: list[RankProcess]) -> None:
    port = ranks[0].ask(Rank.serve)
    ranks[0].signal(signal.SIGSTOP)
    kind, text, seconds = ranks[1].tell(Rank.open, port, 3, "first", 1.0).answer()
    assert kind == "DeadlineExceeded", text
    assert f"rank 1 waited 1.0 s for the wire 'first' to open: the store at 127.0.0.1:{port} did not answer" in text
    assert seconds < 1.0 + SLACK_S
    ranks[0].signal(signal.SIGCONT)


def test_a_store_that_dies_while_ranks_wait_is_named(ranks: list[RankProcess]) -> None:
    port = ranks[0].ask(Rank.serve)
    ranks[1].tell(Rank.open, port, 3, "first", LONG_S)
    time.sleep(1.0)
    ranks[0].signal(signal.SIGKILL)
    kind, text, seconds = ranks[1].answer()
    assert kind == "TransportError"
    assert f"the store at 127.0.0.1:{port} is gone" in text
    assert seconds < LONG_S / 2


def test_a_meeting_finds_the_address_to_listen_on() -> None:
    meeting = Meeting("127.0.0.1", 1, rank=0, size=2, prefix="a", deadline_s=1.0)
    assert meeting.own_address() == "127.0.0.1"
