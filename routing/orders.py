"""Asks the running PyTorch in which orders it adds, ranks and lays out slots on a device.

Which order a release has is not documented and has changed; so it is found by its bits: the same rows go through
PyTorch's operation and through each order written out. T rows, K slots of a token, E experts.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from routing import cuda_order
from routing.arithmetic import Arithmetic, EagerArithmetic
from routing.bits import differs
from routing.kernel_elementwise import OPERATIONS, elementwise
from routing.spec import RouterSpec
from routing.terms import ReduceKind, SumOrder

SEQUENTIAL = "sequential"
"""((x[0] + x[1]) + x[2]) + ...: PyTorch's own on a CPU for some K; no kernel here adds like that."""
ROWS = {"cuda": 4096, "cpu": 512}
HALF_PRECISION_ROWS = 1 << 18
"""Rounding a sum to half precision hides its order in all but one row of thousands."""
SAMPLED = 1 << 20
"""Numbers that elementwise functions are tried on, unless all 2^32 are."""
EXHAUSTIVE_CHUNK = 1 << 24


def sequential_sum(rows_TK: Tensor) -> Tensor:
    """[T, 1]"""
    total_T1 = rows_TK[:, :1] + 0.0
    for slot in range(1, rows_TK.shape[1]):
        total_T1 = total_T1 + rows_TK[:, slot : slot + 1]
    return total_T1


SUMS: Mapping[str, Callable[[Tensor], Tensor]] = {
    SumOrder.HALVING: cuda_order.halving_sum,
    SumOrder.ADJACENT: cuda_order.adjacent_sum,
    SEQUENTIAL: sequential_sum,
}
"""Order -> fp32 or fp64 rows [T, W] summed in it, [T, 1]."""


def rounded_sum(order: str, rows_TK: Tensor) -> Tensor:
    """[T, 1]: as PyTorch sums, in fp32 at least and rounded once at the end."""
    wide = torch.promote_types(rows_TK.dtype, torch.float32)
    return SUMS[order](rows_TK.to(wide)).to(rows_TK.dtype)


@dataclass(frozen=True, kw_only=True, slots=True)
class Elementwise:
    """A function of one number, compared between PyTorch and what the kernels are made of."""

    operation: str
    inputs: int
    differing: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Orders:
    """What PyTorch was found to do on a device, for one spec's widths and dtypes."""

    device: str
    release: str
    """Of PyTorch."""
    sums: tuple[str, ...]
    """Every order of SUMS that gives torch.sum's bits over K slots: several where they agree, none where it is another
    one."""
    group_sums: tuple[str, ...]
    """The same over a group's best."""
    softmax_over_experts: bool
    """Whether the order of routing.cuda_order is PyTorch's; so for all that follow."""
    softmax_over_slots: bool
    sorted_slots: bool
    unsorted_slots: bool
    tied_slots: bool
    """Sorted and unsorted, where selection values tie."""
    special_ranks: bool
    """NaN, infinities and signed zeros, sorted and unsorted."""
    elementwise: tuple[Elementwise, ...] = ()
    """Empty on a CPU, where PyTorch itself serves."""

    @property
    def sum_order(self) -> SumOrder | None:
        """The kernels' variant with this PyTorch's bits; None where none has them."""
        return next((order for order in SumOrder if order in self.sums and order in self.group_sums), None)


def probe_orders(
    spec: RouterSpec, device: torch.device, *, arithmetic: Arithmetic | None = None, exhaustive: bool = False
) -> Orders:
    """Asks the PyTorch that runs here; one synchronisation, at the end.

    Args:
        spec: whose K, E, groups and dtypes matter. Its platform and sum_order do not.
        device: which to ask.
        arithmetic: PyTorch's operations; None takes PyTorch's own.
        exhaustive: try elementwise functions on all 2^32 numbers, which takes some seconds.
    """
    eager: Arithmetic = EagerArithmetic() if arithmetic is None else arithmetic
    random = torch.Generator(device=device).manual_seed(0)
    top = 1 if spec.groups is None else spec.groups.top
    asked = {
        **{f"sum {order}": found for order, found in _sums(eager, spec.top_k, spec.chain_dtype, random).items()},
        **{f"group sum {order}": found for order, found in _sums(eager, top, spec.choice_dtype, random).items()},
        **_softmaxes(eager, spec, random),
        **_slots(eager, spec, random),
    }
    pairs = _elementwise(device, random, exhaustive) if device.type == "cuda" else []
    answers = torch.stack([*(found.long() for found in asked.values()), *(count for _, count in pairs)]).tolist()
    said = dict(zip(asked, map(bool, answers), strict=False))
    inputs = 1 << 32 if exhaustive else SAMPLED
    return Orders(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        release=str(torch.__version__),
        sums=tuple(order for order in SUMS if said[f"sum {order}"]),
        group_sums=tuple(order for order in SUMS if said[f"group sum {order}"]),
        elementwise=tuple(
            Elementwise(operation=operation, inputs=inputs, differing=count)
            for (operation, _), count in zip(pairs, answers[len(asked) :], strict=True)
        ),
        **{name: answer for name, answer in said.items() if "sum " not in name},
    )


def _same(found: Tensor, expected: Tensor) -> Tensor:
    """bool scalar, on the device."""
    return ~differs(found, expected).any()


def _sums(eager: Arithmetic, width: int, dtype: torch.dtype, random: torch.Generator) -> dict[str, Tensor]:
    """Few rows and many: an order that follows the number of rows is none of ours."""
    found: dict[str, list[Tensor]] = (
        {order: [] for order in SUMS} if width <= cuda_order.MAX_SUMMANDS else {SEQUENTIAL: []}
    )
    wide = torch.promote_types(dtype, torch.float32)
    many = HALF_PRECISION_ROWS if dtype.itemsize == 2 and random.device.type == "cuda" else ROWS[random.device.type]
    for rows in (1, 1, 5, 5, many):
        x = (torch.rand(rows, width, generator=random, device=random.device, dtype=wide) ** 3).to(dtype)
        total = eager.sum(x)
        for order, same in found.items():
            same.append(_same(rounded_sum(order, x), total))
    no = torch.zeros((), dtype=torch.bool, device=random.device)
    return {order: torch.stack(found[order]).all() if order in found else no for order in SUMS}


def _softmaxes(eager: Arithmetic, spec: RouterSpec, random: torch.Generator) -> dict[str, Tensor]:
    dtype = torch.float32 if spec.chain_dtype == torch.float64 else spec.chain_dtype
    found = {}
    for name, width in (("softmax_over_experts", spec.num_experts), ("softmax_over_slots", spec.top_k)):
        x = (torch.randn(ROWS[random.device.type] // 8, width, generator=random, device=random.device) * 3).to(dtype)
        found[name] = _same(cuda_order.softmax(x.float()).to(dtype), eager.softmax(x))
    return found


def _slots(eager: Arithmetic, spec: RouterSpec, random: torch.Generator) -> dict[str, Tensor]:
    E, K, dtype = spec.num_experts, spec.top_k, spec.choice_dtype
    names = ("sorted_slots", "unsorted_slots", "tied_slots", "special_ranks")
    if K > cuda_order.SORT_WIRES:
        return dict.fromkeys(names, torch.zeros((), dtype=torch.bool, device=random.device))
    wide = torch.promote_types(dtype, torch.float32)
    noise = torch.randn(ROWS[random.device.type] // 8, E, generator=random, device=random.device)
    places = noise.argsort(dim=1)
    distinct = places.to(dtype) if dtype.itemsize > 2 else (places + 0x3C00).to(torch.int16).view(dtype)
    specials = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0], device=random.device)
    picks = torch.randint(5, noise.shape, generator=random, device=random.device)
    rows = {
        "distinct": distinct,
        "tied": torch.cat([noise.round(), torch.zeros_like(noise[:8])]),
        "special": torch.where(noise > 0, specials[picks], torch.where(noise > -1, -0.0, noise)),
    }
    same = {}
    for name, x in rows.items():
        x = x.to(dtype)
        unsorted = cuda_order.topk_unsorted(x.to(wide), K)
        same[name, False] = (unsorted == eager.topk(x, K, is_sorted=False)).all()
        same[name, True] = (cuda_order.sort_slots(x.to(wide), unsorted) == eager.topk(x, K, is_sorted=True)).all()
    return {
        "sorted_slots": same["distinct", True],
        "unsorted_slots": same["distinct", False],
        "tied_slots": same["tied", True] & same["tied", False],
        "special_ranks": same["special", True] & same["special", False],
    }


def _elementwise(device: torch.device, random: torch.Generator, exhaustive: bool) -> list[tuple[str, Tensor]]:
    """By operation: how many inputs differ."""
    counts = torch.zeros(len(OPERATIONS), dtype=torch.int64, device=device)
    if exhaustive:
        for start in range(-(1 << 31), 1 << 31, EXHAUSTIVE_CHUNK):
            patterns = torch.arange(start, start + EXHAUSTIVE_CHUNK, device=device)
            counts += _differing(patterns.to(torch.int32).view(torch.float32), random)
    else:
        low, high = -(1 << 31), (1 << 31) - 1
        patterns = torch.randint(low, high, (SAMPLED // 2,), generator=random, device=device, dtype=torch.int32)
        usual = torch.rand(SAMPLED // 2, generator=random, device=device) * 60 - 30
        counts += _differing(torch.cat([patterns.view(torch.float32), usual]), random)
    return list(zip(OPERATIONS, counts, strict=True))


def _differing(x_N: Tensor, random: torch.Generator) -> Tensor:
    """int64 [6]"""
    y_N = x_N[torch.randint(len(x_N), (len(x_N),), generator=random, device=x_N.device)]
    expected = (torch.exp(x_N), torch.sigmoid(x_N), torch.log1p(x_N), softplus(x_N).sqrt(), torch.sqrt(x_N), x_N / y_N)
    return torch.stack(
        [differs(ours, theirs).sum() for ours, theirs in zip(elementwise(x_N, y_N), expected, strict=True)]
    )


def uses_sum(spec: RouterSpec) -> bool:
    """Whether a sum over slots, or over a group's best, is in the formula."""
    over_slots = spec.top_k > 1 and spec.reduce.kind not in (ReduceKind.NONE, ReduceKind.SOFTMAX, ReduceKind.CALLABLE)
    return over_slots or (spec.groups is not None and spec.groups.top > 1)
