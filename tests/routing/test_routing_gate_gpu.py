"""On a GPU: every tile of the gate gives one result, in any batch; fp32 gives the written order's bits; a learner with
the gate installed and a host compute the same logits."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn.functional import linear

from routing import GateSpec, gate_logits
from routing.bits import differs
from routing.gate_claims import FROM_TOKENS, MEASURED_ON
from routing.gate_measure import measure_gate
from routing.gate_reference import fp32_gate
from routing.gate_tiles import SCRATCH_BYTES, TILES, Arithmetic, Tile, Walk
from routing.installed_gate import install_gate
from routing.kernel_gate import kernel_gate

pytestmark = pytest.mark.gpu

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
GATES = {
    "fp32": GateSpec(),
    "tf32": GateSpec(tf32=True),
    "bf16": GateSpec(operand_dtype=BF16, output_dtype=BF16),
    "bf16 to fp32": GateSpec(operand_dtype=BF16),
    "fp16": GateSpec(operand_dtype=torch.float16, output_dtype=torch.float16),
    "fp64": GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64),
}
SHAPES = ((128, 2048), (60, 2880), (256, 1000))
"""(E, D): an ordinary one, gpt-oss's D with experts that fill no tile, a D that fills neither step nor chunk."""
MORE_TILES = {
    Arithmetic.FP32: (
        Tile(walk=Walk.LANES, depth=4, warps=1, stages=8),
        Tile(walk=Walk.LANES, depth=16, warps=1, stages=2),
        Tile(walk=Walk.CHUNKS, tokens=64, experts=32, depth=64, warps=4, stages=2),
        Tile(walk=Walk.CHUNKS, tokens=16, experts=32, depth=64, is_transposed=True, warps=1, stages=2),
        Tile(tokens=64, experts=64, depth=32, warps=4, stages=2),
        Tile(tokens=32, experts=64, depth=16, is_transposed=True, warps=4, stages=3),
    ),
    Arithmetic.TF32: (
        Tile(tokens=64, experts=16, depth=32, warps=4, stages=3),
        Tile(tokens=64, experts=128, depth=32, warps=8, stages=2),
        Tile(tokens=128, experts=16, depth=64, warps=8, stages=2),
    ),
    Arithmetic.HALF: (
        Tile(tokens=16, experts=16, depth=64, warps=2, stages=2),
        Tile(tokens=16, experts=8, depth=512, warps=1, stages=3),
        Tile(tokens=64, experts=16, depth=256, warps=4, stages=3),
        Tile(tokens=128, experts=64, depth=64, warps=4, stages=3),
    ),
    Arithmetic.FP64: (Tile(tokens=16, experts=8, depth=64, warps=1, stages=3),),
}


@pytest.fixture
def precision() -> Iterator[None]:
    """Puts the process-wide precision of fp32 products back."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def random_operands(device: torch.device, T: int, E: int, D: int, *, bf16_hidden: bool = True) -> tuple[Tensor, Tensor]:
    random = torch.Generator(device=device).manual_seed(T + E + D)
    hidden_TD = torch.randn(T, D, generator=random, device=device)
    weight_ED = torch.randn(E, D, generator=random, device=device) * D**-0.5
    return hidden_TD.to(BF16) if bf16_hidden else hidden_TD, weight_ED


def tiles(gate: GateSpec) -> list[Tile]:
    arithmetic = Arithmetic.of(gate)
    return [*(row.tile for row in TILES[arithmetic]), *MORE_TILES[arithmetic]]


def assert_same(found: Tensor, expected: Tensor, what: object = None) -> None:
    assert found.dtype == expected.dtype
    assert differs(found, expected).sum().item() == 0, what


@pytest.mark.parametrize(
    ("name", "E", "D"),
    [(name, E, D) for name in GATES for E, D in (SHAPES if name in ("fp32", "tf32", "bf16") else SHAPES[:1])],
)
def test_a_row_has_one_result_whatever_the_tile_the_batch_and_its_place(
    name: str, E: int, D: int, cuda: torch.device
) -> None:
    gate = GATES[name]
    hidden_TD, weight_ED = random_operands(cuda, 2500, E, D)
    expected = gate_logits(hidden_TD, weight_ED, gate)
    for tile in tiles(gate):
        assert_same(kernel_gate(hidden_TD[:333], weight_ED, gate, tile=tile), expected[:333], tile)
    for T in (1, 2, 7, 16, 17, 64, 255, 256, 257, 1024, 2049):
        assert_same(gate_logits(hidden_TD[:T], weight_ED, gate), expected[:T], T)
        assert_same(gate_logits(hidden_TD[-T:], weight_ED, gate), expected[-T:], T)
    order = torch.randperm(2500, device=cuda)
    assert_same(gate_logits(hidden_TD[order], weight_ED, gate), expected[order])


@pytest.mark.parametrize("margin", [1, 8])
@pytest.mark.parametrize("name", ["fp32", "tf32", "bf16"])
def test_rows_at_a_stride_and_off_alignment_give_the_same(name: str, margin: int, cuda: torch.device) -> None:
    hidden_TD, weight_ED = random_operands(cuda, 300, 128, 2048)
    wide = torch.full((300, 2048 + margin), float("nan"), dtype=BF16, device=cuda)
    wide[:, margin:] = hidden_TD
    assert_same(gate_logits(wide[:, margin:], weight_ED, GATES[name]), gate_logits(hidden_TD, weight_ED, GATES[name]))


@pytest.mark.parametrize("name", GATES)
def test_logits_are_as_close_as_their_dtype_gets(name: str, cuda: torch.device) -> None:
    gate = GATES[name]
    hidden_TD, weight_ED = random_operands(cuda, 300, 128, 4096, bf16_hidden=False)
    pair = [tensor.to(gate.operand_dtype).double() for tensor in (hidden_TD, weight_ED)]
    exact = pair[0] @ pair[1].t()
    terms = pair[0].abs() @ pair[1].abs().t()
    error = (gate_logits(hidden_TD, weight_ED, gate).double() - exact).abs()
    per_term = {"tf32": 2.0**-9, "fp64": 2.0**-45}.get(name, 2.0**-18)  # tensor cores cut, fp32 and fp64 round
    assert (error <= torch.finfo(gate.output_dtype).eps * exact.abs() + per_term * terms).all()


@pytest.mark.parametrize(("E", "D"), SHAPES)
def test_fp32_adds_in_the_references_order(E: int, D: int, cuda: torch.device) -> None:
    hidden_TD, weight_ED = random_operands(cuda, 40, E, D, bf16_hidden=False)
    hidden_TD[3] *= 1e-38  # products and sums that underflow
    hidden_TD[4, 17] = float("inf")
    hidden_TD[5, -1] = float("nan")
    hidden_TD[6] = -0.0
    bias_E = torch.randn(E, device=cuda)
    expected = fp32_gate(hidden_TD, weight_ED, bias_E)
    for tile in tiles(GateSpec()):
        assert_same(kernel_gate(hidden_TD, weight_ED, GateSpec(has_bias=True), bias_E, tile=tile), expected, tile)
    assert differs(fp32_gate(hidden_TD.flip(1), weight_ED.flip(1), bias_E), expected).any()


def full_of_ties(tensor: Tensor) -> Tensor:
    """Every other number half way between two of TF32, the others anywhere."""
    tied = (tensor.view(torch.int32) & -8192 | 0x1000).view(FP32)
    return torch.where(torch.arange(tensor.shape[1], device=tensor.device) % 2 == 0, tied, tensor)


def test_tf32_operands_are_rounded_to_the_nearest_and_ties_to_even(cuda: torch.device) -> None:
    gate = GATES["tf32"]
    operands = [full_of_ties(x) for x in random_operands(cuda, 300, 128, 2048, bf16_hidden=False)]
    bits = [x.view(torch.int32) for x in operands]
    to_even = [((x + 0xFFF + ((x >> 13) & 1)) & -8192).view(FP32) for x in bits]
    away = [((x + 0x1000) & -8192).view(FP32) for x in bits]
    cut = [(x & -8192).view(FP32) for x in bits]
    found = gate_logits(*operands, gate)
    assert_same(found, gate_logits(*to_even, gate))
    for other in (away, cut):
        assert differs(gate_logits(*other, gate), found).double().mean() > 0.9


@pytest.mark.parametrize(("T", "E", "D"), [(2048, 128, 2048), (8192, 128, 2048), (2048, 160, 5120)])
def test_a_tf32_gate_is_pytorchs_linear_layer_at_precision_high(
    T: int, E: int, D: int, precision: None, cuda: torch.device
) -> None:
    """Where cuBLAS splits no sum: its operands are rounded as ours, its instruction is the one that ours keeps to."""
    hidden_TD, weight_ED = (full_of_ties(x) for x in random_operands(cuda, T, E, D, bf16_hidden=False))
    torch.set_float32_matmul_precision("high")
    assert_same(gate_logits(hidden_TD, weight_ED, GATES["tf32"]), linear(hidden_TD, weight_ED))


@pytest.mark.parametrize("T", [1, 64, 2048, 8192])
@pytest.mark.parametrize("name", GATES)
def test_scratch_memory_is_what_is_written_down(name: str, T: int, cuda: torch.device) -> None:
    gate, (E, D) = GATES[name], (256, 7168)
    hidden_TD, weight_ED = random_operands(cuda, T, E, D)
    gate_logits(hidden_TD, weight_ED, gate)  # compiles
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits_TE = gate_logits(hidden_TD, weight_ED, gate)
    extra = torch.cuda.max_memory_allocated() - before - logits_TE.nbytes
    assert torch.cuda.memory_allocated() - before <= logits_TE.nbytes + 512  # the allocator's granularity
    if name == "fp32":
        assert extra <= SCRATCH_BYTES + 4 * E * D + 1024
        assert extra <= 4 * T * E * (D // 128) + 4 * E * D + 1024
    elif name == "fp64":
        assert extra <= SCRATCH_BYTES + 8 * E * D + 1024
    else:
        assert extra <= 512


def test_the_process_wide_precision_does_not_matter(precision: None, cuda: torch.device) -> None:
    hidden_TD, weight_ED = random_operands(cuda, 300, 128, 2048)
    for gate in (GateSpec(), GATES["tf32"]):
        found = []
        for name in ("highest", "high", "medium"):
            torch.set_float32_matmul_precision(name)
            found.append(gate_logits(hidden_TD, weight_ED, gate))
        assert_same(found[0], found[1])
        assert_same(found[0], found[2])


@pytest.mark.parametrize("T", [1, 64, 300, 4096])
@pytest.mark.parametrize("name", GATES)
def test_a_cuda_graph_replays_the_gate_on_new_content(name: str, T: int, cuda: torch.device) -> None:
    gate = GATES[name]
    hidden_TD, weight_ED = random_operands(cuda, T, 128, 2048)
    gate_logits(hidden_TD, weight_ED, gate)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits_TE = gate_logits(hidden_TD, weight_ED, gate)
    hidden_TD.copy_(hidden_TD.flip(0) * 1.5)
    weight_ED.mul_(-0.75)
    graph.replay()
    assert_same(logits_TE, gate_logits(hidden_TD, weight_ED, gate))


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33, 64, 128, 333, 1024, 4096])
def test_a_bf16_gate_is_pytorchs_linear_layer_with_its_bias(T: int, cuda: torch.device) -> None:
    """Where cuBLAS splits no sum."""
    hidden_TD, weight_ED = random_operands(cuda, T, 128, 2048)
    weight_ED = weight_ED.to(BF16)
    assert_same(gate_logits(hidden_TD, weight_ED, GATES["bf16"]), linear(hidden_TD, weight_ED))
    bias_E = torch.randn(128, device=cuda).to(BF16)
    gate = dataclasses.replace(GATES["bf16"], has_bias=True)
    assert_same(gate_logits(hidden_TD, weight_ED, gate, bias_E), linear(hidden_TD, weight_ED, bias_E))


@pytest.mark.parametrize("key", FROM_TOKENS, ids=" to ".join)
def test_what_is_claimed_of_pytorchs_products_is_so(key: tuple[str, str], cuda: torch.device) -> None:
    if f"{torch.cuda.get_device_name()}, torch {torch.__version__}" != MEASURED_ON:
        pytest.skip(f"the claims were measured on {MEASURED_ON}")
    operand, output = key
    gate = GateSpec(tf32=True) if operand == "tf32" else GateSpec.from_plain(
        {"operand_dtype": operand, "output_dtype": output,
         "accumulate_dtype": "float64" if operand == "float64" else "float32"}
    )  # fmt: skip
    for (E, D), least in FROM_TOKENS[key].items():
        _, weight_ED = random_operands(cuda, 1, E, D)
        weight_ED = weight_ED.to(BF16) if operand == "bfloat16" else weight_ED
        counts = [T for T in (1, 2, 7, 16, 33, 64, 128, 333, 1024, 2048, 4096, 8192) if least <= T]
        found = measure_gate(gate, weight_ED, [*counts, least], seed=1)
        assert found.is_invariant
        assert found.from_tokens == least, (E, D, found.differing)


@pytest.mark.parametrize("gate", [GateSpec(), GATES["bf16 to fp32"]], ids=["fp32", "bf16 to fp32"])
def test_a_learner_with_the_gate_installed_and_a_host_give_the_same_logits(gate: GateSpec, cuda: torch.device) -> None:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        hidden_size=256, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=128,
        vocab_size=64, num_experts=60, num_experts_per_tok=4, moe_intermediate_size=64, intermediate_size=64,
    )  # fmt: skip
    learner = transformers.Qwen3MoeForCausalLM(config).to(cuda, BF16).train()
    router = learner.model.layers[1].mlp.gate
    seen: list[tuple[Tensor, Tensor]] = []
    router.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].detach(), output[0])))
    with install_gate(learner, gate):
        learner(torch.randint(0, 64, (8, 256), device=cuda)).logits.float().sum().backward()
        hidden, logits_TE = seen[0]
        hosted_ED = router.weight.detach().float()  # as a host in RL mode holds it
        rows = hidden.reshape(-1, 256)
        for T in (1, 7, 64, 333, 2048):
            assert_same(gate_logits(rows[:T], hosted_ED, gate), logits_TE.detach()[:T], T)
            assert_same(router(rows[:T])[0].detach(), logits_TE.detach()[:T], T)
        order = torch.randperm(2048, device=cuda)
        assert_same(gate_logits(rows[order], hosted_ED, gate), logits_TE.detach()[order])
    assert router.weight.grad is not None
    assert router.weight.grad.isfinite().all()
    assert router.weight.grad.abs().sum() > 0


def test_the_gradient_on_a_gpu_is_a_linear_layers(cuda: torch.device) -> None:
    hidden_TD, weight_ED = random_operands(cuda, 300, 128, 2048, bf16_hidden=False)
    leaves = hidden_TD.requires_grad_(), weight_ED.requires_grad_()
    scale = torch.arange(300 * 128, device=cuda).view(300, 128).sin()
    found = torch.autograd.grad((gate_logits(*leaves, GateSpec()) * scale).sum(), leaves)
    expected = torch.autograd.grad((linear(*leaves) * scale).sum(), leaves)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
