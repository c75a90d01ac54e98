"""A learner whose ranks hold shards: every rank walks the same way, none hangs, and the bits are the whole model's."""

import json
import math
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from fakes.sharded_rank import LAYERS, Answer, Order, loose_tensors, model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from weights.naming import to_wire
from weights.sharded import gathered, rounded, take_part

pytestmark = pytest.mark.processes

ROOT = Path(__file__).parents[2]
PATIENCE_S = 120.0
GROUP_TIMEOUT_S = 6.0
DEADLINE_S = 2.0
GRACE_S = 4.0
"""What a loaded machine may add to a deadline."""


class Rank:
    """A process of fakes.sharded_rank, whose answers are never waited for in vain."""

    def __init__(self, device: str, rank: int, size: int, store: Path, timeout_s: float) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "fakes.sharded_rank", device, str(rank), str(size), str(store), str(timeout_s)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT}", "OMP_NUM_THREADS": "1"},
        )
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def order(self, order: Order) -> None:
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps(asdict(order)) + "\n")
        self.popen.stdin.flush()

    def answer(self) -> Answer:
        line = self._lines.get(timeout=PATIENCE_S)
        assert line, "the rank has ended"
        return Answer(**json.loads(line))

    def end(self) -> None:
        self.popen.send_signal(signal.SIGKILL)
        self.popen.wait()
        self._reader.join()
        for pipe in (self.popen.stdin, self.popen.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()

    def _read(self) -> None:
        assert self.popen.stdout is not None
        for line in self.popen.stdout:
            self._lines.put(line)
        self._lines.put("")


@contextmanager
def learner(folder: Path, *, device: str = "cpu", size: int = 2, timeout_s: float = 60.0) -> Iterator[list[Rank]]:
    """The ranks of one learner, each in its process."""
    ranks = [Rank(device, rank, size, folder / "store", timeout_s) for rank in range(size)]
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.end()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Rank]]:
    """Two ranks that stay in step from one test to the next: that they do is part of what is tested."""
    with learner(tmp_path_factory.mktemp("ranks")) as ranks:
        yield ranks


def carry_out(ranks: Sequence[Rank], **order: Any) -> list[Answer]:
    for rank in ranks:
        rank.order(Order(**order))
    return [rank.answer() for rank in ranks]


def whole() -> dict[str, Tensor]:
    return dict(model(LAYERS).state_dict())


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(
            found[name].contiguous().view(-1).view(torch.uint8), tensor.contiguous().view(-1).view(torch.uint8)
        ), name


# What comes.


@pytest.mark.parametrize("source", ["module", "wrapped", "hybrid", "used"])
@pytest.mark.parametrize("publisher", [0, 1])
def test_a_sharded_module_is_gathered_as_the_whole_models_state_dict(
    ranks: list[Rank], tmp_path: Path, source: str, publisher: int
) -> None:
    out = tmp_path / "out.safetensors"
    answers = carry_out(ranks, source=source, publishers=[publisher], out=str(out))
    assert [answer.error for answer in answers] == ["", ""]
    expected = whole()
    assert answers[publisher].names == list(expected), "in the order and under the names of the whole state dict"
    assert_same_bits(load_file(out), expected)


def test_a_rank_never_holds_more_than_three_full_tensors(ranks: list[Rank], tmp_path: Path) -> None:
    answers = carry_out(ranks, out=str(tmp_path / "out.safetensors"))
    for answer in answers:
        assert len(answer.dtypes) == len(whole())
        assert answer.most_alive <= 3, "the one in use, the next, and one on its way"
        assert answer.left_alive == 0


def test_any_placement_and_any_size_is_gathered_and_what_is_not_sharded_passes_through(
    ranks: list[Rank], tmp_path: Path
) -> None:
    out = tmp_path / "out.safetensors"
    answers = carry_out(ranks, source="loose", out=str(out))
    assert [answer.error for answer in answers] == ["", ""]
    assert answers[0].names == list(loose_tensors())
    assert_same_bits(load_file(out), loose_tensors())


def test_a_module_without_shards_needs_no_other_rank() -> None:
    plain = model(1)
    take_part(plain)
    with gathered(plain) as pairs:
        assert {name: tensor.data_ptr() for name, tensor in pairs} == {
            name: tensor.data_ptr() for name, tensor in plain.state_dict().items()
        }


def test_wrappers_leave_no_trace_in_the_names() -> None:
    wrapped = {"_orig_mod.model.layers.0._checkpoint_wrapped_module.norm.weight": torch.ones(2)}
    assert [name for name, _ in gathered(wrapped)] == ["model.layers.0.norm.weight"]


def test_a_state_dict_with_a_name_twice_or_with_no_tensor_is_refused_naming_all() -> None:
    state: dict[str, Any] = {"a": torch.ones(1), "_orig_mod.a": torch.ones(1), "b._extra_state": b"bytes"}
    with pytest.raises(ValueError, match=r"_orig_mod\.a: a is there already\n  b\._extra_state: bytes, expected"):
        gathered(state)


# Wider masters.


def test_masters_are_rounded_before_they_travel_and_only_where_the_hosts_store_less(
    ranks: list[Rank], tmp_path: Path
) -> None:
    expected = {
        name: tensor if name.endswith("gate.weight") else tensor.to(torch.bfloat16) for name, tensor in whole().items()
    }
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in to_wire(expected.items())}
    out = tmp_path / "out.safetensors"
    answers = carry_out(ranks, dtypes=dtypes, out=str(out))
    assert_same_bits(load_file(out), expected)
    travelled = [str(tensor.dtype) for tensor in expected.values()]
    assert [answer.dtypes for answer in answers] == [travelled, travelled], "the rank that takes part rounds the same"
    assert {"torch.float32", "torch.bfloat16"} == set(travelled)


PATTERNS = [0.0, -0.0, 1.0, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 3.4e38, 1e-40, math.inf, -math.inf, math.nan]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(values=st.lists(st.floats(width=32) | st.sampled_from(PATTERNS), min_size=1, max_size=50))
def test_rounding_is_that_of_tensor_to(dtype: torch.dtype, values: list[float]) -> None:
    master = torch.tensor(values, dtype=torch.float32, requires_grad=True)
    [(name, found)] = rounded([("w", master)], {"w": dtype})
    assert (name, found.dtype, found.requires_grad) == ("w", dtype, False)
    assert torch.equal(found.view(torch.int16), master.detach().to(dtype).view(torch.int16))


def test_rounding_is_to_the_nearest_with_ties_to_even() -> None:
    [(_, found)] = rounded([("w", torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20]))], {"w": torch.bfloat16})
    assert found.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


@pytest.mark.parametrize(
    ("held", "stored"),
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
        (torch.float32, torch.int8),
        (torch.float32, None),
    ],
)
def test_what_would_not_be_rounded_is_passed_through_as_it_is(held: torch.dtype, stored: torch.dtype | None) -> None:
    tensor = torch.ones(3, dtype=held)
    [(_, found)] = rounded([("w", tensor)], {} if stored is None else {"w": stored})
    assert found is tensor


# What goes wrong.


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_a_publisher_that_fails_ends_the_others_at_once_and_all_stay_in_step(
    ranks: list[Rank], tmp_path: Path, taken: int
) -> None:
    publisher, other = carry_out(ranks, fail_after=taken)
    assert publisher.error == f"Failed: after {taken} tensors"
    assert other.error.startswith("UpdateAborted: rank 0, which publishes, gave up before ")
    assert other.left_alive == 0
    out = tmp_path / "out.safetensors"
    again = carry_out(ranks, out=str(out))
    assert [answer.error for answer in again] == ["", ""]
    assert_same_bits(load_file(out), whole())


@pytest.mark.parametrize(
    ("refused", "error"),
    [("host", "UpdateAborted: the fleet has no host"), ("step", "ValueError: a step is in")],
)
def test_an_update_that_is_refused_before_it_is_read_ends_the_others_at_once(
    ranks: list[Rank], tmp_path: Path, refused: str, error: str
) -> None:
    publisher, other = carry_out(ranks, refused=refused, deadline_s=2 * DEADLINE_S)
    assert publisher.error.startswith(error)
    assert other.error.startswith("UpdateAborted: rank 0, which publishes, gave up before ")
    assert publisher.dtypes == other.dtypes == [], "nothing was gathered"
    assert [answer.error for answer in carry_out(ranks, out=str(tmp_path / "out.safetensors"))] == ["", ""]


def test_a_gathering_that_ended_stays_ended() -> None:
    pairs = gathered({"a": torch.ones(1), "b": torch.ones(1)})
    assert next(pairs)[0] == "a"
    pairs.close()
    pairs.close()
    assert list(pairs) == []


@pytest.mark.parametrize(
    ("order", "error"),
    [
        ({"publishers": []}, "ValueError: every rank of the learner takes part and none publishes"),
        ({"publishers": [0, 1]}, "ValueError: ranks 0 and 1 both publish"),
        ({"layers": [3, 2]}, "ValueError: the learner's ranks hold different tensors: this one lists"),
        ({"experts": [5, 6]}, "ValueError: the learner's ranks hold different tensors: this one lists"),
    ],
    ids=["none publishes", "two publish", "other layers", "other shapes"],
)
def test_ranks_that_disagree_are_all_told_so_and_stay_in_step(
    ranks: list[Rank], tmp_path: Path, order: dict[str, Any], error: str
) -> None:
    for answer in carry_out(ranks, **order):
        assert answer.error.startswith(error)
        assert answer.dtypes == [], "nothing was gathered"
    assert [answer.error for answer in carry_out(ranks, out=str(tmp_path / "out.safetensors"))] == ["", ""]


@pytest.mark.parametrize(
    ("name", "at", "error"),
    [
        ("SIGKILL", 0, "TransportError: rank 0: another rank of the learner is gone"),
        ("SIGKILL", 7, "TransportError: "),
        ("SIGSTOP", 0, "DeadlineExceeded: rank 0 waited 2."),
        ("SIGSTOP", 7, "TransportError: "),
    ],
)
def test_a_rank_that_dies_or_stops_holds_nobody_up_for_long(tmp_path: Path, name: str, at: int, error: str) -> None:
    """Inside a layer gloo's own timeout bounds the wait, at a roll call the deadline."""
    with learner(tmp_path, timeout_s=GROUP_TIMEOUT_S) as ranks:
        assert [answer.error for answer in carry_out(ranks, out=str(tmp_path / "out.safetensors"))] == ["", ""]
        for rank in ranks:
            rank.order(Order(signal=name, signal_at=at, deadline_s=DEADLINE_S))
        survivor = ranks[0].answer()
    assert survivor.error.startswith(error)
    assert survivor.seconds <= (DEADLINE_S if at == 0 else GROUP_TIMEOUT_S) + GRACE_S


def test_a_deadline_is_positive() -> None:
    with pytest.raises(ValueError, match="a deadline is positive, got 0"):
        take_part({}, deadline_s=0)


# On GPUs: as many ranks as there are, two at the most.


@pytest.mark.gpu
@pytest.mark.parametrize("source", ["module", "offloaded"])
def test_shards_on_gpus_are_gathered_over_nccl(tmp_path: Path, source: str) -> None:
    size = min(2, torch.cuda.device_count())
    out = tmp_path / "out.safetensors"
    with learner(tmp_path, device="cuda", size=size) as ranks:
        answers = carry_out(ranks, source=source, out=str(out))
        assert [answer.error for answer in answers] == [""] * size
        assert_same_bits(load_file(out), whole())
        if size == 2:
            failed = carry_out(ranks, source=source, fail_after=5)
            assert [answer.error.split(":")[0] for answer in failed] == ["Failed", "UpdateAborted"]
            again = carry_out(ranks, source=source, out=str(out))
            assert [answer.error for answer in again] == ["", ""]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two ranks over NCCL need two GPUs")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGSTOP"])
@pytest.mark.parametrize("at", [0, 7])
def test_over_nccl_a_lost_rank_ends_in_the_deadline(tmp_path: Path, name: str, at: int) -> None:
    with learner(tmp_path, device="cuda") as ranks:
        assert [answer.error for answer in carry_out(ranks, out=str(tmp_path / "out.safetensors"))] == ["", ""]
        for rank in ranks:
            rank.order(Order(signal=name, signal_at=at, deadline_s=DEADLINE_S))
        survivor = ranks[0].answer()
    assert survivor.error.split(":")[0] in ("DeadlineExceeded", "TransportError")
    assert survivor.seconds <= DEADLINE_S + GRACE_S
