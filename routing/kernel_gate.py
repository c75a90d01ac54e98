# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The gate's product on a GPU, hidden @ weight.T: a row's bits depend on its own operands alone, whatever the batch.

On tensor cores (bf16, fp16, TF32, fp64) one accumulator walks D in order, and the tile changes nothing: the order of
the additions is the hardware's within an instruction and D's between instructions. Nothing is split along D, and no
atomic touches a result. TF32: tensor cores would cut an fp32 operand to its first 19 bits; cuBLAS has it rounded to the
nearest such number before, and so does this kernel. fp32 itself is in routing.kernel_gate_fp32.

A bias is rounded to the operands' dtype, added to the finished sum in the accumulator's, and the result rounded once,
as cuBLAS does in the epilogue of torch.nn.functional.linear.

T tokens, E experts, D hidden.
"""

import contextlib
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing.gate_tiles import Arithmetic, Tile, tile_for, tokens_at_a_time
from routing.kernel_gate_fp32 import fp32_product
from routing.kernel_order import narrowed, rounded, widened
from routing.terms import GateSpec

INTERPRETED: bool = triton.knobs.runtime.interpret
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}


@triton.jit
def _tf32(x):
    """The nearest number of 10 fraction bits, ties to even, held as fp32. One of 16 bits has no more to begin with."""
    result = widened(x)
    if x.dtype.primitive_bitwidth > 16:
        bits = result.to(tl.int32, bitcast=True)
        nearest = (bits + 0xFFF + ((bits >> 13) & 1)) & -8192
        result = tl.where(result != result, 0x7FC00000, nearest).to(tl.float32, bitcast=True)
    return result


@triton.jit
def _operand(x, OPERAND: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rounded to OPERAND. The interpreter holds it as fp32: NumPy has no bf16, and products are exact either way."""
    if OPERAND == tl.float64:  # noqa: SIM300  (a parameter, not a constant)
        result = x
    elif PRECISION == "tf32":
        result = _tf32(x)
    elif INTERPRETED:
        result = rounded(widened(x), OPERAND)
    else:
        result = x.to(OPERAND)
    return result


@triton.jit(do_not_specialize=["T"])
def _gate_kernel(
    hidden_ptr, weight_ptr, bias_ptr, logits_ptr, T, E, stride_t, stride_e,
    D: tl.constexpr, HAS_BIAS: tl.constexpr, OPERAND: tl.constexpr, ACCUMULATE: tl.constexpr, OUT: tl.constexpr,
    PRECISION: tl.constexpr, IS_WHOLE: tl.constexpr, INTERPRETED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks_e = tl.cdiv(E, BLOCK_E)
    t = (tl.program_id(0) // blocks_e) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = (tl.program_id(0) % blocks_e) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.arange(0, BLOCK_D)
    is_token = (t < T)[:, None]
    is_expert = (e < E)[:, None]
    hidden_ptrs = hidden_ptr + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    weight_ptrs = weight_ptr + e.to(tl.int64)[:, None] * stride_e + d[None, :]
    sums = tl.zeros([BLOCK_T, BLOCK_E], ACCUMULATE)
    for start in range(0, D, BLOCK_D):
        if IS_WHOLE:
            hidden = tl.load(hidden_ptrs, mask=is_token, other=0.0)
            weight = tl.load(weight_ptrs, mask=is_expert, other=0.0)
        else:
            is_in = (start + d < D)[None, :]
            hidden = tl.load(hidden_ptrs, mask=is_token & is_in, other=0.0)
            weight = tl.load(weight_ptrs, mask=is_expert & is_in, other=0.0)
        hidden = _operand(hidden, OPERAND, PRECISION, INTERPRETED)
        weight = _operand(weight, OPERAND, PRECISION, INTERPRETED)
        sums = tl.dot(hidden, tl.trans(weight), sums, input_precision=PRECISION, out_dtype=ACCUMULATE)
        hidden_ptrs += BLOCK_D
        weight_ptrs += BLOCK_D
    if HAS_BIAS:
        bias = _operand(tl.load(bias_ptr + e, mask=e < E, other=0.0), OPERAND, "ieee", INTERPRETED)
        sums += bias.to(ACCUMULATE)[None, :]
    logits = narrowed(rounded(sums, OUT), OUT)
    tl.store(logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], logits, mask=is_token & (e < E)[None, :])


def kernel_gate(
    hidden_TD: Tensor, weight_ED: Tensor, gate: GateSpec, bias_E: Tensor | None = None, *, tile: Tile | None = None
) -> Tensor:
    """[T, E] in gate.output_dtype, from operands of any floating dtype, hidden rows at any stride.

    No host synchronisation, nothing cached. tile: None takes the fastest known; any other gives the same bits, or is
    refused with a ValueError.

    Memory besides the logits, freed on return: bf16, fp16 and TF32 none. fp32 T * E * ceil(D / 128) fp32 numbers in the
    walks by lanes and chunks (up to 2,048 tokens), none that grows with T in the whole walk, and E * D fp32 where the
    tile has the weight transposed. fp64 T * D and E * D fp64. What grows with T stays within SCRATCH_BYTES, 128 MiB:
    more tokens take more launches. An operand whose rows are not contiguous is copied first.
    """
    if hidden_TD.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the kernel runs on CUDA tensors, or anywhere with TRITON_INTERPRET=1; got {hidden_TD.device}"
        )
    arithmetic = Arithmetic.of(gate)
    T, E = hidden_TD.shape[0], weight_ED.shape[0]
    if tile is None:
        tile = tile_for(arithmetic, T)
    else:
        tile.check(arithmetic)
    logits_TE = torch.empty(T, E, dtype=gate.output_dtype, device=hidden_TD.device)
    if T == 0 or E == 0:
        return logits_TE
    hidden_TD, weight_ED = _unit_stride(hidden_TD), _unit_stride(weight_ED)
    bias_E = None if bias_E is None else bias_E.contiguous()
    with _device_of(hidden_TD):
        if arithmetic is Arithmetic.FP32:
            fp32_product(hidden_TD, weight_ED, bias_E, logits_TE, tile)
        elif arithmetic is Arithmetic.FP64:
            weight_ED = weight_ED.to(torch.float64)
            bias_E = None if bias_E is None else bias_E.to(torch.float64)
            step = tokens_at_a_time(8 * hidden_TD.shape[1])
            for start in range(0, T, step):
                rows = slice(start, start + step)
                _launch(hidden_TD[rows].to(torch.float64), weight_ED, bias_E, logits_TE[rows], gate, tile)
        else:
            _launch(hidden_TD, weight_ED, bias_E, logits_TE, gate, tile)
    return logits_TE


def _launch(
    hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, logits_TE: Tensor, gate: GateSpec, tile: Tile
) -> None:
    (T, D), E = hidden_TD.shape, weight_ED.shape[0]
    programs = triton.cdiv(T, tile.tokens) * triton.cdiv(E, tile.experts)
    _gate_kernel[(programs,)](
        hidden_TD, weight_ED, bias_E, logits_TE, T, E, hidden_TD.stride(0), weight_ED.stride(0),
        **gate_constants(gate, tile, D), HAS_BIAS=bias_E is not None,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def gate_constants(gate: GateSpec, tile: Tile, D: int) -> dict[str, Any]:
    """The compile-time arguments of the tensor cores' kernel, all but HAS_BIAS."""
    return {
        "D": D,
        "OPERAND": TRITON_DTYPES[gate.operand_dtype],
        "ACCUMULATE": TRITON_DTYPES[gate.accumulate_dtype],
        "OUT": TRITON_DTYPES[gate.output_dtype],
        "PRECISION": "tf32" if gate.tf32 else "ieee",
        "IS_WHOLE": D % tile.depth == 0,
        "INTERPRETED": INTERPRETED,
        "BLOCK_T": tile.tokens,
        "BLOCK_E": tile.experts,
        "BLOCK_D": tile.depth,
    }


def _unit_stride(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
