"""Where a serving path leaves the trainer's: the stages of a router compared one by one, the first that differs named.

A serving path gives ids and weights only. Its stages show when it is asked for less: without a scale, without a
reduce, without groups, without a bias. A token is out of the comparison from the first stage in which it differs, so
that a count belongs to its own stage. T tokens, K slots of a token.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from routing.assignment import Assignment
from routing.bits import rows_differ
from routing.oracle import Oracle, Stages, denominator
from routing.orders import SUMS, rounded_sum
from routing.probes import Batch
from routing.reduce_function import ReduceFunction
from routing.spec import RouterSpec
from routing.terms import ReduceKind, ScoreFunction, TopkReduce

NO_REDUCE = TopkReduce(kind=ReduceKind.NONE)
DIVIDING = (ReduceKind.SUM, ReduceKind.SUM_EPS, ReduceKind.CLAMPED_SUM)


class Operation(StrEnum):
    """The steps of a router that a trainer may take in another way, in the order in which a token meets them."""

    GATE = "gate product"
    SCORE = "score function"
    BIAS = "bias"
    GROUPS = "groups"
    IDS = "top-k ids"
    SLOTS = "slot order"
    TIES = "ties"
    SUM = "sum order"
    DIVISION = "division"
    REDUCE = "reduce"
    SCALE = "scale"
    EXPERT_SCALE = "expert scale"
    DTYPE = "weight dtype"
    WHOLE = "whole router"


class Serve(Protocol):
    """The path that serves: routing.route, or whatever a test puts in its place."""

    def __call__(
        self,
        logits_TE: Tensor,
        spec: RouterSpec,
        *,
        bias_E: Tensor | None = None,
        expert_scale_E: Tensor | None = None,
        topk_reduce_func: ReduceFunction | None = None,
    ) -> Assignment: ...


@dataclass(frozen=True, kw_only=True)
class Path:
    """A serving path with the spec, and perhaps the reduce function, that it serves."""

    spec: RouterSpec
    serve: Serve
    function: ReduceFunction | None = None

    def whole(self, batch: Batch) -> Assignment:
        """What is served."""
        return self._run(batch, self.spec, self.function)

    def raw(self, batch: Batch, **changes: object) -> Assignment:
        """The chosen experts and, as weights, their raw scores in the chain dtype."""
        return self._run(batch, replace(self._plain(), reduce=NO_REDUCE, **changes), None)  # type: ignore[arg-type]

    def reduced(self, batch: Batch) -> Assignment:
        """Without any scale."""
        return self._run(batch, self._plain(), self.function)

    def scaled(self, batch: Batch) -> Assignment:
        """Without the experts' own factors."""
        return self._run(batch, replace(self._plain(), scale=self.spec.scale), self.function)

    def expert_scaled(self, batch: Batch) -> Assignment:
        """In the chain dtype."""
        return self._run(batch, replace(self.spec, weight_dtype=self.spec.chain_dtype), self.function)

    def _plain(self) -> RouterSpec:
        return replace(self.spec, scale=None, expert_scale=False, weight_dtype=self.spec.chain_dtype)

    def _run(self, batch: Batch, spec: RouterSpec, function: ReduceFunction | None) -> Assignment:
        return self.serve(
            batch.logits_TE,
            spec,
            bias_E=batch.bias_E if spec.has_bias else None,
            expert_scale_E=batch.expert_scale_E if spec.expert_scale else None,
            topk_reduce_func=function,
        )


def stage_counts(batches: Callable[[], Iterable[Batch]], path: Path, oracle: Oracle) -> dict[Operation, int]:
    """How many tokens differ first in each operation. One synchronisation, and a second pass where something differs.

    Args:
        batches: gives the same operands each time.
        path: what serves.
        oracle: the trainer.
    """
    found: dict[Operation, list[Tensor]] = {}
    for batch in batches():
        for operation, bad_T in _first_differences(batch, path, _asked(oracle, batch)):
            found.setdefault(operation, []).append(bad_T.sum())
    totals = torch.stack([torch.stack(counts).sum() for counts in found.values()]).tolist()
    counts = dict(zip(found, map(int, totals), strict=True))
    for operation, closer in ((Operation.IDS, _choosing), (Operation.REDUCE, _reducing)):
        if counts.get(operation):
            counts[closer(batches, path, oracle)] = counts.pop(operation)
    return {operation: counts.get(operation, 0) for operation in Operation}


def _asked(oracle: Oracle, batch: Batch) -> Stages:
    return oracle(batch.logits_TE, bias_E=batch.bias_E, expert_scale_E=batch.expert_scale_E)


def _first_differences(batch: Batch, path: Path, expected: Stages) -> Iterator[tuple[Operation, Tensor]]:
    """Stage after stage: bool [T], the tokens that differ in it and in none before."""
    raw = path.raw(batch)
    ids_TK = raw.expert_ids_TK.long()
    is_whole = path.spec.score is not ScoreFunction.SOFTMAX_TOPK  # else scores are of the chosen together
    good_T = torch.ones(len(ids_TK), dtype=torch.bool, device=ids_TK.device)
    if is_whole:
        bad_T = rows_differ(raw.weights_TK, expected.weighing_TE.gather(1, ids_TK))
        yield Operation.SCORE, bad_T
        good_T = ~bad_T
    ranks_TK = _ranked(expected.choice_TE.gather(1, ids_TK))
    best_TK = _ranked(expected.choice_TE.gather(1, expected.ids_TK))
    tied_T = (best_TK[:, 1:] == best_TK[:, :-1]).any(dim=1)
    other_slots_T = (ids_TK != expected.ids_TK).any(dim=1)
    other_set_T = (ids_TK.sort(dim=1).values != expected.ids_TK.sort(dim=1).values).any(dim=1)
    other_values_T = (ranks_TK != best_TK).any(dim=1)
    yield Operation.IDS, good_T & other_set_T & other_values_T
    yield Operation.TIES, good_T & other_slots_T & ~other_values_T & (other_set_T | tied_T)
    yield Operation.SLOTS, good_T & other_slots_T & ~other_values_T & ~other_set_T & ~tied_T
    good_T = good_T & ~other_slots_T
    stages = [(Operation.REDUCE, path.reduced(batch), expected.reduced_TK)]
    if not is_whole:
        stages.insert(0, (Operation.SCORE, raw, expected.chosen_TK))
    if path.spec.scale is not None:
        stages.append((Operation.SCALE, path.scaled(batch), expected.scaled_TK))
    if path.spec.expert_scale:
        stages.append((Operation.EXPERT_SCALE, path.expert_scaled(batch), expected.expert_scaled_TK))
    stages.append((Operation.DTYPE, path.whole(batch), expected.weights_TK))
    for operation, served, weights_TK in stages:
        is_last = operation is Operation.DTYPE
        wanted_TK = weights_TK if is_last else weights_TK.to(path.spec.chain_dtype)
        bad_T = good_T & rows_differ(served.weights_TK, wanted_TK)
        yield operation, bad_T
        good_T = good_T & ~bad_T


def _ranked(values_TK: Tensor) -> Tensor:
    """Sorted, with one number for every NaN, above +inf."""
    values_TK = values_TK.double()
    return torch.where(values_TK.isnan(), torch.finfo(torch.float64).max, values_TK.clamp(max=1e300)).sort(dim=1).values


def _choosing(batches: Callable[[], Iterable[Batch]], path: Path, oracle: Oracle) -> Operation:
    """Which part of the choice is another: without groups, or without groups and bias, it would be the trainer's."""
    spec, wrong = path.spec, {Operation.GROUPS: False, Operation.BIAS: False}
    for batch in batches():
        expected = _asked(oracle, batch)
        if spec.groups is not None:
            wrong[Operation.GROUPS] |= _chose_other(path.raw(batch, groups=None), expected.biased_TE)
        if spec.has_bias:
            bare = path.raw(batch, groups=None, has_bias=False)
            wrong[Operation.BIAS] |= _chose_other(bare, expected.scores_TE)
    for operation, is_there in ((Operation.GROUPS, spec.groups is not None), (Operation.BIAS, spec.has_bias)):
        if is_there and not wrong[operation]:
            return operation
    return Operation.IDS


def _chose_other(found: Assignment, values_TE: Tensor) -> bool:
    """Whether anything but the largest values was chosen."""
    chosen_TK = _ranked(values_TE.gather(1, found.expert_ids_TK.long()))
    best_TK = _ranked(torch.topk(values_TE, found.expert_ids_TK.shape[1], dim=-1).values)
    return bool((chosen_TK != best_TK).any())


def _reducing(batches: Callable[[], Iterable[Batch]], path: Path, oracle: Oracle) -> Operation:
    """Which part of the reduce is another: with this sum, or that division, it would be the trainer's."""
    reduce = path.spec.reduce
    if path.function is not None or reduce.kind not in DIVIDING:
        return Operation.REDUCE
    sums: dict[str, Callable[[Tensor], Tensor]] = {"eager": lambda x: x.sum(dim=-1, keepdim=True)}
    sums |= {order: partial(rounded_sum, order) for order in SUMS}
    theirs, ours, by_product = set(sums), set(sums), set(sums)
    near, is_near = 8 * torch.finfo(path.spec.chain_dtype).eps, True  # as far apart as orders of a sum are
    for batch in batches():
        expected, served = _asked(oracle, batch), path.reduced(batch)
        same_T = (served.expert_ids_TK == expected.ids_TK).all(dim=1)
        chosen_TK, wanted_TK, found_TK = (
            x[same_T] for x in (expected.chosen_TK, expected.reduced_TK, served.weights_TK)
        )
        for name, add in sums.items():
            below_T1 = denominator(add(chosen_TK), reduce)
            quotient_TK, product_TK = chosen_TK / below_T1, chosen_TK * (1 / below_T1)
            for names, ways_TK, result_TK in (
                (theirs, quotient_TK, wanted_TK),
                (ours, quotient_TK, found_TK),
                (by_product, product_TK, wanted_TK),
            ):
                if name in names and rows_differ(ways_TK, result_TK).any():
                    names.discard(name)
        is_near &= torch.allclose(wanted_TK.to(found_TK.dtype), found_TK, rtol=near, atol=0, equal_nan=True)
    if by_product:
        return Operation.DIVISION
    return Operation.SUM if ours and (theirs or is_near) else Operation.REDUCE
