# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Parts of the top-k kernel: rounding, ranking, sums and the sorting network, in the orders of routing.cuda_order.

No sum relies on the order in which a Triton reduction adds: each tl.sum over numbers adds two. BLOCK_T rows of a tile;
N its width, a power of two. A chain is held in fp32, or in fp64 where its dtype is fp64.
"""

import triton
import triton.language as tl
from triton.language.extra import libdevice


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


@triton.jit
def sigmoid(x, LIBDEVICE: tl.constexpr):
    return divided(tl.full(x.shape, 1.0, tl.float32), 1.0 + exp(-x, LIBDEVICE))


@triton.jit
def sqrt_softplus(x, CHAIN: tl.constexpr, LIBDEVICE: tl.constexpr):
    softplus = tl.where(x > 20.0, x, log1p(exp(x, LIBDEVICE), LIBDEVICE))
    return tl.math.sqrt_rn(rounded(softplus, CHAIN))


@triton.jit
def divided(x, y):
    """IEEE division; Triton's own quotient of fp32 is off by up to 2 ulp."""
    if x.dtype == tl.float64:
        result = x / y
    else:
        result = tl.math.div_rn(x, y)
    return result


# bfloat16 is rounded and converted as integers, because the interpreter's own conversion truncates and loses subnormals


@triton.jit
def widened(x):
    """To fp32, exactly; fp64 is rounded."""
    if x.dtype == tl.bfloat16:
        result = (x.to(tl.int16, bitcast=True).to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        result = x.to(tl.float32)
    return result


@triton.jit
def held(x, CHAIN: tl.constexpr):
    """x rounded to CHAIN, in fp32 or fp64."""
    if CHAIN == tl.float64:  # noqa: SIM300  (a parameter, not a constant)
        result = x.to(tl.float64) if x.dtype == tl.float64 else widened(x).to(tl.float64)
    else:
        result = rounded(widened(x), CHAIN)
    return result


@triton.jit
def narrowed(x, DTYPE: tl.constexpr):
    """Numbers that DTYPE can represent, in DTYPE."""
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        result = (x.to(tl.int32, bitcast=True) >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(DTYPE)
    return result


@triton.jit
def rounded(x, DTYPE: tl.constexpr):
    """fp32 -> the nearest number of DTYPE (ties to even), still held as fp32. fp64 becomes fp32 first, if not fp64."""
    if DTYPE == tl.float64:  # noqa: SIM300
        x = x.to(tl.float64)
    else:
        x = x.to(tl.float32)
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        bits = x.to(tl.int32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x != x, 0x7FC00000, nearest).to(tl.float32, bitcast=True)
    elif DTYPE == tl.float16:  # noqa: SIM300
        x = x.to(tl.float16).to(tl.float32)
    return x


@triton.jit
def bits_of(x):
    """int32 or int64."""
    if x.dtype == tl.float64:
        result = x.to(tl.int64, bitcast=True)
    else:
        result = x.to(tl.int32, bitcast=True)
    return result


@triton.jit
def number_of(bits):
    """The inverse of bits_of."""
    if bits.dtype == tl.int64:
        result = bits.to(tl.float64, bitcast=True)
    else:
        result = bits.to(tl.float32, bitcast=True)
    return result


@triton.jit
def highest(like):
    """The largest integer of that dtype: NaN's key."""
    HIGHEST: tl.constexpr = 0x7FFFFFFFFFFFFFFF if like.dtype == tl.int64 else 0x7FFFFFFF
    return HIGHEST


@triton.jit
def lowest(like):
    """The smallest integer of that dtype: nobody's key."""
    LOWEST: tl.constexpr = -0x8000000000000000 if like.dtype == tl.int64 else -0x80000000
    return LOWEST


@triton.jit
def rank_key(x):
    """Integers ordered as torch.topk ranks on CUDA: every NaN first, equal; then +inf ... +0.0, -0.0 ... -inf."""
    bits = bits_of(x)
    key = tl.where(bits < 0, bits ^ highest(bits), bits)
    return tl.where(x != x, highest(bits), key)


@triton.jit
def ranked_value(key):
    """The number with that key: the inverse of rank_key."""
    return number_of(tl.where(key < 0, key ^ highest(key), key))


@triton.jit
def row_max(x):
    """[BLOCK_T, 1]; NaN if there is one."""
    return ranked_value(tl.max(rank_key(x), axis=1))[:, None]


@triton.jit
def halving_sum(x, BLOCK_T: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr):
    """[BLOCK_T, 1]: x[i] + x[i + N/2] until one is left."""
    x = x + 0.0  # accumulators start at +0.0
    for step in tl.static_range(LOG_N):
        x = tl.sum(tl.reshape(x, [BLOCK_T, 2, (N >> step) // 2]), axis=1)
    return _column(x, BLOCK_T)


@triton.jit
def _column(x, BLOCK_T: tl.constexpr):
    """[BLOCK_T, 1]. Of one row it is made of a scalar, or the layout of a sum would spread over the tiles it meets."""
    if BLOCK_T == 1:
        x = tl.full([1, 1], tl.sum(tl.reshape(x, [1]), axis=0), x.dtype)
    return tl.reshape(x, [BLOCK_T, 1])


@triton.jit
def slot_sum(
    x, BLOCK_T: tl.constexpr, WIDTH: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr, ADJACENT: tl.constexpr
):
    """[BLOCK_T, 1]: of WIDTH <= N slots, the rest zeros, as torch.sum adds them: by halving, or adjacent pairs."""
    if ADJACENT:
        x = x + 0.0
        FOLDED: tl.constexpr = 0 if WIDTH == N else 1  # beyond the largest power of two: onto the first ones
        if FOLDED:
            x = tl.sum(tl.reshape(x, [BLOCK_T, 2, N // 2]), axis=1)
        for step in tl.static_range(LOG_N - FOLDED):
            x = tl.sum(tl.reshape(x, [BLOCK_T, (N >> (FOLDED + step)) // 2, 2]), axis=2)
        result = _column(x, BLOCK_T)
    else:
        result = halving_sum(x, BLOCK_T, N, LOG_N)
    return result


@triton.jit
def softmax_slots(x, is_slot, BLOCK_T: tl.constexpr, N: tl.constexpr, LOG_N: tl.constexpr, LIBDEVICE: tl.constexpr):
    """Softmax over at most 32 slots, one to a lane. A NaN or +inf, or nothing but -inf, gives a row of NaN."""
    top = row_max(tl.where(is_slot, x, float("-inf")))
    exps = tl.where(is_slot, exp(x - top, LIBDEVICE), 0.0)
    return divided(exps, tl.broadcast_to(halving_sum(exps, BLOCK_T, N, LOG_N), [BLOCK_T, N]))


@triton.jit
def _places(order, slot, N: tl.constexpr):
    """[BLOCK_T, N]: where each slot goes, if they are arranged by ascending `order`, numbers that are all different."""
    place = tl.zeros_like(slot)
    for step in tl.static_range(1, N):
        place += (tl.gather(order, slot ^ step, axis=1) < order).to(tl.int32)
    return place


@triton.jit
def _sources(place, slot, N: tl.constexpr):
    """[BLOCK_T, N]: the inverse of `_places`: the slot that comes to each place."""
    source = slot
    for step in tl.static_range(1, N):
        source = tl.where(tl.gather(place, slot ^ step, axis=1) == slot, slot ^ step, source)
    return source


@triton.jit
def arranged(
    key, ids, bits, slot, is_slot, is_row, SORTED: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr,
    E_P: tl.constexpr,
):  # fmt: skip
    """The chosen of each row in slot order: expert ids, and the bits of their scores; tiles [BLOCK_T, K_P].

    key: rank keys of what they were chosen by. Unsorted: those above the least key by ascending expert, then those
    equal to it, lowest expert first. Sorted: descending, and ties as the network leaves them. is_row, [BLOCK_T, 1]: the
    rows for whose ties the network is worth its time.
    """
    least = tl.min(tl.where(is_slot, key, highest(key)), axis=1)[:, None]
    unsorted = tl.where(is_slot, tl.where(key > least, ids, E_P + ids), 2 * E_P + slot)
    if SORTED and K > 1:
        key = tl.where(key == -1, 0, key)  # the sort, unlike the choice, takes -0.0 for +0.0
        key = tl.where(is_slot, key, lowest(key))
        ties = tl.zeros_like(slot)
        for step in tl.static_range(1, K_P):
            ties += (is_row & is_slot & (tl.gather(key, slot ^ step, axis=1) == key)).to(tl.int32)
        if tl.max(tl.max(ties, axis=1), axis=0) > 0:
            source = _sources(_places(unsorted, slot, K_P), slot, K_P)
            key = tl.gather(key, source, axis=1)
            ids, bits = tl.gather(ids, source, axis=1), tl.gather(bits, source, axis=1)
            ids, bits = _sorted(key, ids, bits, slot, K_P)
        else:
            place = tl.where(is_slot, _places(~key, slot, K_P), slot)
            source = _sources(place, slot, K_P)
            ids, bits = tl.gather(ids, source, axis=1), tl.gather(bits, source, axis=1)
    else:
        source = _sources(_places(unsorted, slot, K_P), slot, K_P)
        ids, bits = tl.gather(ids, source, axis=1), tl.gather(bits, source, axis=1)
    return ids, bits


@triton.jit
def _sorted(key, ids, bits, wire, N: tl.constexpr):
    """The bitonic network of routing.cuda_order.sort_slots, on the first N of its 32 wires; the others never move.

    Keys decide, the lowest integer on the wires past the last slot; ids and the bits of the scores travel along. A tie
    moves, and so the order of ties is what it is.
    """
    for stage in tl.static_range(1, 5):
        for step in tl.static_range(stage):
            if 1 << (stage - 1 - step) < N:
                key, ids, bits = _exchange(key, ids, bits, wire, 1 << (stage - 1 - step), 1 << (stage - 1))
    for step in tl.static_range(5):
        if 16 >> step < N:
            key, ids, bits = _exchange(key, ids, bits, wire, 16 >> step, 0)
    return ids, bits


@triton.jit
def _exchange(key, ids, bits, wire, STRIDE: tl.constexpr, UPWARD_BIT: tl.constexpr):
    thread = (wire // (2 * STRIDE)) * STRIDE + wire % STRIDE
    is_first = (wire & STRIDE) == 0
    other = tl.gather(key, wire ^ STRIDE, axis=1)
    first, second = tl.where(is_first, key, other), tl.where(is_first, other, key)
    in_order = (first > second) | (second == lowest(key))
    moves = in_order == ((thread & UPWARD_BIT) != 0)
    ids = tl.where(moves, tl.gather(ids, wire ^ STRIDE, axis=1), ids)
    bits = tl.where(moves, tl.gather(bits, wire ^ STRIDE, axis=1), bits)
    return tl.where(moves, other, key), ids, bits


@triton.jit
def weighed(
    w, ids, is_slot, expert_scale_ptr, BLOCK_T: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr,
    LOG_K_P: tl.constexpr, SOFTMAX_CHOSEN: tl.constexpr, REDUCE: tl.constexpr, EPS: tl.constexpr,
    HAS_SCALE: tl.constexpr, SCALE: tl.constexpr, HAS_EXPERT_SCALE: tl.constexpr, ADJACENT: tl.constexpr,
    CHAIN: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, K_P]: chosen scores in slot order -> combine weights. Zeros beyond the slots come in and go out."""
    if SOFTMAX_CHOSEN:
        w = softmax_slots(rounded(w, tl.float32), is_slot, BLOCK_T, K_P, LOG_K_P, LIBDEVICE)
        w = rounded(w, CHAIN)
    if REDUCE == "softmax":
        w = rounded(softmax_slots(w, is_slot, BLOCK_T, K_P, LOG_K_P, LIBDEVICE), CHAIN)
    elif REDUCE != "none":
        if REDUCE == "l1":
            total = rounded(slot_sum(tl.abs(w), BLOCK_T, K, K_P, LOG_K_P, ADJACENT), CHAIN)
        else:
            total = rounded(slot_sum(w, BLOCK_T, K, K_P, LOG_K_P, ADJACENT), CHAIN)
        if REDUCE == "sum_eps":
            total = rounded(total + EPS, CHAIN)
        if REDUCE == "clamped_sum":
            total = tl.where(total < EPS, EPS, total)
        w = rounded(divided(w, tl.broadcast_to(total, [BLOCK_T, K_P])), CHAIN)
    if HAS_SCALE:
        w = rounded(w * SCALE, CHAIN)
    if HAS_EXPERT_SCALE:
        w = rounded(w * held(tl.load(expert_scale_ptr + ids, mask=is_slot, other=0.0), CHAIN), CHAIN)
    return w
