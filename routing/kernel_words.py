# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# mypy: disable-error-code="assignment, misc"
"""Words that rank experts: the leading bits of a number over the index of who has it, and the best of each column.

MASK covers the index, a power of two less one. ORDERED words are int32 in the order of the numbers; the others are fp32
numbers themselves, a little off.
"""

import triton
import triton.language as tl


@triton.jit
def word_of(value, index, MASK: tl.constexpr, ORDERED: tl.constexpr):
    """The leading bits of fp32 `value` over `index`: as int32 in the order of the values, or as fp32."""
    bits = value.to(tl.int32, bitcast=True)
    if ORDERED:
        word = ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) & ~MASK) | index
    else:
        word = ((bits & ~MASK) | index).to(tl.float32, bitcast=True)
    return word


@triton.jit
def index_of(word, MASK: tl.constexpr):
    return word.to(tl.int32, bitcast=True) & MASK


@triton.jit
def most(word, MASK: tl.constexpr, ORDERED: tl.constexpr):
    """No value with these leading bits is larger."""
    bits = word.to(tl.int32, bitcast=True)
    if ORDERED:
        key = bits | MASK
        bits = key ^ ((key >> 31) & 0x7FFFFFFF)
    else:
        bits = tl.where(bits < 0, bits & ~MASK, bits | MASK)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def inserted(heads, word, DEPTH: tl.constexpr):
    """The columns' best words, in order, with one more word to each."""
    result = ()
    for level in tl.static_range(len(heads)):
        result = result + (tl.maximum(heads[level], word),)
        word = tl.minimum(heads[level], word)
    if len(heads) < DEPTH:
        result = result + (word,)
    return result


@triton.jit
def popped(heads, is_it, LOWEST: tl.constexpr):
    """The same with the first word gone from the columns where `is_it`."""
    result = ()
    for level in tl.static_range(len(heads) - 1):
        result = result + (tl.where(is_it, heads[level + 1], heads[level]),)
    return result + (tl.where(is_it, LOWEST, heads[len(heads) - 1]),)
