"""The written-out orders of eager CUDA PyTorch, against literal trees, literal slot orders and fp64."""

import itertools
import math

import pytest
import torch
from router_rows import BF16, bits

from routing import (
    SumOrder,
)
from routing.arithmetic import CudaArithmetic
from routing.cuda_order import adjacent_sum, halving_sum, rank_key, softmax, sort_slots, topk_unsorted

TREES = {
    1: "0",
    2: "0+1",
    3: "(0+2)+1",
    4: "(0+2)+(1+3)",
    5: "((0+4)+2)+(1+3)",
    6: "((0+4)+2)+((1+5)+3)",
    7: "((0+4)+(2+6))+((1+5)+3)",
    8: "((0+4)+(2+6))+((1+5)+(3+7))",
    10: "(((0+8)+4)+(2+6))+(((1+9)+5)+(3+7))",
}
ADJACENT_TREES = {
    1: "0",
    2: "0+1",
    3: "(0+2)+1",
    4: "(0+1)+(2+3)",
    5: "((0+4)+1)+(2+3)",
    6: "((0+4)+(1+5))+(2+3)",
    7: "((0+4)+(1+5))+((2+6)+3)",
    8: "((0+1)+(2+3))+((4+5)+(6+7))",
    10: "(((0+8)+(1+9))+(2+3))+((4+5)+(6+7))",
}
"""Of PyTorch 2.9 and before, where a warp's threads add by offsets 1, 2, 4, ..."""
TIE_ORDERS = {
    2: [1, 0],
    4: [1, 0, 2, 3],
    6: [1, 0, 4, 5, 2, 3],
    8: [7, 6, 4, 5, 1, 0, 2, 3],
    10: [7, 6, 4, 5, 1, 0, 2, 3, 8, 9],
}


def by_tree(tree: str, x: torch.Tensor) -> torch.Tensor:
    """The sum that a tree such as "(0+2)+1" spells, over columns."""
    names = {f"x{i}": x[:, i] for i in range(x.shape[1])}
    spelled = "".join(f"x{part}" if part.isdigit() else part for part in _tokens(tree))
    total: torch.Tensor = eval(spelled, names)
    return total.unsqueeze(1)


def _tokens(tree: str) -> list[str]:
    return ["".join(group) for _, group in itertools.groupby(tree, lambda c: "digit" if c.isdigit() else object())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("K", TREES)
def test_the_sum_over_slots_is_the_tree_of_its_order(K: int, dtype: torch.dtype) -> None:
    x = torch.rand(500, K, generator=torch.Generator().manual_seed(K), dtype=dtype)
    halving, adjacent = by_tree(TREES[K], x), by_tree(ADJACENT_TREES[K], x)
    assert bits(halving_sum(x)).tolist() == bits(halving).tolist()
    assert bits(adjacent_sum(x)).tolist() == bits(adjacent).tolist()
    assert bits(CudaArithmetic().sum(x)).tolist() == bits(halving).tolist()
    assert bits(CudaArithmetic(SumOrder.ADJACENT).sum(x)).tolist() == bits(adjacent).tolist()
    assert bits(CudaArithmetic(SumOrder.ADJACENT).abs_sum(-x)).tolist() == bits(adjacent).tolist()


@pytest.mark.parametrize("K", [4, 6, 8, 10])
def test_other_trees_give_other_bits(K: int) -> None:
    x = torch.rand(500, K, generator=torch.Generator().manual_seed(K))
    sequential = "+".join(map(str, range(K)))
    pairs = {4: "(0+1)+(2+3)", 6: "((0+4)+(1+5))+(2+3)", 8: "((0+1)+(2+3))+((4+5)+(6+7))"}.get(K, sequential)
    for tree in (sequential, pairs):
        assert (bits(halving_sum(x)) != bits(by_tree(tree, x))).float().mean() > 0.05


@pytest.mark.parametrize("K", [33, 64])
def test_the_sum_of_more_than_a_warp_halves_as_well(K: int) -> None:
    x = torch.rand(50, K, generator=torch.Generator().manual_seed(K))
    padded = torch.cat([x, torch.zeros(50, 64 - K)], dim=1)
    assert bits(halving_sum(x)).tolist() == bits(halving_sum(padded[:, :32] + padded[:, 32:])).tolist()
    assert bits(adjacent_sum(x)).tolist() == bits(adjacent_sum(padded[:, :32] + padded[:, 32:])).tolist()


def test_orders_that_are_not_established_are_never_computed() -> None:
    for add in (halving_sum, adjacent_sum):
        with pytest.raises(AssertionError, match="65"):
            add(torch.zeros(2, 65))
    with pytest.raises(AssertionError, match="33"):
        sort_slots(torch.zeros(2, 40), torch.arange(33).repeat(2, 1))


def test_a_sum_of_negative_zeros_is_positive_zero() -> None:
    assert bits(halving_sum(torch.full((1, 8), -0.0))).tolist() == [[0]]
    assert bits(adjacent_sum(torch.full((1, 8), -0.0))).tolist() == [[0]]


@pytest.mark.parametrize("E", [2, 8, 32, 60, 64, 160, 512])
def test_softmax_adds_strided_lanes_and_is_near_fp64(E: int) -> None:
    x = torch.randn(20, E, generator=torch.Generator().manual_seed(E)) * 3
    exps = torch.exp(x - x.amax(dim=1, keepdim=True))
    lanes = []
    for lane in range(min(32, E)):
        total = exps[:, lane]
        for strided in range(lane + 32, E, 32):
            total = total + exps[:, strided]
        lanes.append(total)
    assert bits(softmax(x)).tolist() == bits(exps / halving_sum(torch.stack(lanes, dim=1))).tolist()
    torch.testing.assert_close(softmax(x).double(), x.double().softmax(dim=1), rtol=2e-6, atol=0)
    assert (bits(softmax(x)) != bits(exps * (1 / halving_sum(torch.stack(lanes, dim=1))))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, BF16])
@pytest.mark.parametrize("K", TIE_ORDERS)
def test_equal_values_sort_in_the_measured_order(K: int, dtype: torch.dtype) -> None:
    rows = torch.zeros(2, 64, dtype=dtype)
    arithmetic = CudaArithmetic()
    assert arithmetic.topk(rows, K, is_sorted=True).tolist() == [TIE_ORDERS[K]] * 2
    assert arithmetic.topk(rows, K, is_sorted=False).tolist() == [list(range(K))] * 2


def test_unsorted_slots_ascend_with_the_kth_value_last() -> None:
    row = torch.tensor([[0.3, 0.9, 0.1, 0.5, 0.5, 0.7, 0.5]])
    assert topk_unsorted(row, 4).tolist() == [[1, 5, 3, 4]]
    assert topk_unsorted(row, 5).tolist() == [[1, 5, 3, 4, 6]]
    assert topk_unsorted(row, 6).tolist() == [[1, 3, 4, 5, 6, 0]]


def test_the_reported_tie_of_six_values_comes_out_as_reported() -> None:
    """torch.topk([3, 2, 3, 2, 1, 1], 2) gives [2, 0] on CUDA."""
    row = torch.tensor([[3.0, 2.0, 3.0, 2.0, 1.0, 1.0]])
    assert CudaArithmetic().topk(row, 2, is_sorted=True).tolist() == [[2, 0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_ranks_highest_and_positive_zero_above_negative(dtype: torch.dtype) -> None:
    row = torch.tensor([[math.inf, -0.0, math.nan, 0.0, -math.nan, -math.inf]], dtype=dtype)
    arithmetic = CudaArithmetic()
    assert set(arithmetic.topk(row, 2, is_sorted=True)[0].tolist()) == {2, 4}
    assert arithmetic.topk(row, 3, is_sorted=False).tolist() == [[2, 4, 0]]
    assert arithmetic.topk(row, 4, is_sorted=False).tolist() == [[0, 2, 4, 3]]
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0]], dtype=dtype)
    assert arithmetic.topk(zeros, 2, is_sorted=False).tolist() == [[1, 3]]
    assert arithmetic.topk(zeros, 2, is_sorted=True).tolist() == [[3, 1]]  # both zeros tie in the sort


def test_fp64_rows_rank_by_all_their_bits() -> None:
    rows = torch.tensor([[1.0, 1.0 + 2**-50, 1.0 - 2**-50, -1.0, -1.0 - 2**-50]], dtype=torch.float64)
    arithmetic = CudaArithmetic()
    assert arithmetic.topk(rows, 4, is_sorted=True).tolist() == [[1, 0, 2, 3]]
    assert arithmetic.topk(rows, 3, is_sorted=False).tolist() == [[0, 1, 2]]
    extremes = torch.tensor([[math.nan, math.inf, 5e-324, 0.0, -0.0, -5e-324, -1e308, -math.inf]], dtype=torch.float64)
    keys = rank_key(extremes)[0].tolist()
    assert keys == sorted(keys, reverse=True)
    assert len(set(keys)) == len(keys)
