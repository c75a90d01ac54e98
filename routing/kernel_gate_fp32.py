# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The gate in true fp32: IEEE products and sums in one fixed order, the same for one token and for 65,536.

The definition is routing.gate_reference: D in chunks of CHUNK consecutive elements, each chunk a chain of fused
multiply-adds from +0.0 in ascending d, chunk sums added from +0.0 in ascending order. The chunks depend on D alone, so
few tokens can have theirs computed side by side (LANES, CHUNKS) and many one after another (WHOLE), with one result.

T tokens, E experts, D hidden, C chunks.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from routing.gate_reference import CHUNK
from routing.gate_tiles import Tile, Walk, tokens_at_a_time
from routing.kernel_order import widened

LAUNCH_OPTIONS = {"enable_fp_fusion": True}
"""What makes tl.dot's multiply-adds fused ones."""
SUM_BLOCK = 256
TRANSPOSE_BLOCK = {"BLOCK_E": 32, "BLOCK_D": 64}


@triton.jit(do_not_specialize=["T"])
def _tile_kernel(
    hidden_ptr, weight_ptr, bias_ptr, out_ptr, T, E, stride_t, stride_e, stride_d,
    D: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr,
    IS_CHUNK: tl.constexpr, IS_TRANSPOSED: tl.constexpr, IS_WHOLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """IS_CHUNK: out is [C, T, E], one chunk a program. Else it is [T, E]. IS_TRANSPOSED: weight is [D, E]."""
    blocks_e = tl.cdiv(E, BLOCK_E)
    t = (tl.program_id(0) // blocks_e) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = (tl.program_id(0) % blocks_e) * BLOCK_E + tl.arange(0, BLOCK_E)
    is_token = (t < T)[:, None]
    chunk = tl.program_id(1)
    d = chunk * CHUNK + tl.arange(0, BLOCK_D)
    hidden_ptrs = hidden_ptr + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    if IS_TRANSPOSED:
        weight_ptrs = weight_ptr + d.to(tl.int64)[:, None] * stride_d + e[None, :]
        is_weight = (e < E)[None, :]
    else:
        weight_ptrs = weight_ptr + e.to(tl.int64)[:, None] * stride_e + d[None, :]
        is_weight = (e < E)[:, None]
    total = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for start in range(0, CHUNK if IS_CHUNK else D, BLOCK_D):
        if IS_WHOLE:
            hidden = tl.load(hidden_ptrs, mask=is_token, other=0.0)
            weight = tl.load(weight_ptrs, mask=is_weight, other=0.0)
        else:
            is_in = start + d < D
            hidden = tl.load(hidden_ptrs, mask=is_token & is_in[None, :], other=0.0)
            if IS_TRANSPOSED:
                weight = tl.load(weight_ptrs, mask=is_weight & is_in[:, None], other=0.0)
            else:
                weight = tl.load(weight_ptrs, mask=is_weight & is_in[None, :], other=0.0)
        weight = widened(weight)
        if not IS_TRANSPOSED:
            weight = tl.trans(weight)
        sums = tl.dot(widened(hidden), weight, sums, input_precision="ieee")
        if not IS_CHUNK:  # noqa: SIM102  (one is known at compile time)
            if (start + BLOCK_D) % CHUNK == 0:
                total += sums
                sums = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
        hidden_ptrs += BLOCK_D
        if IS_TRANSPOSED:
            weight_ptrs += BLOCK_D * stride_d
        else:
            weight_ptrs += BLOCK_D
    is_out = is_token & (e < E)[None, :]
    place = t.to(tl.int64)[:, None] * E + e[None, :]
    if IS_CHUNK:
        tl.store(out_ptr + chunk.to(tl.int64) * T * E + place, sums, mask=is_out)
    else:
        total += sums  # a last chunk cut short; otherwise +0.0, which changes nothing
        if HAS_BIAS:
            total += widened(tl.load(bias_ptr + e, mask=e < E, other=0.0))[None, :]
        tl.store(out_ptr + place, total, mask=is_out)


@triton.jit
def _transpose_kernel(weight_ptr, out_ptr, E, stride_e, D: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_D: tl.constexpr):
    """[E, D] -> [D, E] fp32; read along D and written along E, through shared memory."""
    e = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_in = (e < E)[:, None] & (d < D)[None, :]
    weight = widened(tl.load(weight_ptr + e.to(tl.int64)[:, None] * stride_e + d[None, :], mask=is_in, other=0.0))
    tl.store(out_ptr + d.to(tl.int64)[:, None] * E + e[None, :], tl.trans(weight), mask=tl.trans(is_in))


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(chunks_ptr, bias_ptr, out_ptr, N, E, HAS_BIAS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr):
    """[C, N] -> [N], N = T * E."""
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for _ in tl.static_range(CHUNKS):
        total += tl.load(chunks_ptr + n, mask=n < N, other=0.0)
        chunks_ptr += N
    if HAS_BIAS:
        total += widened(tl.load(bias_ptr + n % E, mask=n < N, other=0.0))
    tl.store(out_ptr + n, total, mask=n < N)


@triton.jit
def _halves(x, N: tl.constexpr):
    """[C, N] -> the first and the second N / 2 columns."""
    C: tl.constexpr = x.shape[0]
    first, second = tl.split(tl.permute(tl.reshape(x, [C, 2, N // 2]), [0, 2, 1]))
    return first, second


@triton.jit
def _chain_4(sums, hidden, weight):
    """sums [C], each the start of a chain over four columns; the lane that owns a row owns its columns."""
    C: tl.constexpr = hidden.shape[0]
    h02, h13 = tl.split(tl.reshape(hidden, [C, 2, 2]))
    w02, w13 = tl.split(tl.reshape(weight, [C, 2, 2]))
    h0, h2 = tl.split(h02)
    w0, w2 = tl.split(w02)
    h1, h3 = tl.split(h13)
    w1, w3 = tl.split(w13)
    return tl.fma(h3, w3, tl.fma(h2, w2, tl.fma(h1, w1, tl.fma(h0, w0, sums))))


@triton.jit
def _chain_8(sums, hidden, weight):
    first_h, second_h = _halves(hidden, 8)
    first_w, second_w = _halves(weight, 8)
    return _chain_4(_chain_4(sums, first_h, first_w), second_h, second_w)


@triton.jit
def _chain_16(sums, hidden, weight):
    first_h, second_h = _halves(hidden, 16)
    first_w, second_w = _halves(weight, 16)
    return _chain_8(_chain_8(sums, first_h, first_w), second_h, second_w)


@triton.jit
def _lanes_kernel(
    hidden_ptr, weight_ptr, bias_ptr, chunks_ptr, out_ptr, E, stride_t, stride_e,
    D: tl.constexpr, CHUNK: tl.constexpr, HAS_BIAS: tl.constexpr, IS_WHOLE: tl.constexpr,
    CHUNKS: tl.constexpr, LANES: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One logit: lane c walks chunk c. chunks: [T, E, C], where a program's lanes meet."""
    e = tl.program_id(0)
    t = tl.program_id(1)
    c = tl.arange(0, LANES)
    d = c[:, None] * CHUNK + tl.arange(0, BLOCK_D)[None, :]
    hidden_ptrs = hidden_ptr + t.to(tl.int64) * stride_t + d
    weight_ptrs = weight_ptr + e.to(tl.int64) * stride_e + d
    sums = tl.zeros([LANES], tl.float32)
    for start in tl.range(0, CHUNK, BLOCK_D, num_stages=STAGES):
        if IS_WHOLE:
            is_in = (c < CHUNKS)[:, None]
        else:
            is_in = d + start < D
        hidden = widened(tl.load(hidden_ptrs + start, mask=is_in, other=0.0))
        weight = widened(tl.load(weight_ptrs + start, mask=is_in, other=0.0))
        if BLOCK_D == 4:
            sums = _chain_4(sums, hidden, weight)
        elif BLOCK_D == 8:
            sums = _chain_8(sums, hidden, weight)
        else:
            sums = _chain_16(sums, hidden, weight)
    place = t.to(tl.int64) * E + e
    tl.store(chunks_ptr + place * CHUNKS + c, sums, mask=c < CHUNKS)
    tl.debug_barrier()  # what the lanes of this program wrote, all of its lanes read
    total = 0.0
    for chunk in tl.static_range(CHUNKS):
        total += tl.load(chunks_ptr + place * CHUNKS + chunk)
    if HAS_BIAS:
        total += widened(tl.load(bias_ptr + e))
    tl.store(out_ptr + place, total)


def fp32_product(hidden_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None, logits_TE: Tensor, tile: Tile) -> None:
    """Fills logits, fp32. Rows of hidden and weight at any stride, their elements side by side."""
    (T, D), E = hidden_TD.shape, weight_ED.shape[0]
    chunks = triton.cdiv(D, CHUNK)
    has_bias = bias_E is not None
    if tile.walk is Walk.LANES:
        lanes = max(32, triton.next_power_of_2(chunks))
        chunks_TEC = logits_TE.new_empty(T, E, chunks)
        _lanes_kernel[(E, T)](
            hidden_TD, weight_ED, bias_E, chunks_TEC, logits_TE, E, hidden_TD.stride(0), weight_ED.stride(0),
            D=D, CHUNK=CHUNK, HAS_BIAS=has_bias, IS_WHOLE=D % CHUNK == 0,
            CHUNKS=chunks, LANES=lanes, BLOCK_D=tile.depth, STAGES=tile.stages, num_warps=lanes // 32, **LAUNCH_OPTIONS,
        )  # fmt: skip
        return
    if tile.is_transposed:
        weight, stride_e, stride_d = _transposed(weight_ED), 1, E
    else:
        weight, stride_e, stride_d = weight_ED, weight_ED.stride(0), 1
    is_chunk = tile.walk is Walk.CHUNKS
    step = CHUNK if is_chunk else tile.depth
    rows_at_a_time = min(T, tokens_at_a_time(4 * E * chunks)) if is_chunk else T
    chunks_CTE = logits_TE.new_empty(chunks, rows_at_a_time, E) if is_chunk else None
    for start in range(0, T, rows_at_a_time):
        hidden, logits = (tensor[start : start + rows_at_a_time] for tensor in (hidden_TD, logits_TE))
        rows = hidden.shape[0]
        programs = triton.cdiv(rows, tile.tokens) * triton.cdiv(E, tile.experts)
        _tile_kernel[(programs, chunks if is_chunk else 1)](
            hidden, weight, bias_E, logits if chunks_CTE is None else chunks_CTE, rows, E,
            hidden.stride(0), stride_e, stride_d,
            D=D, CHUNK=CHUNK, HAS_BIAS=has_bias,
            IS_CHUNK=is_chunk, IS_TRANSPOSED=tile.is_transposed, IS_WHOLE=D % step == 0,
            BLOCK_T=tile.tokens, BLOCK_E=tile.experts, BLOCK_D=tile.depth,
            num_warps=tile.warps, num_stages=tile.stages, **LAUNCH_OPTIONS,
        )  # fmt: skip
        if chunks_CTE is not None:
            _sum_kernel[(triton.cdiv(rows * E, SUM_BLOCK),)](
                chunks_CTE, bias_E, logits, rows * E, E,
                HAS_BIAS=has_bias, CHUNKS=chunks, BLOCK=SUM_BLOCK, num_warps=SUM_BLOCK // 32,
            )  # fmt: skip


def _transposed(weight_ED: Tensor) -> Tensor:
    E, D = weight_ED.shape
    weight_DE = torch.empty(D, E, dtype=torch.float32, device=weight_ED.device)
    grid = triton.cdiv(E, TRANSPOSE_BLOCK["BLOCK_E"]), triton.cdiv(D, TRANSPOSE_BLOCK["BLOCK_D"])
    _transpose_kernel[grid](weight_ED, weight_DE, E, weight_ED.stride(0), D=D, **TRANSPOSE_BLOCK, num_warps=4)
    return weight_DE
