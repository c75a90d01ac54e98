"""A callable reduce function held against every form that the kernel has: where one gives the same bits, it may run.

A function is a black box, so the proof is by rows: raw scores of every magnitude, with sums on both sides of every
epsilon, in the chain's dtype and on the device that serves. One bit that differs and the function runs as it is.

T tokens, K slots of a token.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from routing.bits import rows_differ
from routing.oracle import reduced
from routing.orders import SUMS, rounded_sum
from routing.probes import score_rows
from routing.reduce_function import ReduceFunction, normalise
from routing.spec import RouterSpec
from routing.terms import ReduceKind, TopkReduce

ROWS = {"cuda": 1 << 20, "cpu": 1 << 13}
"""Rows of raw scores that a form has to agree upon."""
PURITY_ROWS = 2048
PURITY_SLICES = (0, 1, 2, 5, 17, 333)
EPS = (1e-20, 1e-12, 1e-9, 1e-8, 1e-6, 1e-5, 1e-7, 1e-10, 1e-15, 1e-16, 1e-18, 1e-30)
"""What trainers add to a sum, or clamp it to."""
SMALLEST = (
    *(torch.finfo(dtype).eps for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)),
    torch.finfo(torch.float32).tiny,
)
"""What torch.finfo says, which trainers clamp to as well."""


@dataclass(frozen=True, kw_only=True)
class Fusion:
    """What was found about a reduce function."""

    name: str
    spec: RouterSpec
    """With the form in place of the function, where there is one; else as it was."""
    form: TopkReduce | None
    """The first of `equals`."""
    equals: tuple[TopkReduce, ...]
    """Every form with the function's bits on all rows."""
    rows: int
    why: str


def certify_reduce(spec: RouterSpec, function: ReduceFunction, device: torch.device) -> Fusion:
    """Which fused form gives the function's bits, if any.

    Args:
        spec: whose K and chain dtype matter; its own reduce does not.
        function: see routing.reduce_function.
        device: that serves.

    Raises:
        ValueError: the function breaks its contract, or its rows depend on one another.
    """
    random = torch.Generator(device=device).manual_seed(0)
    tried = score_rows(spec.top_k, spec.chain_dtype, PURITY_ROWS, EPS, random)
    finite = tried[tried.isfinite().all(dim=1)]  # a NaN anywhere would hide what a function takes from all rows
    follows_batch = _check_purity(tried, function, random) | _check_purity(finite, function, random)
    eps = tuple(dict.fromkeys((*EPS, *SMALLEST, *_own_eps(spec, function, device))))
    scores_TK = score_rows(spec.top_k, spec.chain_dtype, ROWS[device.type], eps, random)
    rows = len(scores_TK)
    found = partial(Fusion, name=name_of(function), spec=spec, form=None, equals=(), rows=rows)
    if follows_batch:
        return found(why="its bits follow the number of rows")
    weights_TK = normalise(scores_TK, function)
    if weights_TK.dtype != spec.chain_dtype:
        why = f"it widens the chain to {weights_TK.dtype}, which no fused form does"
        return found(why=why)
    forms = _forms(spec, eps)
    differing = torch.stack([rows_differ(reduced(scores_TK, form), weights_TK).sum() for form in forms]).tolist()
    equals = tuple(form for form, count in zip(forms, differing, strict=True) if count == 0)
    if equals:
        why = f"all {rows:,} rows of raw scores agree in every bit"
        return replace(found(why=why), spec=replace(spec, reduce=equals[0]), form=equals[0], equals=equals)
    nearest, least = min(zip(forms, differing, strict=True), key=lambda pair: pair[1])
    why = (
        f"the nearest form, {said(nearest)}, differs on {least:,} of {rows:,} rows{_other_order(scores_TK, weights_TK)}"
    )
    return found(why=why)


def said(reduce: TopkReduce) -> str:
    """A reduce as one reads it: `sum_eps 1e-20`."""
    if reduce.kind is ReduceKind.CALLABLE:
        return str(reduce.path)
    return str(reduce.kind) if reduce.eps is None else f"{reduce.kind} {reduce.eps:g}"


def name_of(function: ReduceFunction) -> str:
    """As a person knows it: `module:function`."""
    return f"{function.__module__}:{getattr(function, '__qualname__', type(function).__name__)}"


def _forms(spec: RouterSpec, eps: tuple[float, ...]) -> list[TopkReduce]:
    """All that the kernel has, the plainest first."""
    kinds = [ReduceKind.NONE, ReduceKind.SUM]
    forms = [TopkReduce(kind=kind) for kind in kinds]
    for kind in (ReduceKind.SUM_EPS, ReduceKind.CLAMPED_SUM):
        forms += [TopkReduce(kind=kind, eps=number) for number in eps]
    if spec.chain_dtype != torch.float64:
        forms.append(TopkReduce(kind=ReduceKind.SOFTMAX))
    return [*forms, TopkReduce(kind=ReduceKind.L1)]


def _own_eps(spec: RouterSpec, function: ReduceFunction, device: torch.device) -> tuple[float, ...]:
    """What the function divides zeros by, or very small scores: an epsilon that is in no list."""
    tiny = torch.finfo(spec.chain_dtype).tiny
    zeros = torch.zeros(1, spec.top_k, dtype=spec.chain_dtype, device=device)
    found = [function(zeros).flatten()[0].item()]
    weight = normalise(zeros + tiny, function).flatten()[0].item()
    if weight > 0:
        found.append(tiny / weight)
    return tuple(number for number in found if 0 < number < 1)


def _check_purity(scores_TK: Tensor, function: ReduceFunction, random: torch.Generator) -> bool:
    """Whether rounding, and no more, follows the number of rows or their place. ValueError where it is more."""
    name = name_of(function)
    normalise(scores_TK[:1], function)  # what is wrong with it is said shortest of one row
    whole_TK = normalise(scores_TK, function)
    T = len(scores_TK)
    shuffled = torch.randperm(T, generator=random, device=scores_TK.device)
    views = [torch.arange(T, device=scores_TK.device), shuffled]
    views += [shuffled[start : start + size].sort().values for size in PURITY_SLICES for start in (0, T // 2)]
    follows_batch = False
    for rows in views:
        try:
            part_TK = normalise(scores_TK[rows], function)
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"reduce function {name}: cannot take {len(rows)} rows: {error}") from error
        bad_T = rows_differ(part_TK, whole_TK[rows])
        if not bad_T.any():
            continue
        follows_batch = True
        tolerance = 8 * torch.finfo(whole_TK.dtype).eps
        is_rounding = torch.isclose(part_TK, whole_TK[rows], rtol=tolerance, atol=0, equal_nan=True).all()
        if not is_rounding or scores_TK.device.type == "cuda":
            raise ValueError(
                f"reduce function {name}: a row's result depends on other rows: of {len(rows)} rows given by themselves"
                f" or in another order {int(bad_T.sum())} differ; expected a pure function of each row"
            )
    return follows_batch


def _other_order(scores_TK: Tensor, weights_TK: Tensor) -> str:
    """A remark, where the function is a plain sum in an order that is not PyTorch's."""
    for order in SUMS:
        if not rows_differ(scores_TK / rounded_sum(order, scores_TK), weights_TK).any():
            return f"; it adds its slots in the order {order}, and PyTorch here does not"
    return ""
