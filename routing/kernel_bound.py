# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"
"""Rows routed by bounds: cheap upper bounds choose, and only what is chosen is computed exactly.

Exact exponentials and quotients of every expert are most of a router's arithmetic, and only the K chosen ones reach the
result. So experts are ranked by words of 32 bits: the leading bits of a number that bounds the selection value, above
the expert's index, which makes every word another. The K largest words name the candidates, the next one bounds all the
rest. Candidates are then computed exactly. A row is *certain* if the least of them lies above that bound by more than
every rounding on the way; then the candidates are the trainer's choice, in no tie with another expert. NaN, infinities,
numbers near the largest and near ties at the boundary are not certain, and go to routing.kernel_exact. With a *spare*
the next best is computed exactly as well, and the bound is of those after it, so that it takes two near ties to leave a
row in doubt: worth its time where a single row in doubt is waited for, and where logits have few bits and tie often.

The number behind a word:
    the logit itself, where scores rise with logits and no bias stands between (a softmax over all experts included);
    with a bias, an approximate score (ex2.approx, rcp.approx: off by less than 2^-21) plus the bias;
    in groups likewise. The kept groups are certain if the last beats the next one by more than the rounding of words.

A tile is [BLOCK_T, C]: 32 experts of each row, and J tiles are a row. Each of the C columns keeps its best DEPTH words
in order, so that the next best of a row is a maximum over columns; a column that runs dry makes its row uncertain.
"""

# Loops are unrolled while Triton traces them, so tuples of tiles grow in them; to mypy a tuple has one length.

import triton
import triton.language as tl

from routing.kernel_order import (
    arranged,
    bits_of,
    divided,
    exp,
    halving_sum,
    highest,
    number_of,
    rank_key,
    sigmoid,
    sqrt_softplus,
    widened,
)
from routing.kernel_words import index_of, inserted, most, popped, word_of

LEAST_VALUE = tl.constexpr(-3.0e38)
"""Below every value of a row that may be certain. -inf would be no number once an index stands in its low bits."""
MAGNIFIED = tl.constexpr(8.0)
"""A sum of values times this is finite only if every value is a number below 8.6e37, a quarter of the largest: then two
of them can be added, and LEAST_VALUE is less than any."""
SLACK = tl.constexpr(1e-5)
"""Relative; a hundred times the rounding of any score function."""
TINY = tl.constexpr(1e-37)
"""Many times the rounding of a score below the normal numbers, where SLACK is too little."""
TINY_ROOT = tl.constexpr(1e-18)
"""Likewise of the root of such a number, which is itself a normal one."""
BIAS_SLACK = tl.constexpr(4e-6)
"""Relative to 1 + |value|: 2^-18, eight times the error of an approximate score and of its sum with the bias."""
GROUP_SLACK = tl.constexpr(2.0**-20)
"""Relative to 1 + the largest member, and for each index of a member. A word gives up to 2^-23 of a value away for each
index that it can hold: two members and the group itself less than half of this; approximate scores are off by less."""


@triton.jit
def _approximate_sigmoid(x, LIBDEVICE: tl.constexpr):
    denominator = 1.0 + tl.exp2(x * -1.4426950408889634)
    if LIBDEVICE:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [denominator], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        result = 1.0 / denominator
    return result


@triton.jit
def _load(values_ptr, row, stride_t, stride_e, is_token, e, E: tl.constexpr, other):
    pointers = values_ptr + row.to(tl.int64)[:, None] * stride_t + e.to(tl.int64) * stride_e
    return widened(tl.load(pointers, mask=is_token[:, None] & (e < E), other=other))


@triton.jit
def _approximate_score(x, peak, total, SCORE: tl.constexpr, LIBDEVICE: tl.constexpr):
    """Within BIAS_SLACK / 8 of the score."""
    if SCORE == "sigmoid":
        x = _approximate_sigmoid(x, LIBDEVICE)
    elif SCORE == "softmax":
        x = tl.exp2((x - peak) * 1.4426950408889634) / total
    elif SCORE == "sqrt_softplus":
        x = sqrt_softplus(x, tl.float32, LIBDEVICE)
    return x


@triton.jit
def _score(x, peak, total, SCORE: tl.constexpr, LIBDEVICE: tl.constexpr):
    """The trainer's score of x, bit for bit."""
    if SCORE == "softmax":
        x = divided(exp(x - peak, LIBDEVICE), tl.broadcast_to(total, x.shape))
    elif SCORE == "sigmoid":
        x = sigmoid(x, LIBDEVICE)
    elif SCORE == "sqrt_softplus":
        x = sqrt_softplus(x, tl.float32, LIBDEVICE)
    return x


@triton.jit
def _raised(score, SCORE: tl.constexpr):
    """Above the score of every smaller logit. Scores rise with logits, but for the rounding of their functions."""
    return score * (1.0 + SLACK) + (TINY_ROOT if SCORE == "sqrt_softplus" else TINY)


@triton.jit
def _computed(
    ids, is_it, values_ptr, bias_ptr, row, stride_t, stride_e, is_token, peak, total, E: tl.constexpr,
    SCORE: tl.constexpr, HAS_BIAS: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """Score and selection value of experts, bit for bit."""
    x = _load(values_ptr, row, stride_t, stride_e, is_token, tl.where(is_it, ids, 0), E, 0.0)
    score = _score(x, peak, total, SCORE, LIBDEVICE)
    choice = score
    if HAS_BIAS:
        choice = score + tl.load(bias_ptr + ids, mask=is_it, other=0.0)
    return score, choice


@triton.jit
def _masked_groups(
    values, BLOCK_T: tl.constexpr, C: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr, KEPT: tl.constexpr,
    TOP: tl.constexpr, MASK_VALUE: tl.constexpr, ORDERED: tl.constexpr,
):  # fmt: skip
    """The tiles with MASK_VALUE in the groups that are not kept; and is that certain? Groups are whole tiles."""
    LOWEST: tl.constexpr = -0x80000000 if ORDERED else float("-inf")
    TILES: tl.constexpr = len(values) // COUNT
    MASK: tl.constexpr = (1 << (TILES * C - 1).bit_length()) - 1
    g = tl.arange(0, COUNT_P)[None, :]
    c = tl.arange(0, C)[None, :]
    size = tl.zeros([BLOCK_T], tl.float32)
    group_words = ()
    all_words = tl.full([BLOCK_T, COUNT_P], LOWEST, tl.int32 if ORDERED else tl.float32)
    for index in tl.static_range(COUNT):
        heads = ()
        for tile in tl.static_range(TILES):
            word = word_of(values[index * TILES + tile], tile * C + c, MASK, ORDERED)
            if tile == 0:
                heads = (word, tl.full([BLOCK_T, C], LOWEST, word.dtype))
            else:
                heads = (tl.maximum(heads[0], word), tl.maximum(heads[1], tl.minimum(heads[0], word)))
        best = tl.max(heads[0], axis=1)
        score = most(best, MASK, ORDERED)
        size = tl.maximum(size, tl.abs(score))
        if TOP == 2:
            second = tl.max(tl.where(heads[0] == best[:, None], heads[1], heads[0]), axis=1)
            size = tl.maximum(size, tl.abs(most(second, MASK, ORDERED)))
            score += most(second, MASK, ORDERED)
        word = word_of(score, index, COUNT_P - 1, ORDERED)
        group_words = group_words + (word,)
        all_words = tl.where(g == index, word[:, None], all_words)
    for _ in tl.static_range(KEPT - 1):
        all_words = tl.where(all_words == tl.max(all_words, axis=1)[:, None], LOWEST, all_words)
    last_kept = tl.max(all_words, axis=1)
    next_best = tl.max(tl.where(all_words == last_kept[:, None], LOWEST, all_words), axis=1)
    gap = most(last_kept, COUNT_P - 1, ORDERED) - most(next_best, COUNT_P - 1, ORDERED)
    certain = gap > (1.0 + size) * ((MASK + 1) * GROUP_SLACK)
    result = ()
    for tile in tl.static_range(len(values)):
        is_kept = group_words[tile // TILES] >= last_kept
        masked = LEAST_VALUE if MASK_VALUE == float("-inf") else MASK_VALUE  # noqa: SIM300
        result = result + (tl.where(is_kept[:, None], values[tile], masked),)
    return result, certain


@triton.jit
def bounded_rows(
    values_ptr, bias_ptr, row, stride_t, stride_e, is_token, E: tl.constexpr, BLOCK_T: tl.constexpr, C: tl.constexpr,
    LOG_C: tl.constexpr, J: tl.constexpr, DEPTH: tl.constexpr, MASK: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr,
    SCORE: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr, COUNT: tl.constexpr, COUNT_P: tl.constexpr,
    KEPT: tl.constexpr, TOP: tl.constexpr, MASK_VALUE: tl.constexpr, ORDERED: tl.constexpr,
    HAS_SPARE: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_T, K_P] twice: expert ids and raw scores in slot order, zeros past the last slot; [BLOCK_T]: certain?

    HAS_SPARE needs masked experts to be out of the running: a MASK_VALUE of -inf.
    """
    tl.static_assert(not (HAS_SPARE and COUNT > 0 and MASK_VALUE == 0.0))
    LOWEST: tl.constexpr = -0x80000000 if ORDERED else float("-inf")
    BY_SCORE: tl.constexpr = HAS_BIAS or COUNT > 0
    c = tl.arange(0, C)[None, :]
    certain = is_token
    peak = tl.zeros([BLOCK_T, 1], tl.float32)
    total = peak

    if SCORE == "softmax":
        tops = tl.full([BLOCK_T, C], float("-inf"), tl.float32)
        for j in tl.static_range(J):
            x = _load(values_ptr, row, stride_t, stride_e, is_token, j * C + c, E, float("-inf"))
            tops = tl.maximum(tops, x)
        peak = tl.max(tops, axis=1)[:, None]
        sums = tl.zeros([BLOCK_T, C], tl.float32)
        for j in tl.static_range(J):
            x = _load(values_ptr, row, stride_t, stride_e, is_token, j * C + c, E, float("-inf"))
            sums += exp(x - peak, LIBDEVICE)
        total = halving_sum(sums, BLOCK_T, C, LOG_C)

    values = ()
    magnified = tl.zeros([BLOCK_T, C], tl.float32)
    for j in tl.static_range(J):
        e = j * C + c
        value = _load(values_ptr, row, stride_t, stride_e, is_token, e, E, 0.0)
        if BY_SCORE:
            value = _approximate_score(value, peak, total, SCORE, LIBDEVICE)
        if HAS_BIAS:  # every row of the tile reads it: in the tile's own layout
            value += _load(bias_ptr, row, 0, 1, is_token, e, E, 0.0)
        magnified = tl.fma(value, MAGNIFIED, magnified)
        if (j + 1) * C > E:
            value = tl.where(e < E, value, LEAST_VALUE)
        values = values + (value,)
    certain = certain & (tl.abs(tl.sum(magnified, axis=1)) < float("inf"))
    if COUNT > 0:
        values, is_sure = _masked_groups(values, BLOCK_T, C, COUNT, COUNT_P, KEPT, TOP, MASK_VALUE, ORDERED)
        certain = certain & is_sure

    heads = ()
    for j in tl.static_range(J):
        heads = inserted(heads, word_of(values[j], j * C + c, MASK, ORDERED), DEPTH)
    slot = tl.broadcast_to(tl.arange(0, K_P)[None, :], [BLOCK_T, K_P])
    is_slot = slot < K
    words = tl.zeros([BLOCK_T, K_P], heads[0].dtype)
    for rank in tl.static_range(K):
        best = tl.max(heads[0], axis=1)[:, None]
        words = tl.where(slot == rank, best, words)
        heads = popped(heads, heads[0] == best, LOWEST)
    spare = tl.max(heads[0], axis=1)[:, None]
    if HAS_SPARE:
        heads = popped(heads, heads[0] == spare, LOWEST)
    if J > DEPTH:
        certain = certain & (tl.min(heads[0], axis=1) != LOWEST)
    if COUNT > 0 and MASK_VALUE == 0.0:  # where masked experts are in the running, their scores are not what counts
        certain = certain & tl.reshape(most(best, MASK, ORDERED) > TINY, [BLOCK_T])
    rest = most(tl.max(heads[0], axis=1), MASK, ORDERED)[:, None]

    # the candidates, exactly
    ids = index_of(words, MASK)
    if E <= MASK:  # a row of NaN has candidates past the last expert; it is not certain, but is looked up all the same
        ids = tl.minimum(ids, E - 1)
    score, choice = _computed(
        ids, is_slot, values_ptr, bias_ptr, row, stride_t, stride_e, is_token, peak, total, E, SCORE, HAS_BIAS,
        LIBDEVICE,
    )  # fmt: skip
    key = tl.where(is_slot, rank_key(choice), highest(rank_key(choice)))
    if HAS_SPARE:  # the next best may be better after all, or as good with a lower index: then it takes the last's slot
        spare_id = index_of(spare, MASK)
        is_real = most(spare, MASK, ORDERED) > LEAST_VALUE / 2  # neither masked nor past the last expert
        spare_score, spare_choice = _computed(
            spare_id, is_real, values_ptr, bias_ptr, row, stride_t, stride_e, is_token, peak, total, E, SCORE, HAS_BIAS,
            LIBDEVICE,
        )  # fmt: skip
        spare_key = rank_key(spare_choice)
        least_key = tl.min(key, axis=1)[:, None]
        last_id = tl.max(tl.where(key == least_key, ids, -1), axis=1)[:, None]
        is_better = (spare_key > least_key) | ((spare_key == least_key) & (spare_id < last_id))
        moves_in = is_slot & (ids == last_id) & is_real & is_better
        ids = tl.where(moves_in, spare_id, ids)
        score = tl.where(moves_in, spare_score, score)
        choice = tl.where(moves_in, spare_choice, choice)
        key = tl.where(moves_in, spare_key, key)

    # the bound on the others
    if BY_SCORE:
        bound = rest + BIAS_SLACK * (1.0 + tl.abs(rest))
    elif SCORE == "softmax" or SCORE == "sigmoid" or SCORE == "sqrt_softplus":
        bound = _raised(_score(rest, peak, total, SCORE, LIBDEVICE), SCORE)
    else:
        bound = rest
    least = tl.min(tl.where(is_slot, choice, float("inf")), axis=1)[:, None]
    certain = certain & tl.reshape(bound < least, [BLOCK_T])
    is_row = certain[:, None]
    ids, bits = arranged(key, ids, bits_of(score), slot, is_slot, is_row, SORTED, K, K_P, MASK + 1)
    return tl.where(is_slot, ids, 0), tl.where(is_slot, number_of(bits), 0.0), certain
