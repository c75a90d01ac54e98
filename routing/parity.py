"""Whether the path that serves has the trainer's bits on this device with this PyTorch; certified, or refused.

orders = what PyTorch does here                routing.orders      picks the kernel's variant
fusion = a callable reduce as a fused form     routing.fusion      the fused form runs where it is proven
whole  = ids and weights of all probe rows     routing.probes      the serving path against routing.oracle
stages = the operation that differs            routing.stages      only where something does, or on request
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from routing.arithmetic import Arithmetic
from routing.bits import rows_differ
from routing.formula import formula
from routing.fusion import Fusion, certify_reduce, said
from routing.oracle import EagerOracle, Oracle
from routing.orders import Orders, probe_orders, uses_sum
from routing.probes import Batch, batches
from routing.reduce_function import ReduceFunction, resolve
from routing.route import route
from routing.spec import RouterSpec
from routing.stages import Operation, Path, Serve, stage_counts
from routing.terms import ReduceKind, ScoreFunction, SlotOrder
from routing.verdict import Verdict

TOKENS = {"cuda": 1 << 18, "cpu": 512}
"""That are routed and compared, by the kind of device, unless said otherwise."""


class ParityRefused(ValueError):
    """The serving path does not have the trainer's bits here; names the operation that differs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParityRow:
    """One operation, with what the trainer computes and what was found here."""

    operation: Operation
    expected: str
    found: str
    verdict: Verdict
    why: str
    is_mismatch: bool = False
    """Measured here, and not the trainer's."""


@dataclass(frozen=True, kw_only=True)
class ParityReport:
    """What was found for one router on one device."""

    spec: RouterSpec
    """To serve: with the order of summation that was found, and the fused form of a callable reduce where proven."""
    function: ReduceFunction | None
    """To serve it with, where it has no fused form and the spec does not name it."""
    orders: Orders
    fusion: Fusion | None
    """Of a callable reduce."""
    tokens: int
    other_ids: int
    """Tokens with another expert id, or the same in other slots."""
    other_weights: int
    """Tokens with another bit in their combine weights."""
    rows: tuple[ParityRow, ...]

    @property
    def mismatches(self) -> tuple[ParityRow, ...]:
        """Where the serving path left the trainer's, in the order in which a token meets it."""
        return tuple(row for row in self.rows if row.is_mismatch)

    @property
    def refusal(self) -> str | None:
        """Why this router cannot be served with the trainer's bits, the operation first; None where it can."""
        if not self.mismatches:
            return None
        first, others = self.mismatches[0], ", ".join(row.operation for row in self.mismatches[1:])
        return (
            f"routing has not the trainer's bits here: {first.operation}: expected {first.expected}; found"
            f" {first.found}{f' (then also: {others})' if others else ''}. {self.summary}. Run the PyTorch release that"
            " the trainer runs, or correct the router"
        )

    @property
    def summary(self) -> str:
        """In one line."""
        return (
            f"{self.tokens:,} probe tokens on {self.orders.device}, PyTorch {self.orders.release}: expert ids of"
            f" {self.other_ids:,} and combine weights of {self.other_weights:,} differ"
        )


def certify(
    spec: RouterSpec,
    device: torch.device,
    *,
    function: ReduceFunction | None = None,
    oracle: Oracle | None = None,
    serve: Serve = route,
    arithmetic: Arithmetic | None = None,
    tokens: int | None = None,
) -> ParityReport:
    """As `examine`; refuses what differs.

    Raises:
        ParityRefused: some bit differs; names the operation.
        ValueError: a reduce function breaks its contract.
    """
    report = examine(spec, device, function=function, oracle=oracle, serve=serve, arithmetic=arithmetic, tokens=tokens)
    if report.refusal is not None:
        raise ParityRefused(report.refusal)
    return report


def examine(
    spec: RouterSpec,
    device: torch.device,
    *,
    function: ReduceFunction | None = None,
    oracle: Oracle | None = None,
    serve: Serve = route,
    arithmetic: Arithmetic | None = None,
    tokens: int | None = None,
    stages: bool = False,
    exhaustive: bool = False,
) -> ParityReport:
    """Routes probe rows along the path that serves and by the trainer's own operations, and compares every bit.

    Args:
        spec: the router. A callable reduce runs in its fused form where one is proven.
        device: that serves; of the spec's platform.
        function: a reduce function in place of the spec's reduce.
        oracle: what the trainer computes; None takes eager PyTorch on the device.
        serve: the path that serves.
        arithmetic: what is asked for its orders; None takes PyTorch on the device.
        tokens: how many are tried, about; None takes what is usual on the device.
        stages: look at every stage even where nothing differs; costs a kernel or two to compile.
        exhaustive: try exponentials and the like on all 2^32 numbers; some seconds.
    """
    orders = probe_orders(spec, device, arithmetic=arithmetic, exhaustive=exhaustive)
    if function is None and spec.reduce.path is not None:
        function = resolve(spec.reduce.path)
    fusion = None if function is None else certify_reduce(spec, function, device)
    truth: Oracle = EagerOracle(spec=spec, function=function) if oracle is None else oracle
    served = spec if fusion is None else fusion.spec
    if spec.platform == "cuda" and orders.sum_order is not None:
        served = replace(served, sum_order=orders.sum_order)
    path = Path(spec=served, serve=serve, function=None if fusion is not None and fusion.form is not None else function)
    probe = partial(batches, served, device, TOKENS[device.type] if tokens is None else tokens)
    routed, other_ids, other_weights = _whole(probe(), path, truth)
    counts = stage_counts(probe, path, truth) if stages or other_ids or other_weights else None
    rows = _rows(served, orders, fusion, counts, (routed, other_ids, other_weights))
    return ParityReport(
        spec=served,
        function=None if served.reduce.kind is ReduceKind.CALLABLE else path.function,
        orders=orders,
        fusion=fusion,
        tokens=routed,
        other_ids=other_ids,
        other_weights=other_weights,
        rows=tuple(rows),
    )


def _whole(probe: Iterator[Batch], path: Path, oracle: Oracle) -> tuple[int, int, int]:
    """Tokens routed, those with other ids, those with other weights; one synchronisation."""
    counts: list[Tensor] = []
    tokens = 0
    for batch in probe:
        found = path.whole(batch)
        expected = oracle(batch.logits_TE, bias_E=batch.bias_E, expert_scale_E=batch.expert_scale_E)
        other_ids_T = rows_differ(found.expert_ids_TK.long(), expected.ids_TK)
        counts.append(torch.stack([other_ids_T.sum(), rows_differ(found.weights_TK, expected.weights_TK).sum()]))
        tokens += len(batch.logits_TE)
    other_ids, other_weights = torch.stack(counts).sum(dim=0).tolist()
    return tokens, int(other_ids), int(other_weights)


def _rows(
    served: RouterSpec,
    orders: Orders,
    fusion: Fusion | None,
    counts: dict[Operation, int] | None,
    whole: tuple[int, int, int],
) -> Iterator[ParityRow]:
    tokens, other_ids, other_weights = whole
    on_cuda = served.platform == "cuda"
    faults = _order_faults(served, orders) if on_cuda else {}
    how = f"the kernel against eager PyTorch {orders.release}" if on_cuda else "this machine's PyTorch runs it"
    for operation, expected in formula(served).items():
        differing = 0 if counts is None else counts[operation]
        found = f"{differing:,} of {tokens:,} tokens differ"
        why = how
        if operation is Operation.SUM and uses_sum(served):
            found = f"{' or '.join(orders.sums) or 'another order'}; {found}"
        if operation is Operation.REDUCE and fusion is not None:
            expected = f"the function {fusion.name}"
            found = f"{'itself' if fusion.form is None else said(fusion.form)}; {found}"
            why = f"{'runs as it is' if fusion.form is None else 'fused'}: {fusion.why}; the trainer has to run it too"
        if operation in faults:
            found = faults[operation]
        is_bad = differing > 0 or operation in faults
        if expected == "none" and not is_bad:
            found = "none"
        verdict = Verdict.IMPOSSIBLE if is_bad else Verdict.EQUAL
        yield ParityRow(
            operation=operation, expected=expected, found=found, verdict=verdict, why=why, is_mismatch=is_bad
        )
    is_bad = bool(other_ids or other_weights)
    yield ParityRow(
        operation=Operation.WHOLE,
        expected="the trainer's ids and weights",
        found=f"ids of {other_ids:,} and weights of {other_weights:,} of {tokens:,} tokens differ",
        verdict=Verdict.IMPOSSIBLE if is_bad else Verdict.EQUAL,
        why=how,
        is_mismatch=is_bad,
    )


ELEMENTWISE = {
    ScoreFunction.SOFTMAX: ("exp", "division"),
    ScoreFunction.SOFTMAX_TOPK: ("exp", "division"),
    ScoreFunction.SIGMOID: ("sigmoid", "division"),
    ScoreFunction.SQRT_SOFTPLUS: ("sqrt of softplus", "division"),
}


def _order_faults(spec: RouterSpec, orders: Orders) -> dict[Operation, str]:
    """What the PyTorch here does otherwise than the kernel can, of all that this spec needs."""
    faults = {}
    softmax_over_slots = spec.score is ScoreFunction.SOFTMAX_TOPK or spec.reduce.kind is ReduceKind.SOFTMAX
    slots_as_known = orders.sorted_slots if spec.slot_order is SlotOrder.SORTED else orders.unsorted_slots
    if spec.score is ScoreFunction.SOFTMAX and not orders.softmax_over_experts:
        faults[Operation.SCORE] = "torch.softmax over the experts adds in another order"
    if softmax_over_slots and not orders.softmax_over_slots:
        faults[Operation.SCORE] = "torch.softmax over the slots adds in another order"
    for probed in orders.elementwise:
        if probed.operation in ELEMENTWISE[spec.score] and probed.differing:
            where = f"{probed.differing:,} of {probed.inputs:,} numbers differ"
            faults[Operation.SCORE] = f"{probed.operation} of Triton's libdevice is not PyTorch's: {where}"
    if not slots_as_known:
        faults[Operation.SLOTS] = "torch.topk lays its slots out in another order"
    if not (orders.tied_slots and orders.special_ranks):
        faults[Operation.TIES] = "torch.topk orders ties, NaN or signed zeros in another way"
    if uses_sum(spec) and orders.sum_order is None:
        faults[Operation.SUM] = f"torch.sum adds in another order ({', '.join(orders.sums) or 'none that is known'})"
    return faults
