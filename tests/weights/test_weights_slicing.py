"""Slices cover every byte once, in order, and never cut through a block of the digest."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weights.digest import BLOCK_BYTES
from weights.slicing import MAX_PARTS, Part, Slice, cut

K = BLOCK_BYTES


@pytest.mark.parametrize(
    ("extents", "slices"),
    [
        ([], []),
        ([(8, 0)], []),
        ([(8, 5)], [Slice(8, 5, (Part(0, 0, 5),))]),
        ([(8, 5), (13, 7)], [Slice(8, 12, (Part(0, 0, 5), Part(1, 0, 7)))]),
        ([(13, 7), (8, 5)], [Slice(8, 12, (Part(1, 0, 5), Part(0, 0, 7)))]),
        ([(8, 5), (14, 7)], [Slice(8, 5, (Part(0, 0, 5),)), Slice(14, 7, (Part(1, 0, 7),))]),
        ([(8, 2 * K)], [Slice(8, 2 * K, (Part(0, 0, 2 * K),))]),
        ([(8, 2 * K + 1)], [Slice(8, 2 * K, (Part(0, 0, 2 * K),)), Slice(8 + 2 * K, 1, (Part(0, 2 * K, 1),))]),
        (
            [(8, 5), (13, 2 * K)],
            [Slice(8, 5 + K, (Part(0, 0, 5), Part(1, 0, K))), Slice(13 + K, K, (Part(1, K, K),))],
        ),
        (
            [(8, K + 5), (13 + K, K)],
            [Slice(8, K + 5, (Part(0, 0, K + 5),)), Slice(13 + K, K, (Part(1, 0, K),))],
        ),
        ([(8, K), (8, K)], [Slice(8, K, (Part(0, 0, K),)), Slice(8, K, (Part(1, 0, K),))]),
    ],
    ids=[
        "nothing",
        "an empty tensor",
        "one tensor",
        "neighbours share a slice",
        "in the order in which they lie",
        "a gap is not read",
        "a full slice",
        "a tensor larger than a slice",
        "a cut at a block",
        "no room for a block",
        "the same bytes for two",
    ],
)
def test_extents_are_cut_like_this(extents: list[tuple[int, int]], slices: list[Slice]) -> None:
    assert list(cut(extents, 2 * K)) == slices


def test_a_slice_has_no_more_parts_than_one_read_can_scatter() -> None:
    found = list(cut([(place, 1) for place in range(2 * MAX_PARTS + 1)], 1 << 20))
    assert [len(piece.parts) for piece in found] == [MAX_PARTS, MAX_PARTS, 1]


@given(
    steps=st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 4096]), st.integers(0, 5 * K)), max_size=12),
    slice_bytes=st.integers(K, 4 * K),
    order=st.randoms(use_true_random=False),
)
def test_every_byte_is_in_one_part_and_every_part_where_its_slice_says(
    steps: list[tuple[int, int]], slice_bytes: int, order: st.DataObject
) -> None:
    extents, end = [], 8
    for gap, size in steps:
        extents.append((end + gap, size))
        end += gap + size
    order.shuffle(extents)  # type: ignore[attr-defined]
    covered: dict[int, int] = dict.fromkeys(range(len(extents)), 0)
    for piece in cut(extents, slice_bytes):
        assert 0 < piece.bytes <= slice_bytes
        place = piece.start
        for part in piece.parts:
            assert place == extents[part.tensor][0] + part.offset
            assert part.offset == covered[part.tensor]
            assert part.offset % K == 0
            assert part.bytes > 0
            covered[part.tensor] += part.bytes
            place += part.bytes
        assert place == piece.start + piece.bytes
    assert covered == {tensor: size for tensor, (_, size) in enumerate(extents)}


def test_a_slice_smaller_than_a_block_is_refused() -> None:
    with pytest.raises(ValueError, match="a slice holds at least 4096 bytes, got 4095"):
        list(cut([(0, 1)], K - 1))
