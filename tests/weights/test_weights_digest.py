"""Digests equal their definition in plain integers, on any partition and device, and show every change."""

import hashlib
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weights.digest import BLOCK_BYTES, ZERO, Digest, TensorHash, tensor_digest, wire_bytes
from weights.dtypes import WIRE_DTYPES, fits

MASK = (1 << 64) - 1
DTYPES = sorted(WIRE_DTYPES)


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def digest_by_definition(name: str, shape: tuple[int, ...], dtype: str, data: bytes) -> Digest:
    """The module's docstring in Python's integers, one word at a time."""

    def mix(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        return z ^ (z >> 31)

    def word(block: bytes, i: int) -> int:
        return int.from_bytes(block[4 * i : 4 * i + 4], "little", signed=True)

    def wrapped(value: int) -> int:
        return (value + (1 << 31)) % (1 << 32) - (1 << 31)

    seed = hashlib.blake2b(f"{dtype}\n{','.join(map(str, shape))}\n{name}".encode(), digest_size=16).digest()
    lanes = []
    for lane in range(2):
        keys = hashlib.shake_256(b"moe-rollout weight digest, keys of lane %d" % lane).digest(4096)
        lane_seed = int.from_bytes(seed[8 * lane : 8 * lane + 8], "little")
        total = mix(lane_seed)
        for index in range(-(-len(data) // 4096)):
            block = data[4096 * index : 4096 * (index + 1)].ljust(4096, b"\0")
            nh = sum(
                wrapped(word(block, i) + word(keys, i)) * wrapped(word(block, i + 512) + word(keys, i + 512))
                for i in range(512)
            )
            total += mix((nh + mix((lane_seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK)) & MASK)
        lanes.append(total & MASK)
    return Digest(*lanes)


@pytest.mark.parametrize("size", [0, 1, 2, 3, 4, 5, 4095, 4096, 4097, 3 * 4096, 300_001])
def test_a_digest_is_what_its_definition_says(size: int) -> None:
    data = random_bytes(size)
    assert tensor_digest("a.weight", data) == digest_by_definition("a.weight", (size,), "uint8", bytes(data.tolist()))


def test_extreme_words_wrap_as_defined() -> None:
    for value in (0, -1, 2**31 - 1, -(2**31)):
        words = torch.full((1500,), value, dtype=torch.int32)
        data = value.to_bytes(4, "little", signed=True) * 1500
        assert tensor_digest("w", words) == digest_by_definition("w", (1500,), "int32", data)


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.arange(5000, dtype=torch.float32), "0f92981fb6a121e0dea7cb183afa4357"),
        (torch.arange(100).to(torch.bfloat16).view(10, 10), "706ceea3d8ff964f17d6fcff1117c77b"),
        (torch.tensor(1.5, dtype=torch.float16), "4aed18af98d7c0947516dc9fc7f4aef3"),
        (torch.zeros(0, 7), "787d95be3caa4300374cb4ee38b9d10d"),
    ],
    ids=["float32", "bfloat16", "scalar", "empty"],
)
def test_known_answers_never_change(tensor: torch.Tensor, expected: str) -> None:
    assert tensor_digest("model.norm.weight", tensor).hex == expected


@given(cuts=st.sets(st.integers(1, 9), max_size=9), order=st.randoms(use_true_random=False))
def test_blocks_may_be_hashed_in_any_partition_and_order(cuts: set[int], order) -> None:
    data = random_bytes(9 * BLOCK_BYTES + 77)
    function = TensorHash("a", (data.numel(),), torch.uint8)
    edges = [0, *sorted(cuts), 10]
    parts = [function.blocks(data[start * BLOCK_BYTES : stop * BLOCK_BYTES], start) for start, stop in pairwise(edges)]
    order.shuffle(parts)
    assert Digest.total([function.header, *parts]) == tensor_digest("a", data)


@given(size=st.integers(1, 9000), data=st.data())
def test_any_flipped_bit_shows(size: int, data: st.DataObject) -> None:
    before = random_bytes(size, seed=size)
    after = before.clone()
    after[data.draw(st.integers(0, size - 1))] ^= 1 << data.draw(st.integers(0, 7))
    assert tensor_digest("a", before) != tensor_digest("a", after)


def test_every_single_bit_of_a_block_of_zeros_shows_and_no_two_alike() -> None:
    function = TensorHash("a", (64,), torch.uint8)
    seen = {function.blocks(torch.zeros(64, dtype=torch.uint8))}
    for bit in range(512):
        flipped = torch.zeros(64, dtype=torch.uint8)
        flipped[bit // 8] = 1 << (bit % 8)
        seen.add(function.blocks(flipped))
    assert len(seen) == 513


@given(first=st.integers(0, 2999), second=st.integers(0, 2999))
def test_swapped_elements_show(first: int, second: int) -> None:
    before = torch.arange(3000, dtype=torch.int32)
    after = before.clone()
    after[[first, second]] = before[[second, first]]
    assert (tensor_digest("a", before) == tensor_digest("a", after)) == (first == second)


def test_swapped_blocks_and_swapped_halves_of_a_block_show() -> None:
    data = random_bytes(2 * BLOCK_BYTES)
    half = BLOCK_BYTES // 2
    blocks_swapped = torch.cat([data[BLOCK_BYTES:], data[:BLOCK_BYTES]])
    halves_swapped = torch.cat([data[half:BLOCK_BYTES], data[:half], data[BLOCK_BYTES:]])
    assert len({tensor_digest("a", each) for each in (data, blocks_swapped, halves_swapped)}) == 3


def test_swapped_tensors_show_in_the_sum_of_their_digests() -> None:
    q, k = random_bytes(100, seed=1), random_bytes(100, seed=2)
    right = tensor_digest("q", q) + tensor_digest("k", k)
    assert right != tensor_digest("q", k) + tensor_digest("k", q)


def test_name_shape_and_dtype_count_even_where_the_bytes_do_not_differ() -> None:
    zeros = torch.zeros(2, 6)
    variants = [
        tensor_digest("a", zeros),
        tensor_digest("b", zeros),
        tensor_digest("a", zeros.view(6, 2)),
        tensor_digest("a", zeros.view(12)),
        tensor_digest("a", zeros.view(torch.int32)),
        tensor_digest("a", torch.zeros(2, 7)),
        tensor_digest("a", torch.zeros(0)),
        tensor_digest("b", torch.zeros(0)),
        tensor_digest("a", torch.zeros(0, 3)),
        tensor_digest("a", torch.zeros(())),
        tensor_digest("a", torch.zeros(1)),
    ]
    assert len(set(variants)) == len(variants)
    assert ZERO not in variants


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_wire_dtype_is_hashed_from_its_bytes(dtype: str) -> None:
    kind = WIRE_DTYPES[dtype]
    data = random_bytes(1001 * kind.itemsize) & (1 if kind is torch.bool else 255)
    tensor = data.view(kind)
    assert tensor_digest("a", tensor) == digest_by_definition("a", (1001,), dtype, bytes(data.tolist()))


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
def test_views_at_odd_addresses_hash_like_their_copies(offset: int) -> None:
    data = random_bytes(3 * BLOCK_BYTES + 10)
    view = data[offset : offset + 2 * BLOCK_BYTES + 1]
    assert tensor_digest("a", view) == tensor_digest("a", view.clone())
    halves = random_bytes(2 * 5000).view(torch.bfloat16)[offset:4500]
    assert tensor_digest("a", halves) == tensor_digest("a", halves.clone())


def test_strided_views_hash_like_their_copies() -> None:
    tensor = torch.randn(40, 30).t()
    assert tensor_digest("a", tensor) == tensor_digest("a", tensor.contiguous())


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [0, 1, 1000, 200_001])
def test_a_widened_tensor_hashes_as_it_was_on_the_wire(wire: torch.dtype, size: int) -> None:
    sent = torch.randn(size).to(wire)
    assert tensor_digest("a", sent.float(), wire) == tensor_digest("a", sent)


def test_every_bfloat16_pattern_survives_widening_and_narrowing() -> None:
    sent = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    hosted = torch.zeros(2**16)
    hosted.copy_(sent)
    assert tensor_digest("a", hosted, torch.bfloat16) == tensor_digest("a", sent)


@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bit", range(32))
def test_any_flipped_bit_of_a_widened_tensor_shows(wire: torch.dtype, bit: int) -> None:
    sent = torch.randn(1000).to(wire)
    hosted = sent.float()
    hosted.view(torch.int32)[500] ^= 1 << bit if bit < 31 else -(2**31)
    assert tensor_digest("a", hosted, wire) != tensor_digest("a", sent)


@pytest.mark.parametrize(
    ("wire", "hosted", "taken"),
    [
        ("float32", "float32", True),
        ("bfloat16", "float32", True),
        ("float16", "float32", True),
        ("float32", "bfloat16", False),
        ("bfloat16", "float16", False),
        ("float16", "bfloat16", False),
        ("int32", "float32", False),
    ],
)
def test_a_host_takes_its_own_dtype_or_widens_exactly(wire: str, hosted: str, taken: bool) -> None:
    assert fits(WIRE_DTYPES[wire], WIRE_DTYPES[hosted]) == taken
    if not taken:
        with pytest.raises(ValueError, match="does not hold"):
            tensor_digest("a", torch.zeros(3, dtype=WIRE_DTYPES[hosted]), WIRE_DTYPES[wire])


def test_digests_add_and_subtract_by_lane() -> None:
    first, second = Digest(MASK, 1), Digest(2, MASK)
    assert first + second == Digest(1, 0)
    assert first + second - second == first
    assert Digest.total([]) == ZERO
    assert Digest.from_hex(first.hex) == first
    assert str(first) == "f" * 16 + "0" * 15 + "1"


@pytest.mark.parametrize("text", ["", "0" * 31, "0" * 33, "0" * 31 + "g", "A" * 32, " " + "0" * 31])
def test_a_malformed_digest_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="32 lower-case"):
        Digest.from_hex(text)


def test_a_dtype_that_the_wire_does_not_know_is_refused() -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        tensor_digest("a", torch.zeros(2, dtype=torch.complex64))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "int64", "uint8", "bool"])
@pytest.mark.parametrize("size", [0, 1, 4095, 1_000_003, 40_000_000])
def test_the_gpu_gives_the_cpu_digest(dtype: str, size: int) -> None:
    kind = WIRE_DTYPES[dtype]
    tensor = (random_bytes(size * kind.itemsize) & (1 if kind is torch.bool else 255)).view(kind)
    assert tensor_digest("a", tensor.cuda()) == tensor_digest("a", tensor)


@pytest.mark.gpu
@pytest.mark.parametrize("wire", [torch.bfloat16, torch.float16])
def test_the_gpu_narrows_to_the_cpu_digest(wire: torch.dtype) -> None:
    sent = torch.randn(1_000_003).to(wire)
    assert tensor_digest("a", sent.float().cuda(), wire) == tensor_digest("a", sent)


def test_wire_bytes_are_a_view() -> None:
    tensor = torch.zeros(3, 4, dtype=torch.bfloat16)
    wire_bytes(tensor)[0] = 7
    assert tensor.view(torch.int16)[0, 0] == 7
