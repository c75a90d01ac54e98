# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Parts of the top-k kernel: rounding, ranking, sums and the sorting network, in the orders of routing.cuda_order.

Nothing here relies on the order in which a Triton reduction adds: sums are written out, and tl.sum only ever picks one
integer out of a row of zeros. BLOCK_T rows of a tile; N its width, a power of two.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice

SORT_WIRES = tl.constexpr(32)


@triton.jit
def exp(x, LIBDEVICE: tl.constexpr):
    """expf as eager PyTorch has it; the interpreter, where libdevice does not run, takes its own."""
    if LIBDEVICE:
        result = libdevice.exp(x)
    else:
        result = tl.exp(x)
    return result


@triton.jit
def log1p(x, LIBDEVICE: tl.constexpr):
    if LIBDEVICE:
        result = libdevice.log1p(x)
    else:
        u = 1.0 + x  # log(u) is that of a rounded argument; the quotient takes the rounding back out
        exact = (u == 1.0) | (u == float("inf"))
        quotient = tl.math.div_rn(tl.log(u) * x, tl.where(exact, 1.0, u - 1.0))
        result = tl.where(exact, tl.where(u == 1.0, x, u), quotient)
    return result


# bfloat16 is rounded and converted as integers, because the interpreter's own conversion truncates and loses subnormals


@triton.jit
def widened(x):
    """Exactly, to fp32."""
    if x.dtype == tl.bfloat16:
        result = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """fp32 numbers that DTYPE can represent, in DTYPE."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300  (a parameter, not a constant)
        result = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 -> the nearest number of DTYPE (ties to even), still held as fp32."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300  (a parameter, not a constant)
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x != x, 0x7FC00000, nearest).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:  # noqa: SIM300
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def rank_key(x):
    """int32 key, ordered as torch.topk ranks on CUDA. The lowest int32 is nobody's key."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def ranked_value(key):
    """The fp32 number with that key: the inverse of rank_key."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def row_max(x):
    """[BLOCK_T, 1]; NaN if there is one."""
    return ranked_value(tl.max(rank_key(x), axis=1))[:, None]


@triton.jit
def halves(x, BLOCK_T: tl.constexpr, N: tl.constexpr):
    """Two [BLOCK_T, N / 2] tiles: the left and the right half."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_T, 2, N // 2]), [0, 2, 1]))


@triton.jit
def halving_sum(x, BLOCK_T: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr):
    """[BLOCK_T, 1]: x[i] + x[i + N/2] until one is left."""
    x = x + 0.0  # accumulators start at +0.0
    for step in tl.static_range(LOG_N):
        left, right = halves(x, BLOCK_T, N >> step)
        x = left + right
    return x


@triton.jit
def softmax_slots(x, is_slot, BLOCK_T: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr, LIBDEVICE: tl.constexpr):
    """Softmax over at most 32 slots, one to a lane. A NaN or +inf, or nothing but -inf, gives a row of NaN."""
    top = row_max(tl.where(is_slot, x, float("-inf")))
    exps = tl.where(is_slot, exp(x - top, LIBDEVICE), 0.0)
    return tl.math.div_rn(exps, tl.broadcast_to(halving_sum(exps, BLOCK_T, N, LOG_N), [BLOCK_T, N]))


@triton.jit
def picked(is_it, integers):
    """[BLOCK_T, 1]: the one entry of each row where `is_it`. Of integers, so that NaN and -0.0 pass as bits."""
    return tl.sum(tl.where(is_it, integers, 0), axis=1)[:, None]


@triton.jit
def kth_largest(word, K: tl.constexpr):
    """[BLOCK_T, 1]: the k-th largest of int64 words that are all different."""
    largest = tl.max(word, axis=1)[:, None]
    for _ in tl.static_range(K - 1):
        word = tl.where(word == largest, -0x8000000000000000, word)
        largest = tl.max(word, axis=1)[:, None]
    return largest


@triton.jit
def in_kept_group(
    word, e, E: tl.constexpr, BLOCK_T: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr, KEPT: tl.constexpr,
    TOP: tl.constexpr, TOP_P: tl.constexpr, LOG_TOP_P: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, E_P]: whether the expert's group is one of the KEPT best. word: (rank key << 32) | falling index."""
    group = e // (E // COUNT)
    g = tl.arange(0, COUNT_P)[None, :]
    place = tl.arange(0, TOP_P)[None, :]
    group_key = tl.full([BLOCK_T, COUNT_P], -0x80000000, tl.int32)
    for index in tl.static_range(COUNT):
        members = tl.where((group == index)[None, :], word, -0x8000000000000000)
        best = tl.zeros([BLOCK_T, TOP_P], tl.float32)
        for rank in tl.static_range(TOP):
            largest = tl.max(members, axis=1)[:, None]
            members = tl.where(members == largest, -0x8000000000000000, members)
            best = tl.where(place == rank, ranked_value((largest >> 32).to(tl.int32)), best)
        if TOP > 1:
            best = rounded(halving_sum(best, BLOCK_T, TOP_P, LOG_TOP_P), CHOICE)
        group_key = tl.where(g == index, rank_key(best), group_key)
    group_word = (group_key.to(tl.int64) << 32) | (COUNT_P - 1 - g)
    kept_g = (group_word >= kth_largest(group_word, KEPT)).to(tl.int32)
    kept = tl.zeros_like(word).to(tl.int32)
    for index in tl.static_range(COUNT):
        kept = tl.where((group == index)[None, :], picked(g == index, kept_g), kept)
    return kept != 0


@triton.jit
def sort_slots(word, bits, BLOCK_T: tl.constexpr):
    """The bitonic network of routing.cuda_order.sort_slots over 32 wires.

    word: int64, (sort key, >= 0) << 16 | expert, or -1 on an invalid wire; bits: the score that travels along.
    """
    for stage in tl.static_range(1, 5):
        for step in tl.static_range(stage):
            word, bits = _exchange(word, bits, BLOCK_T, 1 << (stage - 1 - step), 1 << (stage - 1))
    for step in tl.static_range(5):
        word, bits = _exchange(word, bits, BLOCK_T, 16 >> step, 0)
    return word, bits


@triton.jit
def _exchange(word, bits, BLOCK_T: tl.constexpr, STRIDE: tl.constexpr, UPWARD_BIT: tl.constexpr):
    ROWS: tl.constexpr = 16 // STRIDE
    first, second = _wire_pairs(word, BLOCK_T, STRIDE)
    first_bits, second_bits = _wire_pairs(bits, BLOCK_T, STRIDE)
    thread = tl.arange(0, ROWS)[:, None] * STRIDE + tl.arange(0, STRIDE)[None, :]
    upward = ((thread & UPWARD_BIT) != 0)[None, :, :]
    in_order = ((first >> 16) > (second >> 16)) | (second < 0)
    moves = in_order == upward
    word = _wires(tl.where(moves, second, first), tl.where(moves, first, second), BLOCK_T)
    bits = _wires(tl.where(moves, second_bits, first_bits), tl.where(moves, first_bits, second_bits), BLOCK_T)
    return word, bits


@triton.jit
def _wire_pairs(x, BLOCK_T: tl.constexpr, STRIDE: tl.constexpr):
    """[BLOCK_T, 16 / STRIDE, STRIDE] twice: the wires that meet, `STRIDE` apart."""
    return tl.split(tl.permute(tl.reshape(x, [BLOCK_T, 16 // STRIDE, 2, STRIDE]), [0, 1, 3, 2]))


@triton.jit
def _wires(first, second, BLOCK_T: tl.constexpr):
    return tl.reshape(tl.permute(tl.join(first, second), [0, 1, 3, 2]), [BLOCK_T, 32])
