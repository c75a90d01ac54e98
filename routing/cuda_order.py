"""The orders in which eager PyTorch adds and ranks on CUDA, written out in plain operations on fp32 or fp64 rows.

Source: ATen's Reduce.cuh (sum), PersistentSoftmax.cuh (softmax), TensorTopK.cu (choice and slots), SortUtils.cuh
(sorted slots); measured equal on an H200 with PyTorch 2.11. T rows, W their length, K slots.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

WARP = 32
SORT_WIRES = 32
"""torch.topk sorts up to 32 slots in a network of 32 wires; those past the last slot are invalid and end up last."""
MAX_SUMMANDS = 64
"""Beyond it PyTorch adds in another order."""
_INVALID = torch.iinfo(torch.int64).min


def next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def halving_sum(rows_TW: Tensor) -> Tensor:
    """[T, 1]: padded with zeros to a power of two P, then x[i] + x[i + P/2] until one is left.

    Eight elements are added as ((0+4)+(2+6))+((1+5)+(3+7)). Accumulators start at +0.0, so a sum of negative zeros is
    +0.0.
    """
    W = rows_TW.shape[1]
    assert W <= MAX_SUMMANDS, W
    x = pad(rows_TW + 0.0, (0, next_power_of_2(W) - W))
    while x.shape[1] > 1:
        half = x.shape[1] // 2
        x = x[:, :half] + x[:, half:]
    return x


def adjacent_sum(rows_TW: Tensor) -> Tensor:
    """[T, 1]: p[i] = x[i] + x[i + P] with P the largest power of two <= W (at most a warp), then p[0] + p[1], p[2] +
    p[3] and so on, until one is left.

    Eight elements are added as ((0+1)+(2+3))+((4+5)+(6+7)), six as ((0+4)+(1+5))+(2+3).
    """
    W = rows_TW.shape[1]
    assert W <= MAX_SUMMANDS, W
    lanes = min(1 << (W.bit_length() - 1), WARP)
    x = pad(rows_TW + 0.0, (0, 2 * lanes - W))
    x = x[:, :lanes] + x[:, lanes:]
    while x.shape[1] > 1:
        x = x[:, 0::2] + x[:, 1::2]
    return x


def softmax(rows_TW: Tensor) -> Tensor:
    """[T, W]: lane l of a warp adds exp(x[l] - max), exp(x[l + 32] - max), ... in order; lanes by halving; division."""
    T, W = rows_TW.shape
    lanes = min(next_power_of_2(W), WARP)
    exps_TW = torch.exp(rows_TW - rows_TW.amax(dim=1, keepdim=True))
    strided = pad(exps_TW, (0, next_power_of_2(W) - W)).view(T, next_power_of_2(W) // lanes, lanes)
    lane_sums = strided[:, 0]
    for step in range(1, strided.shape[1]):
        lane_sums = lane_sums + strided[:, step]
    return exps_TW / halving_sum(lane_sums)


def rank_key(rows_TW: Tensor) -> Tensor:
    """int64, ordered as torch.topk ranks on CUDA: every NaN first, equal; then +inf ... +0.0, -0.0 ... -inf."""
    integers = {torch.float32: torch.int32, torch.float64: torch.int64}[rows_TW.dtype]
    highest = torch.iinfo(integers).max
    bits = rows_TW.contiguous().view(integers)
    key = torch.where(bits < 0, bits ^ highest, bits)
    return torch.where(rows_TW.isnan(), highest, key).long()


def topk_unsorted(rows_TW: Tensor, k: int) -> Tensor:
    """[T, k] int64: all above the k-th value by ascending index, then those equal to it, lowest index first."""
    W = rows_TW.shape[1]
    key = rank_key(rows_TW)
    kth = key.sort(dim=1, descending=True).values[:, k - 1 : k]
    index = torch.arange(W, device=rows_TW.device)
    place = torch.where(key > kth, index, torch.where(key == kth, W + index, 2 * W + index))
    return place.sort(dim=1).values[:, :k] % W


def sort_slots(rows_TW: Tensor, slots_TK: Tensor) -> Tensor:
    """`slots_TK` descending by value, as an unstable bitonic network leaves them. +0.0 and -0.0 tie, and so do NaNs."""
    K = slots_TK.shape[1]
    assert K <= SORT_WIRES, K
    if K == 1:
        return slots_TK
    values_TK = rows_TW.gather(1, slots_TK)
    key = rank_key(torch.where(values_TK == 0, 0.0, values_TK))
    keys = pad(key, (0, SORT_WIRES - K), value=_INVALID)
    slots = pad(slots_TK, (0, SORT_WIRES - K))
    size = 2
    while size < SORT_WIRES:
        stride = size // 2
        while stride > 0:
            keys, slots = _exchange(keys, slots, stride, size // 2)
            stride //= 2
        size *= 2
    stride = SORT_WIRES // 2
    while stride > 0:
        keys, slots = _exchange(keys, slots, stride, 0)
        stride //= 2
    return slots[:, :K]


def _exchange(keys: Tensor, slots: Tensor, stride: int, upward_bit: int) -> tuple[Tensor, Tensor]:
    """One stage: thread t compares two wires `stride` apart, and moves them unless the first is strictly greater.

    Threads with `upward_bit` set in t do the opposite. That a tie moves is what makes the order of ties what it is.
    """
    thread = torch.arange(SORT_WIRES // 2, device=keys.device)
    first = 2 * thread - (thread & (stride - 1))
    second = first + stride
    in_order = (keys[:, first] > keys[:, second]) | (keys[:, second] == _INVALID)
    moves = in_order == ((thread & upward_bit) != 0)
    return _swapped(keys, first, second, moves), _swapped(slots, first, second, moves)


def _swapped(wires: Tensor, first: Tensor, second: Tensor, moves: Tensor) -> Tensor:
    result = wires.clone()
    result[:, first] = torch.where(moves, wires[:, second], wires[:, first])
    result[:, second] = torch.where(moves, wires[:, first], wires[:, second])
    return result
