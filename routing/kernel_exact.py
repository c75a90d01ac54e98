# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""Rows routed by the definition: every score computed, every comparison made. Any spec, any numbers, no shortcut.

T tokens, E experts, K slots of a token; a suffix P is a width padded to a power of two. B is the number of rows.
"""

import triton
import triton.language as tl

from routing.kernel_order import (
    arranged,
    bits_of,
    divided,
    exp,
    halving_sum,
    held,
    lowest,
    number_of,
    rank_key,
    ranked_value,
    rounded,
    row_max,
    sigmoid,
    slot_sum,
    sqrt_softplus,
)


@triton.jit
def _load_values(values_ptr, row, stride_t, stride_e, is_token, e, E: tl.constexpr):
    """A [B, len(e)] tile, -inf past the last expert."""
    pointers = values_ptr + row.to(tl.int64)[:, None] * stride_t + e[None, :].to(tl.int64) * stride_e
    return tl.load(pointers, mask=is_token[:, None] & (e < E)[None, :], other=float("-inf"))


@triton.jit
def _scores(
    values_ptr, row, stride_t, stride_e, is_token, E: tl.constexpr, E_P: tl.constexpr, B: tl.constexpr,
    SCORE: tl.constexpr, CHAIN: tl.constexpr, SCORE_DTYPE: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    x = _load_values(values_ptr, row, stride_t, stride_e, is_token, tl.arange(0, E_P), E)
    if SCORE == "softmax":
        LANES: tl.constexpr = 32 if E_P > 32 else E_P
        LOG_LANES: tl.constexpr = 5 if E_P > 32 else LANES.bit_length() - 1
        x = held(x, SCORE_DTYPE)
        top = row_max(x)
        lane = tl.arange(0, LANES)
        sums = tl.zeros([B, LANES], tl.float32)
        for start in tl.static_range(0, E_P, LANES):
            strided = _load_values(values_ptr, row, stride_t, stride_e, is_token, start + lane, E)
            sums += exp(held(strided, SCORE_DTYPE) - top, LIBDEVICE)
        total = halving_sum(sums, B, LANES, LOG_LANES)
        x = divided(exp(x - top, LIBDEVICE), tl.broadcast_to(total, [B, E_P]))
        x = rounded(x, SCORE_DTYPE)
    elif SCORE == "sigmoid":
        x = rounded(sigmoid(held(x, SCORE_DTYPE), LIBDEVICE), SCORE_DTYPE)
    elif SCORE == "sqrt_softplus":
        x = rounded(sqrt_softplus(held(x, SCORE_DTYPE), SCORE_DTYPE, LIBDEVICE), SCORE_DTYPE)
    return held(x, CHAIN)


@triton.jit
def _best(key, index, N: tl.constexpr):
    """[B, 1] twice: the largest key of each row, and the lowest index that has it."""
    best = tl.max(key, axis=1)[:, None]
    return best, tl.min(tl.where(key == best, index, N), axis=1)[:, None]


@triton.jit
def _in_kept_group(
    key, e, E: tl.constexpr, B: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr, KEPT: tl.constexpr,
    TOP: tl.constexpr, TOP_P: tl.constexpr, LOG_TOP_P: tl.constexpr, ADJACENT: tl.constexpr, CHOICE: tl.constexpr,
):  # fmt: skip
    """[B, E_P]: 1 where the expert's group is one of the KEPT best."""
    LOWEST: tl.constexpr = lowest(key)
    group = (e // (E // COUNT))[None, :]
    g = tl.arange(0, COUNT_P)[None, :]
    place = tl.arange(0, TOP_P)[None, :]
    group_key = tl.full([B, COUNT_P], LOWEST, key.dtype)
    for index in tl.static_range(COUNT):
        members = tl.where(group == index, key, LOWEST)
        best = number_of(tl.zeros([B, TOP_P], key.dtype))
        for rank in tl.static_range(TOP):
            largest, expert = _best(members, e[None, :], key.shape[1])
            members = tl.where(e[None, :] == expert, LOWEST, members)
            best = tl.where(place == rank, ranked_value(largest), best)
        if TOP > 1:
            best = rounded(slot_sum(best, B, TOP, TOP_P, LOG_TOP_P, ADJACENT), CHOICE)
        group_key = tl.where(g == index, rank_key(best), group_key)
    kept = tl.zeros_like(key).to(tl.int32)
    for _ in range(KEPT):
        _largest, chosen = _best(group_key, g, COUNT_P)
        group_key = tl.where(g == chosen, LOWEST, group_key)
        kept = tl.where(group == chosen, 1, kept)
    return kept


@triton.jit
def exact_rows(
    values_ptr, bias_ptr, row, stride_t, stride_e, is_token, E: tl.constexpr, E_P: tl.constexpr, B: tl.constexpr,
    K: tl.constexpr, K_P: tl.constexpr, SCORE: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    COUNT: tl.constexpr, COUNT_P: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr, TOP_P: tl.constexpr,
    LOG_TOP_P: tl.constexpr, MASK_VALUE: tl.constexpr, MASKS_SCORES: tl.constexpr, ADJACENT: tl.constexpr,
    CHAIN: tl.constexpr, SCORE_DTYPE: tl.constexpr, CHOICE: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """[B, K_P] twice: expert ids and raw scores, in slot order; zeros past the last slot."""
    e = tl.arange(0, E_P)
    score = _scores(
        values_ptr, row, stride_t, stride_e, is_token, E, E_P, B, SCORE, CHAIN, SCORE_DTYPE, LIBDEVICE
    )  # fmt: skip
    choice = score
    if HAS_BIAS:
        choice = score + tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    key = rank_key(choice)
    LOWEST: tl.constexpr = lowest(key)
    is_expert = (e < E)[None, :]
    key = tl.where(is_expert, key, LOWEST)
    if COUNT > 0:
        kept = _in_kept_group(key, e, E, B, COUNT, COUNT_P, KEPT, TOP, TOP_P, LOG_TOP_P, ADJACENT, CHOICE)
        key = tl.where(is_expert & (kept == 0), rank_key(tl.full([B, E_P], MASK_VALUE, choice.dtype)), key)
        if MASKS_SCORES:
            score = tl.where(kept == 0, 0.0, score)

    # choose: as torch.topk ranks values, and among equals the lower expert first
    slot = tl.broadcast_to(tl.arange(0, K_P)[None, :], [B, K_P])
    is_slot = slot < K
    ids = tl.zeros([B, K_P], tl.int32)
    keys = tl.full([B, K_P], LOWEST, key.dtype)
    for rank in range(K):
        largest, expert = _best(key, e[None, :], E_P)
        key = tl.where(e[None, :] == expert, LOWEST, key)
        ids = tl.where(slot == rank, expert, ids)
        keys = tl.where(slot == rank, largest, keys)
    bits = tl.where(is_slot, tl.gather(bits_of(score), ids, axis=1), 0)
    ids, bits = arranged(keys, ids, bits, slot, is_slot, is_token[:, None], SORTED, K, K_P, E_P)
    return ids, number_of(bits)
