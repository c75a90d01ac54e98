"""The gate's kernel, under Triton's interpreter: every tile computes one product, in the order that is written down.

NumPy's product has an order of its own, so tl.dot's is told apart on the GPU only; here such tiles multiply numbers
whose sums are exact in any order, or differ only from chunk to chunk.
"""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from routing import GateSpec
from routing.bits import differs
from routing.gate_reference import CHUNK, fp32_gate, fused_multiply_add
from routing.gate_tiles import TILES, Arithmetic, Tile, Walk, tile_for, tokens_at_a_time
from routing.kernel_gate import kernel_gate

BF16, FP64 = torch.bfloat16, torch.float64
LANES = tuple(Tile(walk=Walk.LANES, depth=depth, warps=1, stages=4) for depth in (4, 8, 16))
FP32_TILES = (
    *LANES,
    Tile(walk=Walk.CHUNKS, tokens=16, experts=32, depth=64, warps=4, stages=2),
    Tile(walk=Walk.CHUNKS, tokens=16, experts=16, depth=32, is_transposed=True, warps=4, stages=2),
    Tile(tokens=16, experts=16, depth=128, warps=4, stages=2),
    Tile(tokens=32, experts=16, depth=16, is_transposed=True, warps=4, stages=2),
)
TF32_TILES = (
    Tile(tokens=64, experts=32, depth=32, warps=4, stages=2),
    Tile(tokens=128, experts=16, depth=16, warps=8, stages=2),
)
TENSOR_TILES = (Tile(tokens=16, experts=8, depth=64, warps=1, stages=2), TF32_TILES[0])
GATES = {
    "fp32": GateSpec(has_bias=True),
    "tf32": GateSpec(tf32=True, has_bias=True),
    "bf16": GateSpec(operand_dtype=BF16, output_dtype=BF16, has_bias=True),
    "bf16 to fp32": GateSpec(operand_dtype=BF16, has_bias=True),
    "fp16": GateSpec(operand_dtype=torch.float16, output_dtype=torch.float16, has_bias=True),
    "fp64": GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64, has_bias=True),
}


def tiles(gate: GateSpec) -> tuple[Tile, ...]:
    return {Arithmetic.FP32: FP32_TILES, Arithmetic.TF32: TF32_TILES}.get(Arithmetic.of(gate), TENSOR_TILES)


def eighths(*shape: int, seed: int) -> Tensor:
    """Multiples of 1/8 up to 1: products and sums of a few hundred of them are exact in fp32."""
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(seed)) / 8


@pytest.mark.parametrize("name", GATES)
@pytest.mark.parametrize(("T", "E", "D"), [(1, 2, 300), (5, 20, 300), (33, 3, 64)])
def test_every_tile_gives_the_product_and_reads_nothing_else(name: str, T: int, E: int, D: int) -> None:
    gate = GATES[name]
    dtype = gate.operand_dtype
    around = torch.full((T + 2, D + 6), float("nan"), dtype=dtype)
    around[:T, 3:-3] = eighths(T, D, seed=0).to(dtype)
    weights = torch.full((E + 2, D + 2), float("nan"), dtype=dtype)
    weights[:E, :D] = eighths(E, D, seed=1).to(dtype)
    bias_E = eighths(E, seed=2).to(dtype)
    hidden_TD, weight_ED = around[:T, 3:-3], weights[:E, :D]
    expected = hidden_TD.double() @ weight_ED.double().t() + bias_E.double()
    for tile in tiles(gate):
        if tile.walk is Walk.LANES and T > 1:
            continue  # a program a logit, which is slow here
        found = kernel_gate(hidden_TD, weight_ED, gate, bias_E, tile=tile)
        assert not differs(found, expected.to(gate.output_dtype)).any(), tile


def test_operands_are_rounded_to_the_gates_dtype_and_the_result_once() -> None:
    random = torch.Generator().manual_seed(0)
    hidden_TD, weight_ED = torch.randn(4, 64, generator=random), torch.randn(8, 64, generator=random)
    bias_E = torch.randn(8, generator=random)
    for name in ("bf16", "fp16", "bf16 to fp32"):
        gate = GATES[name]
        rounded = [tensor.to(gate.operand_dtype).double() for tensor in (hidden_TD, weight_ED, bias_E)]
        exact = rounded[0] @ rounded[1].t() + rounded[2]
        found = kernel_gate(hidden_TD, weight_ED, gate, bias_E)
        step = torch.finfo(gate.output_dtype).eps * exact.abs() / 2
        assert ((found.double() - exact).abs() <= step + 1e-5).all()
        unrounded = hidden_TD.double() @ weight_ED.double().t() + bias_E
        assert (found.double() - unrounded).abs().max() > 1e-3


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")  # infinity times the zeros that fill a tile
def test_tf32_operands_are_rounded_to_the_nearest_and_ties_to_even() -> None:
    """A product with one is the operand as the tensor cores get it."""
    step = 2.0**-10
    numbers = [1.0 + step / 2, 1.0 + 1.5 * step, 1.0 + step * 0.5001, -1.0 - step / 2, -1.0 - 1.5 * step,
               2.0**-126 * 1.3, 3.0e-39, 3.4e38, 3.4028234e38, float("inf"), -float("inf"), -0.0]  # fmt: skip
    random = torch.Generator().manual_seed(0)
    spread = torch.randn(500, generator=random) * 2.0 ** torch.arange(-60, 65).repeat(4)
    given = torch.cat([torch.tensor(numbers), spread])
    unit = 2.0 ** (torch.frexp(given.double()).exponent.clamp(min=-125).double() - 11)
    expected = torch.where(given.isfinite(), (given.double() / unit).round() * unit, given.double()).float()
    assert expected[8] == float("inf")  # rounded past the largest
    column_TD, one_ED = torch.zeros(len(given), 16), torch.zeros(1, 16)
    column_TD[:, 0], one_ED[:, 0] = given, 1.0
    gate = GateSpec(tf32=True)
    for found in (kernel_gate(column_TD, one_ED, gate)[:, 0], kernel_gate(one_ED, column_TD, gate)[0]):
        assert not differs(found + 0.0, expected + 0.0).any()
    assert kernel_gate(torch.full((1, 16), float("nan")), one_ED, gate).isnan().all()
    payload = torch.full((1, 16), 0x7F800001, dtype=torch.int32).view(torch.float32)  # NaN; the first 19 bits: infinity
    assert kernel_gate(payload, one_ED, gate).isnan().all()


@pytest.mark.parametrize("D", [128, 1300])
def test_lanes_add_in_the_references_order(D: int) -> None:
    """Of bf16 numbers, whose products are exact: the interpreter's multiply-add rounds twice, a GPU's once."""
    random = torch.Generator().manual_seed(D)
    hidden_TD = torch.randn(2, D, generator=random).to(BF16)
    weight_ED = torch.randn(2, D, generator=random).to(BF16).float()
    expected = fp32_gate(hidden_TD, weight_ED)
    for tile in LANES:
        assert not differs(kernel_gate(hidden_TD, weight_ED, GateSpec(), tile=tile), expected).any()
    backwards = fp32_gate(hidden_TD.flip(1), weight_ED.flip(1))
    assert differs(backwards, expected).any()


def test_chunks_are_added_in_ascending_order_by_every_tile() -> None:
    """One product a chunk, of sizes whose sum depends on the order."""
    D = 9 * CHUNK + 40
    hidden_TD, weight_ED = torch.zeros(1, D), torch.zeros(3, D)
    random = torch.Generator().manual_seed(0)
    at = torch.arange(0, D, CHUNK) + 17
    hidden_TD[:, at] = 1.0
    weight_ED[:, at] = torch.randn(3, len(at), generator=random) * 2.0 ** torch.randint(
        -12, 13, (3, len(at)), generator=random
    )
    expected = fp32_gate(hidden_TD, weight_ED)
    for tile in FP32_TILES:
        assert not differs(kernel_gate(hidden_TD, weight_ED, GateSpec(), tile=tile), expected).any(), tile
    descending = fp32_gate(hidden_TD.flip(1), weight_ED.flip(1))
    assert differs(descending, expected).any()


def test_a_negative_zero_is_nobodys_logit() -> None:
    hidden_TD, weight_ED = torch.full((1, 200), -0.0), torch.full((2, 200), 1.0)
    for tile in FP32_TILES:
        found = kernel_gate(hidden_TD, weight_ED, GateSpec(), tile=tile)
        assert not differs(found, torch.zeros(1, 2)).any()
    assert not differs(fp32_gate(hidden_TD, weight_ED), torch.zeros(1, 2)).any()


@pytest.mark.parametrize("name", GATES)
def test_a_row_alone_is_the_row_in_a_batch_in_any_order(name: str) -> None:
    gate = GATES[name]
    hidden_TD, weight_ED, bias_E = eighths(40, 96, seed=0), eighths(12, 96, seed=1), eighths(12, seed=2)
    whole = kernel_gate(hidden_TD, weight_ED, gate, bias_E)
    assert not differs(kernel_gate(hidden_TD[7:8], weight_ED, gate, bias_E), whole[7:8]).any()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    assert not differs(kernel_gate(hidden_TD[order], weight_ED, gate, bias_E), whole[order]).any()


@pytest.mark.parametrize("name", ["fp32", "fp64"])
def test_tokens_that_take_several_launches_get_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = GATES[name]
    hidden_TD, weight_ED, bias_E = eighths(150, 300, seed=0), eighths(5, 300, seed=1), eighths(5, seed=2)
    expected = kernel_gate(hidden_TD, weight_ED, gate, bias_E)
    before = tokens_at_a_time(2**20)
    monkeypatch.setattr("routing.gate_tiles.SCRATCH_BYTES", 4096)
    assert (before, tokens_at_a_time(2**20)) == (128, 64)
    assert not differs(kernel_gate(hidden_TD, weight_ED, gate, bias_E), expected).any()
    assert not differs(expected, (hidden_TD @ weight_ED.t() + bias_E).to(expected.dtype)).any()


def test_no_tokens_make_no_logits() -> None:
    assert kernel_gate(torch.zeros(0, 64), torch.zeros(8, 64), GateSpec()).shape == (0, 8)


NUMBERS = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


@given(st.lists(st.tuples(NUMBERS, NUMBERS, NUMBERS), min_size=1, max_size=20))
def test_the_references_multiply_add_rounds_once(triples: list[tuple[float, float, float]]) -> None:
    a, b, c = (torch.tensor(column) for column in zip(*triples, strict=True))
    for one, found in zip(triples, fused_multiply_add(a, b, c), strict=True):
        exact = Fraction(one[0]) * Fraction(one[1]) + Fraction(one[2])
        assert_nearest(found, exact)


@given(st.integers(1, 2**23 - 1), st.integers(-80, -1), st.sampled_from([-1.0, 1.0]))
def test_the_references_multiply_add_sees_what_fp64_would_round_away(odd: int, exponent: int, sign: float) -> None:
    """A product half way between two fp32 numbers, and an addend far below fp64's last bit that decides."""
    a, b, c = torch.tensor([1.0 + odd * 2.0**-23]), torch.tensor([1.0 + 2.0**-12]), torch.tensor([sign * 2.0**exponent])
    exact = Fraction(a.item()) * Fraction(b.item()) + Fraction(c.item())
    assert_nearest(fused_multiply_add(a, b, c)[0], exact)


def assert_nearest(found: Tensor, exact: Fraction) -> None:
    """IEEE's nearest, and among two the even one."""
    away = Fraction(found.item()) - exact
    for towards in (float("inf"), -float("inf")):
        neighbour = torch.nextafter(found, torch.tensor(towards))
        if neighbour.isfinite():
            other = abs(Fraction(neighbour.item()) - exact)
            assert abs(away) < other or (abs(away) == other and found.view(torch.int32).item() % 2 == 0)


def test_the_reference_is_as_close_as_fp32_gets() -> None:
    random = torch.Generator().manual_seed(0)
    hidden_TD, weight_ED = torch.randn(16, 2048, generator=random), torch.randn(8, 2048, generator=random)
    exact = hidden_TD.double() @ weight_ED.double().t()
    terms = hidden_TD.double().abs() @ weight_ED.double().abs().t()
    error = (fp32_gate(hidden_TD, weight_ED).double() - exact).abs()
    assert (error <= (CHUNK + 2048 / CHUNK) * 2.0**-24 * terms).all()


@given(st.sampled_from(list(Arithmetic)), st.integers(1, 2**21))
def test_there_is_a_tile_for_every_number_of_tokens(arithmetic: Arithmetic, T: int) -> None:
    tile = tile_for(arithmetic, T)
    assert tile.walk is Walk.WHOLE or arithmetic is Arithmetic.FP32
    assert tile.walk is not Walk.LANES or T < 2**16  # a grid's second dimension ends there


def test_the_table_keeps_to_what_the_kernel_can_launch() -> None:
    for arithmetic, rows in TILES.items():
        limits = [row.up_to for row in rows]
        assert limits[-1] is None
        assert limits[:-1] == sorted(limit for limit in limits if limit is not None)
        for tile in (row.tile for row in rows):
            tile.check(arithmetic)
            assert arithmetic is not Arithmetic.FP32 or CHUNK % tile.depth == 0
            assert tile.walk is not Walk.LANES or tile.depth in (4, 8, 16)


@pytest.mark.parametrize(("tokens", "experts", "warps"), [(16, 16, 4), (32, 64, 4), (64, 8, 4), (64, 16, 2)])
def test_a_tile_for_one_warps_instruction_is_refused_in_tf32(tokens: int, experts: int, warps: int) -> None:
    tile = Tile(tokens=tokens, experts=experts, depth=32, warps=warps, stages=2)
    hidden_TD, weight_ED = torch.ones(1, 32), torch.ones(8, 32)
    with pytest.raises(ValueError, match=rf"gate in tf32: Tile\(.*tokens={tokens}, .*; expected 64 tokens, 16 experts"):
        kernel_gate(hidden_TD, weight_ED, GateSpec(tf32=True), tile=tile)
    kernel_gate(hidden_TD, weight_ED, GateSpec(operand_dtype=BF16), tile=tile)


def test_a_sum_that_has_no_chunks_is_not_walked_in_chunks() -> None:
    for tile in (FP32_TILES[0], FP32_TILES[3], FP32_TILES[-1]):
        tile.check(Arithmetic.FP32)
        for arithmetic in (Arithmetic.HALF, Arithmetic.FP64):
            with pytest.raises(ValueError, match="a whole walk on the weight as it is"):
                tile.check(arithmetic)
