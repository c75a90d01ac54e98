# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The top-k kernel: logits (or scores) -> expert ids and combine weights, equal to the reference for platform "cuda".

One program routes BLOCK_T tokens; a token's result depends on nothing but its own row. Exact wherever the reference is
IEEE arithmetic; exponentials are libdevice's on a GPU, which equal eager PyTorch's, and NumPy's under Triton's
interpreter.

T tokens, E experts, K slots of a token; a suffix P is a width padded to a power of two.
"""

import contextlib
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from routing.assignment import Assignment, Chosen
from routing.cuda_order import next_power_of_2
from routing.kernel_order import (
    SORT_WIRES,
    exp,
    halves,
    halving_sum,
    in_kept_group,
    kth_largest,
    log1p,
    narrowed,
    picked,
    rank_key,
    rounded,
    row_max,
    softmax_slots,
    sort_slots,
    widened,
)
from routing.operands import check_operands
from routing.spec import RouterSpec
from routing.terms import ReduceKind, SlotOrder

INTERPRETED: bool = triton.knobs.runtime.interpret
TILE = 1024
"""Elements of a token-by-expert tile on a GPU."""
TRITON_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
"""No product is fused into a sum, and libdevice keeps denormals, as in eager PyTorch."""


@triton.jit
def _load_values(values_ptr, row, stride_t, stride_e, is_token, e, E: tl.constexpr, CHAIN: tl.constexpr):
    """A [BLOCK_T, len(e)] tile in the chain dtype, -inf past the last expert."""
    pointers = values_ptr + row.to(tl.int64)[:, None] * stride_t + e[None, :] * stride_e
    x = tl.load(pointers, mask=is_token[:, None] & (e < E)[None, :], other=float("-inf"))
    return rounded(widened(x), CHAIN)


@triton.jit
def _scores(
    x, values_ptr, row, stride_t, stride_e, is_token, E: tl.constexpr, E_P: tl.constexpr, BLOCK_T: tl.constexpr,
    SCORE: tl.constexpr, CHAIN: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    if SCORE == "softmax":
        LANES: tl.constexpr = 32 if E_P > 32 else E_P
        LOG_LANES: tl.constexpr = 5 if E_P > 32 else LANES.bit_length() - 1
        top = row_max(x)
        lane = tl.arange(0, LANES)
        sums = tl.zeros([BLOCK_T, LANES], tl.float32)
        for start in tl.static_range(0, E_P, LANES):
            strided = _load_values(values_ptr, row, stride_t, stride_e, is_token, start + lane, E, CHAIN)
            sums += exp(strided - top, LIBDEVICE)
        total = halving_sum(sums, BLOCK_T, LANES, LOG_LANES)
        x = rounded(tl.math.div_rn(exp(x - top, LIBDEVICE), tl.broadcast_to(total, [BLOCK_T, E_P])), CHAIN)
    elif SCORE == "sigmoid":
        x = rounded(tl.math.div_rn(tl.full([BLOCK_T, E_P], 1.0, tl.float32), 1.0 + exp(-x, LIBDEVICE)), CHAIN)
    elif SCORE == "sqrt_softplus":
        softplus = tl.where(x > 20.0, x, log1p(exp(x, LIBDEVICE), LIBDEVICE))
        x = rounded(tl.math.sqrt_rn(rounded(softplus, CHAIN)), CHAIN)
    return x


@triton.jit(do_not_specialize=["T"])
def _topk_kernel(
    values_ptr, bias_ptr, expert_scale_ptr, ids_ptr, weights_ptr, T, stride_t, stride_e, eps, scale,
    E: tl.constexpr, E_P: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr, LOG_K_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SCORE: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    COUNT: tl.constexpr, COUNT_P: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr, TOP_P: tl.constexpr,
    LOG_TOP_P: tl.constexpr, MASK_VALUE: tl.constexpr,
    SOFTMAX_CHOSEN: tl.constexpr, REDUCE: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_EXPERT_SCALE: tl.constexpr,
    CHAIN: tl.constexpr, CHOICE: tl.constexpr, OUT: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    is_token = row < T
    e = tl.arange(0, E_P)
    is_expert = (e < E)[None, :]

    x = _load_values(values_ptr, row, stride_t, stride_e, is_token, e, E, CHAIN)
    score = _scores(x, values_ptr, row, stride_t, stride_e, is_token, E, E_P, BLOCK_T, SCORE, CHAIN, LIBDEVICE)

    # choose: words rank as torch.topk ranks values, and among equals the lower expert is larger
    choice = score
    if HAS_BIAS:
        choice = score + tl.load(bias_ptr + e, mask=e < E, other=0.0)[None, :]
    falling = (E_P - 1 - e)[None, :]
    key = tl.where(is_expert, rank_key(choice), -0x80000000)
    if COUNT > 0:
        word = (key.to(tl.int64) << 32) | falling
        is_kept = in_kept_group(word, e, E, BLOCK_T, COUNT, COUNT_P, KEPT, TOP, TOP_P, LOG_TOP_P, CHOICE)
        masked = rank_key(tl.full([BLOCK_T, E_P], MASK_VALUE, tl.float32))
        key = tl.where(is_expert & (is_kept == 0), masked, key)
    word = (key.to(tl.int64) << 32) | falling
    kth = kth_largest(word, K)

    # lay out: those above the k-th key by ascending expert, then those equal to it, lowest expert first
    kth_key = (kth >> 32).to(tl.int32)
    place = tl.where(word >= kth, tl.where(key > kth_key, e[None, :], E_P + e[None, :]), 2 * E_P)
    score_bits = score.to(tl.int32, bitcast=True)
    wire = tl.arange(0, SORT_WIRES)[None, :]
    ids = tl.zeros([BLOCK_T, SORT_WIRES], tl.int32)
    bits = tl.zeros([BLOCK_T, SORT_WIRES], tl.int32)
    keys = tl.zeros([BLOCK_T, SORT_WIRES], tl.int32)
    for slot in tl.static_range(K):
        least = tl.min(place, axis=1)[:, None]
        is_it = place == least
        place = tl.where(is_it, 2 * E_P, place)
        ids = tl.where(wire == slot, least & (E_P - 1), ids)
        bits = tl.where(wire == slot, picked(is_it, score_bits), bits)
        keys = tl.where(wire == slot, picked(is_it, key), keys)
    if SORTED and K > 1:
        keys = tl.where(keys == -1, 0, keys)  # the sort, unlike the choice, takes -0.0 for +0.0
        slots = tl.where(wire < K, ((keys.to(tl.int64) + 0x80000000) << 16) | ids, -1)
        slots, bits = sort_slots(slots, bits, BLOCK_T)
        ids = (slots & 0xFFFF).to(tl.int32)
    for step in tl.static_range(5 - LOG_K_P):
        ids, _unused_ids = halves(ids, BLOCK_T, SORT_WIRES >> step)
        bits, _unused_bits = halves(bits, BLOCK_T, SORT_WIRES >> step)

    # weigh
    slot_index = tl.arange(0, K_P)[None, :]
    is_slot = slot_index < K
    w = tl.where(is_slot, bits.to(tl.float32, bitcast=True), 0.0)
    if SOFTMAX_CHOSEN:
        w = rounded(softmax_slots(w, is_slot, BLOCK_T, K_P, LOG_K_P, LIBDEVICE), CHAIN)
    if REDUCE == "softmax":
        w = rounded(softmax_slots(w, is_slot, BLOCK_T, K_P, LOG_K_P, LIBDEVICE), CHAIN)
    elif REDUCE != "none":
        if REDUCE == "l1":
            total = rounded(halving_sum(tl.abs(w), BLOCK_T, K_P, LOG_K_P), CHAIN)
        else:
            total = rounded(halving_sum(w, BLOCK_T, K_P, LOG_K_P), CHAIN)
        if REDUCE == "sum_eps":
            total = rounded(total + eps, CHAIN)
        if REDUCE == "clamped_sum":
            total = tl.where(total < eps, eps, total)
        w = rounded(tl.math.div_rn(w, tl.broadcast_to(total, [BLOCK_T, K_P])), CHAIN)
    if HAS_SCALE:
        w = rounded(w * scale, CHAIN)
    if HAS_EXPERT_SCALE:
        w = rounded(w * widened(tl.load(expert_scale_ptr + ids, mask=is_slot, other=0.0)), CHAIN)

    offsets = row.to(tl.int64)[:, None] * K + slot_index
    is_stored = is_token[:, None] & is_slot
    tl.store(ids_ptr + offsets, ids, mask=is_stored)
    tl.store(weights_ptr + offsets, narrowed(rounded(w, OUT), OUT), mask=is_stored)


def kernel_route(
    logits_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Assignment:
    """Routes logits in the gate's output dtype. ValueError for operands that do not fit, and for a CALLABLE reduce."""
    check_operands(logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    return _assigned(logits_TE, spec, str(spec.score), bias_E, expert_scale_E)


def kernel_route_from_scores(
    scores_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Assignment:
    """As `kernel_route`, from given scores (for SOFTMAX_TOPK: logits) in the chain dtype."""
    check_operands(scores_TE, spec, dtype=spec.chain_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    return _assigned(scores_TE, spec, "given", bias_E, expert_scale_E)


def kernel_chosen(
    logits_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Chosen:
    """The chosen experts and their raw scores, for a reduce function."""
    check_operands(logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    ids_TK, scores_TK = _launch(logits_TE, spec, score=str(spec.score), bias_E=bias_E, expert_scale_E=None, is_raw=True)
    return Chosen(expert_ids_TK=ids_TK, scores_TK=scores_TK)


def _assigned(
    values_TE: Tensor, spec: RouterSpec, score: str, bias_E: Tensor | None, expert_scale_E: Tensor | None
) -> Assignment:
    if spec.reduce.kind is ReduceKind.CALLABLE:
        raise ValueError(f"the reduce of this spec is the function {spec.reduce.path}: call routing.route")
    ids_TK, weights_TK = _launch(
        values_TE, spec, score=score, bias_E=bias_E, expert_scale_E=expert_scale_E, is_raw=False
    )
    return Assignment(expert_ids_TK=ids_TK, weights_TK=weights_TK)


def _launch(
    values_TE: Tensor,
    spec: RouterSpec,
    *,
    score: str,
    bias_E: Tensor | None,
    expert_scale_E: Tensor | None,
    is_raw: bool,
) -> tuple[Tensor, Tensor]:
    if spec.platform != "cuda":
        raise ValueError(f"the kernel gives the bits of platform 'cuda'; the spec asks for {spec.platform!r}")
    if values_TE.device.type != "cuda" and not INTERPRETED:
        raise ValueError(
            f"the kernel runs on CUDA tensors, or anywhere with TRITON_INTERPRET=1; got {values_TE.device}"
        )
    T = values_TE.shape[0]
    out_dtype = spec.chain_dtype if is_raw else spec.weight_dtype
    ids_TK = torch.empty(T, spec.top_k, dtype=torch.int32, device=values_TE.device)
    weights_TK = torch.empty(T, spec.top_k, dtype=out_dtype, device=values_TE.device)
    if T == 0:
        return ids_TK, weights_TK
    meta = kernel_constants(spec, score=score, is_raw=is_raw)
    block_t = _block_t(T, meta["E_P"])
    eps = _eps(spec)
    scale = 1.0 if spec.scale is None else spec.scale
    vectors = [None if vector is None else vector.contiguous() for vector in (bias_E, expert_scale_E)]
    # NumPy under the interpreter warns of the infinities and NaNs that eager PyTorch passes on in silence
    quiet = numpy.errstate(all="ignore") if INTERPRETED else contextlib.nullcontext()
    with quiet, _device_of(values_TE):
        _topk_kernel[(triton.cdiv(T, block_t),)](
            values_TE, *vectors, ids_TK, weights_TK, T, values_TE.stride(0), values_TE.stride(1), eps, scale,
            BLOCK_T=block_t, **meta, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return ids_TK, weights_TK


def kernel_constants(spec: RouterSpec, *, score: str, is_raw: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel for a spec, all but BLOCK_T. `score`: the spec's, or "given"."""
    groups = spec.groups
    top = 1 if groups is None else groups.top
    widths = {"E": spec.num_experts, "K": spec.top_k, "COUNT": 1 if groups is None else groups.count, "TOP": top}
    padded = {name: next_power_of_2(width) for name, width in widths.items()}
    return {
        "E": spec.num_experts,
        "E_P": padded["E"],
        "K": spec.top_k,
        "K_P": padded["K"],
        "LOG_K_P": padded["K"].bit_length() - 1,
        "SCORE": score,
        "SORTED": spec.slot_order is SlotOrder.SORTED,
        "HAS_BIAS": spec.has_bias,
        "COUNT": 0 if groups is None else groups.count,
        "COUNT_P": padded["COUNT"],
        "KEPT": 1 if groups is None else groups.kept,
        "TOP": top,
        "TOP_P": padded["TOP"],
        "LOG_TOP_P": padded["TOP"].bit_length() - 1,
        "MASK_VALUE": 0.0 if groups is None else groups.mask_value,
        "SOFTMAX_CHOSEN": str(spec.score) == "softmax_topk",
        "REDUCE": "none" if is_raw else str(spec.reduce.kind),
        "HAS_SCALE": not is_raw and spec.scale is not None,
        "HAS_EXPERT_SCALE": not is_raw and spec.expert_scale,
        "CHAIN": TRITON_DTYPES[spec.chain_dtype],
        "CHOICE": TRITON_DTYPES[spec.choice_dtype],
        "OUT": TRITON_DTYPES[spec.chain_dtype if is_raw else spec.weight_dtype],
        "LIBDEVICE": not INTERPRETED,
    }


def _eps(spec: RouterSpec) -> float:
    """PyTorch adds a Python number in fp32 whatever the tensor's dtype, but clamps with it rounded to that dtype."""
    eps = 0.0 if spec.reduce.eps is None else spec.reduce.eps
    return torch.tensor(eps, dtype=spec.chain_dtype).item() if spec.reduce.kind is ReduceKind.CLAMPED_SUM else eps


def _block_t(T: int, E_P: int) -> int:
    """One width for every T on a GPU, so that a spec compiles once; under the interpreter the fewest programs."""
    return min(next_power_of_2(T), 64) if INTERPRETED else max(1, min(16, TILE // E_P))


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
