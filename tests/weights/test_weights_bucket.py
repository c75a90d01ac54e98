"""Buckets: every byte exactly once, cut between blocks of the digest, aligned for every dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weights.bucket import ALIGNMENT, Packer, pack
from weights.catalogue import Catalogue, TensorSpec
from weights.digest import BLOCK_BYTES

SIZES = st.lists(
    st.one_of(st.integers(0, 300), st.integers(3900, 4400), st.integers(0, 60_000)), min_size=0, max_size=12
)


def catalogue(sizes: list[int]) -> Catalogue:
    return Catalogue(TensorSpec(name=f"t{i}", shape=(size,), dtype=torch.uint8) for i, size in enumerate(sizes))


@given(sizes=SIZES, blocks=st.integers(1, 5))
def test_every_byte_of_every_tensor_lies_in_exactly_one_place(sizes: list[int], blocks: int) -> None:
    bucket_bytes = blocks * BLOCK_BYTES
    buckets = pack(catalogue(sizes), bucket_bytes)
    ends = dict.fromkeys(range(len(sizes)), 0)
    for index, bucket in enumerate(buckets):
        used = 0
        for piece in bucket.pieces:
            assert piece.bucket == index
            assert piece.bytes > 0
            assert piece.bucket_offset >= used  # nothing overlaps
            used = piece.bucket_offset + piece.bytes
            assert piece.tensor_offset == ends[piece.tensor]  # pieces come in order and leave no gap
            ends[piece.tensor] += piece.bytes
        assert used == bucket.bytes <= bucket_bytes
    assert ends == dict(enumerate(sizes))


@given(sizes=SIZES, blocks=st.integers(1, 5))
def test_pieces_start_where_digests_and_dtypes_want_them(sizes: list[int], blocks: int) -> None:
    for bucket in pack(catalogue(sizes), blocks * BLOCK_BYTES):
        for piece in bucket.pieces:
            assert piece.tensor_offset % BLOCK_BYTES == 0
            assert piece.bucket_offset % ALIGNMENT == 0
            assert piece.tensor_offset + piece.bytes == sizes[piece.tensor] or piece.bytes % BLOCK_BYTES == 0


@given(sizes=SIZES)
def test_buckets_are_nearly_full(sizes: list[int]) -> None:
    bucket_bytes = 4 * BLOCK_BYTES
    buckets = pack(catalogue(sizes), bucket_bytes)
    assert all(bucket.bytes > bucket_bytes - BLOCK_BYTES - ALIGNMENT for bucket in buckets[:-1])


def test_a_tensor_larger_than_a_bucket_is_cut() -> None:
    buckets = pack(catalogue([100, 5 * BLOCK_BYTES + 1]), 2 * BLOCK_BYTES)
    assert [[(p.tensor, p.tensor_offset, p.bytes) for p in bucket.pieces] for bucket in buckets] == [
        [(0, 0, 100), (1, 0, BLOCK_BYTES)],
        [(1, BLOCK_BYTES, 2 * BLOCK_BYTES)],
        [(1, 3 * BLOCK_BYTES, 2 * BLOCK_BYTES)],
        [(1, 5 * BLOCK_BYTES, 1)],
    ]


def test_empty_tensors_and_empty_manifests_take_no_bucket() -> None:
    assert pack(catalogue([]), BLOCK_BYTES) == ()
    assert pack(catalogue([0, 0]), BLOCK_BYTES) == ()


@pytest.mark.parametrize("bucket_bytes", [0, -4096, 1, 4095, 4097])
def test_a_bucket_holds_whole_blocks(bucket_bytes: int) -> None:
    with pytest.raises(ValueError, match="multiple of 4096"):
        Packer(bucket_bytes)
