"""Which orders PyTorch uses is found by asking it: here this machine's, and PyTorches that add or rank otherwise."""

import dataclasses
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from router_specs import SPECS, make_spec
from torch import Tensor

from routing import GroupSpec, SumOrder
from routing.arithmetic import CudaArithmetic, EagerArithmetic
from routing.orders import SEQUENTIAL, probe_orders, rounded_sum

CPU = torch.device("cpu")
HERE = Path(__file__).resolve().parent


class Sequential(CudaArithmetic):
    """A PyTorch whose sum has no kernel here."""

    def sum(self, rows_TW: Tensor) -> Tensor:
        return rounded_sum(SEQUENTIAL, rows_TW)


class FewRowsOtherwise(CudaArithmetic):
    """A PyTorch that adds a few rows in another order than many."""

    def sum(self, rows_TW: Tensor) -> Tensor:
        return rounded_sum(SumOrder.ADJACENT if len(rows_TW) < 100 else SumOrder.HALVING, rows_TW)


class LastOfEqualsFirst(CudaArithmetic):
    """A PyTorch whose topk takes the last of equal values."""

    def topk(self, rows_TW: Tensor, k: int, *, is_sorted: bool) -> Tensor:
        return rows_TW.shape[1] - 1 - super().topk(rows_TW.flip(1), k, is_sorted=is_sorted)


class NanLast(CudaArithmetic):
    """A PyTorch whose topk ranks NaN lowest."""

    def topk(self, rows_TW: Tensor, k: int, *, is_sorted: bool) -> Tensor:
        return super().topk(torch.where(rows_TW.isnan(), -torch.inf, rows_TW), k, is_sorted=is_sorted)


@pytest.mark.parametrize("order", SumOrder)
@pytest.mark.parametrize("name", SPECS)
def test_every_order_of_cuda_is_recognised(name: str, order: SumOrder) -> None:
    orders = probe_orders(SPECS[name], CPU, arithmetic=CudaArithmetic(order))
    assert order in orders.sums
    assert orders.softmax_over_experts
    assert orders.softmax_over_slots
    assert orders.sorted_slots
    assert orders.unsorted_slots
    assert orders.tied_slots
    assert orders.special_ranks


@pytest.mark.parametrize("K", [4, 6, 8, 10, 12, 16, 22])
def test_halving_adjacent_and_sequential_are_told_apart(K: int) -> None:
    spec = make_spec(num_experts=64, top_k=K)
    for arithmetic, order in (
        (CudaArithmetic(SumOrder.HALVING), SumOrder.HALVING),
        (CudaArithmetic(SumOrder.ADJACENT), SumOrder.ADJACENT),
        (Sequential(), SEQUENTIAL),
    ):
        assert probe_orders(spec, CPU, arithmetic=arithmetic).sums == (order,)


def test_two_slots_add_alike_in_every_order() -> None:
    orders = probe_orders(make_spec(top_k=2), CPU)
    assert orders.sums == (SumOrder.HALVING, SumOrder.ADJACENT, SEQUENTIAL)
    assert orders.sum_order is SumOrder.HALVING


def test_an_order_that_no_kernel_has_picks_none() -> None:
    orders = probe_orders(make_spec(top_k=8), CPU, arithmetic=Sequential())
    assert orders.sum_order is None


def test_this_machines_cpu_adds_eight_slots_one_by_one_and_six_in_another_way() -> None:
    assert probe_orders(make_spec(top_k=8, num_experts=32), CPU).sums == (SEQUENTIAL,)
    assert probe_orders(make_spec(top_k=6), CPU).sums == ()
    assert probe_orders(make_spec(top_k=8, num_experts=32), CPU).elementwise == ()


def test_an_order_that_follows_the_number_of_rows_is_none() -> None:
    assert probe_orders(make_spec(top_k=8), CPU, arithmetic=FewRowsOtherwise()).sums == ()


def test_a_groups_best_have_to_add_in_the_same_order() -> None:
    class GroupsOtherwise(CudaArithmetic):
        def sum(self, rows_TW: Tensor) -> Tensor:
            return rounded_sum(SumOrder.ADJACENT if rows_TW.shape[1] == 5 else SumOrder.HALVING, rows_TW)

    spec = make_spec(num_experts=32, top_k=8, groups=GroupSpec(count=4, kept=2, top=5))
    orders = probe_orders(spec, CPU, arithmetic=GroupsOtherwise())
    assert (orders.sums, orders.group_sums) == ((SumOrder.HALVING,), (SumOrder.ADJACENT,))
    assert orders.sum_order is None


def test_ties_and_nan_that_rank_otherwise_are_seen_apart_from_the_slots() -> None:
    tied = probe_orders(make_spec(), CPU, arithmetic=LastOfEqualsFirst())
    assert (tied.sorted_slots, tied.unsorted_slots, tied.tied_slots) == (True, False, False)
    nan = probe_orders(make_spec(), CPU, arithmetic=NanLast())
    assert (nan.sorted_slots, nan.unsorted_slots, nan.tied_slots, nan.special_ranks) == (True, True, True, False)


@pytest.mark.parametrize("K", [33, 70])
def test_more_slots_than_cuda_is_known_for_are_no_error(K: int) -> None:
    orders = probe_orders(make_spec(num_experts=128, top_k=K, platform="cpu"), CPU)
    assert not orders.sorted_slots


@pytest.mark.parametrize("chain", [torch.bfloat16, torch.float16, torch.float64])
def test_a_chain_in_another_dtype_is_asked_in_it(chain: torch.dtype) -> None:
    asked = set()

    class Recording(EagerArithmetic):
        def sum(self, rows_TW: Tensor) -> Tensor:
            asked.add(rows_TW.dtype)
            return super().sum(rows_TW)

    probe_orders(make_spec(chain_dtype=chain), CPU, arithmetic=Recording())
    assert asked == {chain}


def test_what_elementwise_functions_are_compared_with_compiles_to_ieee_operations(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(HERE.parent.parent), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, str(HERE / "compile_elementwise.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "div.rn.f32" in done.stdout
    assert "sqrt.rn.f32" in done.stdout
    assert "div.full" not in done.stdout
    assert "sqrt.approx" not in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("name", SPECS)
def test_the_gpus_orders_are_those_that_the_kernel_has(name: str, cuda: torch.device) -> None:
    orders = probe_orders(SPECS[name], cuda)
    assert orders.sum_order is not None
    assert dataclasses.replace(orders, sums=(), group_sums=(), elementwise=()) == dataclasses.replace(
        orders, sums=(), group_sums=(), elementwise=(), softmax_over_experts=True, softmax_over_slots=True,
        sorted_slots=True, unsorted_slots=True, tied_slots=True, special_ranks=True,
    )  # fmt: skip
    assert [probed for probed in orders.elementwise if probed.differing] == []
    assert len(orders.elementwise) == 6


@pytest.mark.gpu
def test_asking_the_gpu_takes_little_time(cuda: torch.device) -> None:
    probe_orders(SPECS["glm4"], cuda)  # compiles
    start_s = time.perf_counter()
    probe_orders(SPECS["glm4"], cuda)
    assert time.perf_counter() - start_s < 1
