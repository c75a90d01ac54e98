"""The kernel hashes thousands of spans as the definition does, bit for bit, wherever they lie.

Under Triton's interpreter on a CPU, for real on a GPU.
"""

import pytest
import torch
from device_spans import (
    DEVICE,
    SIZES,
    WIDENED,
    digests,
    hashes,
    placed,
    random_bytes,
    spans_of,
    unaligned,
    wire_elements,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from weights.digest import BLOCK_BYTES, Digest, TensorHash
from weights.kernel_digest import DigestTable, DigestTile
from weights.spans import Form, form_of


@pytest.mark.parametrize("offset", [0, 1, 2, 4, 8, 15])
def test_spans_of_any_length_at_any_address_have_the_digest_of_the_definition(offset: int) -> None:
    held = placed(SIZES, offset)
    functions = hashes(len(held))
    expected = [function.blocks(span) for function, span in zip(functions, held, strict=True)]
    assert digests(spans_of(held), functions) == expected


@pytest.mark.parametrize("value", [0, -1, 2**31 - 1, -(2**31)])
def test_sums_and_products_of_extreme_words_wrap_as_defined(value: int) -> None:
    words = torch.full((3000,), value, dtype=torch.int32, device=DEVICE)
    functions = hashes(1)
    assert digests(spans_of([words]), functions) == [functions[0].blocks(words.view(torch.uint8))]


@pytest.mark.parametrize("offset", [0, 4, 3])
@pytest.mark.parametrize("dtype", WIDENED, ids=str)
def test_widened_memory_has_the_digest_of_its_wire_bytes(dtype: torch.dtype, offset: int) -> None:
    for count in (1, 2, 2047, 2048, 2049, 3 * 2048, (9 if offset else 66) * 2048 + 5):
        wire = wire_elements(dtype, count)
        held = unaligned(wire.to(torch.float32), offset)
        function = TensorHash("gate.bias", (count,), dtype)
        found = digests(spans_of([held], form_of(dtype, torch.float32)), [function])
        assert found == [function.blocks(wire.view(torch.uint8))]
        assert found == [function.narrowed(wire.to(torch.float32), dtype)]


@pytest.mark.parametrize("dtype", WIDENED, ids=str)
def test_elements_that_widen_nothing_count_as_the_definition_says(dtype: torch.dtype) -> None:
    count = 3 * 2048 + 77
    function = TensorHash("gate.bias", (count,), dtype)
    whole = wire_elements(dtype, count).to(torch.float32)
    for places in ([0], [count - 1], [0, 1], [2047, 2048, 5000], list(range(count))):
        held = whole.clone()
        held.view(torch.int32)[places] ^= 1
        found = digests(spans_of([held], form_of(dtype, torch.float32)), [function])
        assert found != [function.blocks(whole.to(dtype).view(torch.uint8))]
        if dtype == torch.bfloat16 or bool(held.isfinite().all()):
            assert found == [function.narrowed(held, dtype)]


def test_strays_of_float16_round_to_the_nearest_and_overflow_to_infinity() -> None:
    edges = [
        65504.0,
        65519.996,
        65520.0,
        65536.0,
        3e38,
        float("inf"),
        2**-24,
        2**-25,
        1.5 * 2**-25,
        2**-149,
        1.00048828125,
    ]
    held = torch.tensor([sign * edge for edge in edges for sign in (1, -1)], device=DEVICE)
    function = TensorHash("gate.bias", held.shape, torch.float16)
    found = digests(spans_of([held], Form.FLOAT16_IN_FLOAT32), [function])
    assert found == [function.narrowed(held, torch.float16)]


@settings(max_examples=12)
@given(
    cuts=st.lists(st.tuples(st.integers(1, 8), st.sampled_from([0, 0, 4, 7])), min_size=1, max_size=6),
    last=st.integers(1, BLOCK_BYTES),
    order=st.randoms(use_true_random=False),
    first=st.sampled_from([0, 3, 2**33]),
)
def test_any_partition_at_blocks_sums_to_the_whole(cuts, last, order, first) -> None:
    blocks = sum(count for count, _ in cuts)
    data = random_bytes((blocks - 1) * BLOCK_BYTES + last, seed=2)
    pieces, begin = [], 0
    for count, offset in cuts:
        part = data[begin * BLOCK_BYTES : (begin + count) * BLOCK_BYTES]
        pieces.append((unaligned(part, offset), first + begin))
        begin += count
    order.shuffle(pieces)
    spans = spans_of(
        [part for part, _ in pieces], tensors=[0] * len(pieces), first_blocks=[block for _, block in pieces]
    )
    functions = hashes(1)
    assert digests(spans, functions) == [functions[0].blocks(data, first)]


@pytest.mark.parametrize(
    "tile",
    [
        DigestTile(blocks=1, unit_blocks=1),
        DigestTile(blocks=1, unit_blocks=16, warps=4),
        DigestTile(blocks=4, unit_blocks=32),
        DigestTile(blocks=8, unit_blocks=64, warps=4),
    ],
    ids=str,
)
def test_every_tile_gives_the_same_digests(tile: DigestTile) -> None:
    held = placed(SIZES, 0)
    functions = hashes(len(held))
    assert digests(spans_of(held), functions, tile) == digests(spans_of(held), functions)
    widened = [wire_elements(torch.bfloat16, 40_001).to(torch.float32)]
    spans = spans_of(widened, Form.BFLOAT16_IN_FLOAT32)
    assert digests(spans, hashes(1), tile) == digests(spans, hashes(1))


def test_tables_are_read_again_whenever_their_memory_changes() -> None:
    held = placed([3 * 4096 + 5, 4096], 0)
    functions = hashes(2)
    table = DigestTable(spans_of(held), tensors=2, device=DEVICE)
    seeds_N2 = torch.tensor([function.seeds for function in functions], dtype=torch.int64, device=DEVICE)
    before = table.digests(seeds_N2)
    for place in (0, 4096, 3 * 4096 + 4):
        held[0][place] ^= 1
        after = table.digests(seeds_N2)
        assert (after != before).any(dim=1).tolist() == [True, False]
        held[0][place] ^= 1
    assert table.digests(seeds_N2).tolist() == before.tolist()


def test_what_lies_around_a_span_does_not_count() -> None:
    sizes = [5, 4096 * 2 + 3, 4096 * 3]
    for offset in (0, 5):
        held = placed(sizes, offset)
        before = digests(spans_of(held), hashes(3))
        copies = [span.clone() for span in held]
        held[0]._base.fill_(0x5A)
        for span, copy in zip(held, copies, strict=True):
            span.copy_(copy)
        assert digests(spans_of(held), hashes(3)) == before


def test_tensors_without_content_have_the_digest_zero() -> None:
    assert digests(spans_of([]), hashes(2)) == [Digest(0, 0)] * 2
    held = placed([0, 4096, 0], 0)
    found = digests(spans_of(held, tensors=[0, 3, 3]), hashes(4))
    assert [str(digest) for digest in found[:3]] == ["0" * 32] * 3
    assert found[3] == hashes(4)[3].blocks(held[1])


def test_tables_refuse_tensors_and_seeds_that_are_not_theirs() -> None:
    held = placed([4096], 0)
    with pytest.raises(ValueError, match=r"one of 2 tensors, rows \[0\] to others"):
        DigestTable(spans_of(held, tensors=[2]), tensors=2, device=DEVICE)
    table = DigestTable(spans_of(held), tensors=1, device=DEVICE)
    whole = torch.zeros(2, 4, dtype=torch.int64)
    for seeds in (whole[:, :2], whole[:1, ::2], torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=r"contiguous int64 \[1, 2\]"):
            table.digests(seeds.to(DEVICE))


def test_a_device_without_kernels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weights.kernel_device.INTERPRETED", False)
    with pytest.raises(ValueError, match="runs on CUDA memory"):
        DigestTable(spans_of([]), tensors=1, device=torch.device("cpu"))
