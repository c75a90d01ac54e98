# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The top-k kernel: logits (or scores) -> expert ids and combine weights, equal to the reference for platform "cuda".

A program routes BLOCK_T tokens; a token's result depends on nothing but its own row. Rows are chosen by bounds first
(routing.kernel_bound); those that the bounds leave in doubt, and specs that bounds do not cover, are routed by the
definition (routing.kernel_exact), in the same launch. Exact wherever the reference is IEEE arithmetic; exponentials are
libdevice's on a GPU, which equal eager PyTorch's, and NumPy's under Triton's interpreter.

T tokens, E experts, K slots of a token; a suffix P is a width padded to a power of two.
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

from routing.assignment import Assignment, Chosen
from routing.cuda_order import next_power_of_2
from routing.kernel_bound import bounded_rows
from routing.kernel_exact import exact_rows
from routing.kernel_order import narrowed, rounded, weighed
from routing.operands import check_operands
from routing.spec import RouterSpec
from routing.terms import GroupSpec, ReduceKind, SlotOrder, SumOrder

INTERPRETED: bool = triton.knobs.runtime.interpret
WARP = 32
FEW_TOKENS = 2048
"""Up to which a warp each fits on the card at once."""
TRITON_DTYPES = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float64: tl.float64,
}
LAUNCH_OPTIONS = {"enable_fp_fusion": False, "enable_reflect_ftz": False}
"""No product is fused into a sum, and libdevice keeps denormals, as in eager PyTorch."""


@triton.jit(do_not_specialize=["T"])
def _topk_kernel(
    values_ptr, bias_ptr, expert_scale_ptr, num_tokens_ptr, counts_ptr, ids_ptr, weights_ptr, T, stride_t, stride_e,
    stride_c, E: tl.constexpr, E_P: tl.constexpr, K: tl.constexpr, K_P: tl.constexpr, LOG_K_P: tl.constexpr,
    BLOCK_T: tl.constexpr, EXACT_T: tl.constexpr, C: tl.constexpr, LOG_C: tl.constexpr, J: tl.constexpr,
    DEPTH: tl.constexpr, BOUNDED: tl.constexpr, ORDERED: tl.constexpr, HAS_SPARE: tl.constexpr,
    SCORE: tl.constexpr, SORTED: tl.constexpr, HAS_BIAS: tl.constexpr,
    COUNT: tl.constexpr, COUNT_P: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr, TOP_P: tl.constexpr,
    LOG_TOP_P: tl.constexpr, MASK_VALUE: tl.constexpr, MASKS_SCORES: tl.constexpr,
    SOFTMAX_CHOSEN: tl.constexpr, REDUCE: tl.constexpr, EPS: tl.constexpr, HAS_SCALE: tl.constexpr,
    SCALE: tl.constexpr, HAS_EXPERT_SCALE: tl.constexpr, ADJACENT: tl.constexpr,
    CHAIN: tl.constexpr, SCORE_DTYPE: tl.constexpr, CHOICE: tl.constexpr, OUT: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    first = tl.program_id(0) * BLOCK_T
    count = T
    if num_tokens_ptr is not None:
        count = tl.minimum(tl.load(num_tokens_ptr), T)
    tile = tl.arange(0, BLOCK_T)
    is_token = first + tile < count
    if num_tokens_ptr is not None:  # padding, which goes nowhere
        slot = tl.arange(0, K_P)[None, :]
        offsets = (first + tile).to(tl.int64)[:, None] * K + slot
        is_padding = ((first + tile >= count) & (first + tile < T))[:, None] & (slot < K)
        tl.store(ids_ptr + offsets, -1, mask=is_padding)
        tl.store(weights_ptr + offsets, narrowed(tl.zeros([BLOCK_T, K_P], tl.float32), OUT), mask=is_padding)
        if first >= count:
            return
    is_done = is_token == 0
    if BOUNDED:
        ids, score, is_done = bounded_rows(
            values_ptr, bias_ptr, first + tile, stride_t, stride_e, is_token, E, BLOCK_T, C, LOG_C, J, DEPTH, E_P - 1,
            K, K_P, SCORE, SORTED, HAS_BIAS, COUNT, COUNT_P, KEPT, TOP, MASK_VALUE, ORDERED, HAS_SPARE, LIBDEVICE,
        )  # fmt: skip
        _store(
            ids, score, first + tile, is_done, expert_scale_ptr, counts_ptr, stride_c, ids_ptr, weights_ptr, BLOCK_T, K,
            K_P, LOG_K_P, SOFTMAX_CHOSEN, REDUCE, EPS, HAS_SCALE, SCALE, HAS_EXPERT_SCALE, ADJACENT, CHAIN, OUT,
            LIBDEVICE,
        )  # fmt: skip
        is_done = is_done | (is_token == 0)
    if tl.min(is_done.to(tl.int32), axis=0) == 0:
        for start in range(0, BLOCK_T, EXACT_T):
            if EXACT_T == BLOCK_T:
                is_due = is_done == 0
            else:
                is_due = tl.full([1], tl.max(((tile == start) & (is_done == 0)).to(tl.int32), axis=0), tl.int32) > 0
            if tl.max(is_due.to(tl.int32), axis=0) > 0:
                row = first + start + tl.arange(0, EXACT_T)
                exact_ids, exact_score = exact_rows(
                    values_ptr, bias_ptr, row, stride_t, stride_e, is_due, E, E_P, EXACT_T, K, K_P, SCORE, SORTED,
                    HAS_BIAS, COUNT, COUNT_P, KEPT, TOP, TOP_P, LOG_TOP_P, MASK_VALUE, MASKS_SCORES, ADJACENT, CHAIN,
                    SCORE_DTYPE, CHOICE, LIBDEVICE,
                )  # fmt: skip
                _store(
                    exact_ids, exact_score, row, is_due, expert_scale_ptr, counts_ptr, stride_c, ids_ptr, weights_ptr,
                    EXACT_T, K, K_P, LOG_K_P, SOFTMAX_CHOSEN, REDUCE, EPS, HAS_SCALE, SCALE, HAS_EXPERT_SCALE,
                    ADJACENT, CHAIN, OUT, LIBDEVICE,
                )  # fmt: skip


@triton.jit
def _store(
    ids, score, row, is_stored, expert_scale_ptr, counts_ptr, stride_c, ids_ptr, weights_ptr, B: tl.constexpr,
    K: tl.constexpr, K_P: tl.constexpr, LOG_K_P: tl.constexpr, SOFTMAX_CHOSEN: tl.constexpr, REDUCE: tl.constexpr,
    EPS: tl.constexpr, HAS_SCALE: tl.constexpr, SCALE: tl.constexpr, HAS_EXPERT_SCALE: tl.constexpr,
    ADJACENT: tl.constexpr, CHAIN: tl.constexpr, OUT: tl.constexpr, LIBDEVICE: tl.constexpr,
):  # fmt: skip
    """Weighs the chosen scores of B rows, and stores and counts those that are to be stored."""
    slot = tl.arange(0, K_P)[None, :]
    is_slot = slot < K
    w = weighed(
        score, ids, is_slot, expert_scale_ptr, B, K, K_P, LOG_K_P, SOFTMAX_CHOSEN, REDUCE, EPS, HAS_SCALE, SCALE,
        HAS_EXPERT_SCALE, ADJACENT, CHAIN, LIBDEVICE,
    )  # fmt: skip
    offsets = row.to(tl.int64)[:, None] * K + slot
    mask = is_stored[:, None] & is_slot
    tl.store(ids_ptr + offsets, ids, mask=mask)
    tl.store(weights_ptr + offsets, narrowed(rounded(w, OUT), OUT), mask=mask)
    if counts_ptr is not None:
        tl.atomic_add(counts_ptr + ids * stride_c, 1, mask=mask, sem="relaxed")


def kernel_route(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    num_tokens: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> Assignment:
    """Routes logits in the gate's output dtype. ValueError for operands that do not fit, and for a CALLABLE reduce.

    num_tokens: an int32 scalar tensor on the device; rows from there on are padding, with ids -1 and weights 0.
    counts_E: int32 [E] of any stride, to which the tokens of each expert are added; the caller zeroes it. See
    routing.expert_counts.
    """
    check_operands(
        logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E,
        num_tokens=num_tokens, counts_E=counts_E,
    )  # fmt: skip
    _check_reduce(spec)
    given = _Operands(bias_E=bias_E, expert_scale_E=expert_scale_E, num_tokens=num_tokens, counts_E=counts_E)
    ids_TK, weights_TK = _launch(logits_TE, spec, given, score=str(spec.score), is_raw=False)
    return Assignment(expert_ids_TK=ids_TK, weights_TK=weights_TK)


def kernel_route_from_scores(
    scores_TE: Tensor, spec: RouterSpec, *, bias_E: Tensor | None = None, expert_scale_E: Tensor | None = None
) -> Assignment:
    """As `kernel_route`, from given scores (for SOFTMAX_TOPK: logits) in the chain dtype."""
    check_operands(scores_TE, spec, dtype=spec.chain_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E)
    _check_reduce(spec)
    given = _Operands(bias_E=bias_E, expert_scale_E=expert_scale_E)
    ids_TK, weights_TK = _launch(scores_TE, spec, given, score="given", is_raw=False)
    return Assignment(expert_ids_TK=ids_TK, weights_TK=weights_TK)


def kernel_chosen(
    logits_TE: Tensor,
    spec: RouterSpec,
    *,
    bias_E: Tensor | None = None,
    expert_scale_E: Tensor | None = None,
    num_tokens: Tensor | None = None,
    counts_E: Tensor | None = None,
) -> Chosen:
    """The chosen experts and their raw scores, for a reduce function. Padding as in `kernel_route`, with scores 0."""
    check_operands(
        logits_TE, spec, dtype=spec.gate.output_dtype, bias_E=bias_E, expert_scale_E=expert_scale_E,
        num_tokens=num_tokens, counts_E=counts_E,
    )  # fmt: skip
    given = _Operands(bias_E=bias_E, num_tokens=num_tokens, counts_E=counts_E)
    ids_TK, scores_TK = _launch(logits_TE, spec, given, score=str(spec.score), is_raw=True)
    return Chosen(expert_ids_TK=ids_TK, scores_TK=scores_TK)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Operands:
    """What a launch takes besides the values, all of it optional."""

    bias_E: Tensor | None = None
    expert_scale_E: Tensor | None = None
    num_tokens: Tensor | None = None
    counts_E: Tensor | None = None


def _check_reduce(spec: RouterSpec) -> None:
    if spec.reduce.kind is ReduceKind.CALLABLE:
        raise ValueError(f"the reduce of this spec is the function {spec.reduce.path}: call routing.route")


def _launch(
    values_TE: Tensor, spec: RouterSpec, given: _Operands, *, score: str, is_raw: bool
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
    constants = kernel_constants(spec, score=score, is_raw=is_raw)
    shape = launch_shape(T, spec, dtype=values_TE.dtype)
    bias_E = None if given.bias_E is None else given.bias_E.contiguous()
    expert_scale_E = None if given.expert_scale_E is None else given.expert_scale_E.contiguous()
    stride_c = 0 if given.counts_E is None else given.counts_E.stride(0)
    with quietly() if INTERPRETED else _device_of(values_TE):
        _topk_kernel[(triton.cdiv(T, shape["BLOCK_T"]),)](
            values_TE, bias_E, expert_scale_E, given.num_tokens, given.counts_E, ids_TK, weights_TK, T,
            values_TE.stride(0), values_TE.stride(1), stride_c, **constants, **shape, **LAUNCH_OPTIONS,
        )  # fmt: skip
    return ids_TK, weights_TK


def kernel_constants(spec: RouterSpec, *, score: str, is_raw: bool) -> dict[str, Any]:
    """The compile-time arguments of the kernel for a spec, all but the shape. `score`: the spec's, or "given"."""
    groups = spec.groups
    top = 1 if groups is None else groups.top
    widths = {"E": spec.num_experts, "K": spec.top_k, "COUNT": 1 if groups is None else groups.count, "TOP": top}
    padded = {name: next_power_of_2(width) for name, width in widths.items()}
    columns = min(padded["E"], WARP)
    return {
        "E": spec.num_experts,
        "E_P": padded["E"],
        "K": spec.top_k,
        "K_P": padded["K"],
        "LOG_K_P": padded["K"].bit_length() - 1,
        "C": columns,
        "LOG_C": columns.bit_length() - 1,
        "J": triton.cdiv(spec.num_experts, columns),
        "BOUNDED": is_bounded(spec),
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
        "MASKS_SCORES": groups is not None and groups.masks_scores,
        "SOFTMAX_CHOSEN": str(spec.score) == "softmax_topk",
        "REDUCE": "none" if is_raw else str(spec.reduce.kind),
        "EPS": _eps(spec),
        "HAS_SCALE": not is_raw and spec.scale is not None,
        "SCALE": 1.0 if spec.scale is None else spec.scale,
        "HAS_EXPERT_SCALE": not is_raw and spec.expert_scale,
        "ADJACENT": spec.sum_order is SumOrder.ADJACENT,
        "CHAIN": TRITON_DTYPES[spec.chain_dtype],
        "SCORE_DTYPE": tl.float32 if spec.chain_dtype == torch.float64 else TRITON_DTYPES[spec.chain_dtype],
        "CHOICE": TRITON_DTYPES[spec.choice_dtype],
        "OUT": TRITON_DTYPES[spec.chain_dtype if is_raw else spec.weight_dtype],
        "LIBDEVICE": not INTERPRETED,
    }


def is_bounded(spec: RouterSpec) -> bool:
    """Whether bounds route the rows of this spec. The others are routed by the definition, every one of them."""
    groups = spec.groups
    return (
        spec.chain_dtype == torch.float32
        and 8 <= spec.num_experts <= 1024
        and spec.top_k < spec.num_experts
        and (groups is None or _is_in_whole_tiles(groups, spec.num_experts))
    )


def _is_in_whole_tiles(groups: GroupSpec, num_experts: int) -> bool:
    is_whole = num_experts // groups.count % WARP == 0
    return is_whole and groups.top <= 2 and groups.kept < groups.count and not groups.masks_scores


def launch_shape(T: int, spec: RouterSpec, *, dtype: torch.dtype) -> dict[str, Any]:
    """How many tokens a program takes, and how hard it tries to leave none in doubt.

    Few tokens get a warp each, where a maximum of integers is one instruction. Many share a warp, eight lanes to a
    token. `dtype` is that of logits, or of given scores.
    """
    is_few = T <= FEW_TOKENS
    block_t = min(next_power_of_2(T), 64) if INTERPRETED else 1 if is_few or not is_bounded(spec) else 4
    fills_with_zeros = spec.groups is not None and spec.groups.mask_value == 0.0  # a spare may be masked
    return {
        "BLOCK_T": block_t,
        "EXACT_T": block_t if INTERPRETED else 1,
        "DEPTH": 6 if is_few or spec.top_k > 10 else 4,  # how many of the best in one column are too rare to wait for
        "ORDERED": block_t == 1,
        "HAS_SPARE": (is_few or dtype.itemsize < 4) and not fills_with_zeros,
        "num_warps": 1,
    }


def _eps(spec: RouterSpec) -> float:
    """PyTorch adds a Python number in fp32 whatever the tensor's dtype, but clamps with it rounded to that dtype."""
    eps = 0.0 if spec.reduce.eps is None else spec.reduce.eps
    return torch.tensor(eps, dtype=spec.chain_dtype).item() if spec.reduce.kind is ReduceKind.CLAMPED_SUM else eps


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """NumPy, under the interpreter, warns of the infinities and NaNs that eager PyTorch passes on in silence."""
    with numpy.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        yield


def _device_of(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
