"""Microseconds of the kernel beside its rival, eager PyTorch and the floors, under CUDA-graph replay.

T tokens, E experts, K slots of a token.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from routing import RouterSpec
from routing.oracle import EagerOracle
from routing_bench import kernel_floor
from routing_bench.columns import Column, Way
from routing_bench.timing import microseconds

TOKENS = (1, 16, 64, 256, 1024, 8192, 65536)
SEEDS = (0, 1, 2)
"""Of the rows: one whose experts are in doubt costs a microsecond or two."""
CALLS, CALLS_OF_MANY = 50, 10
MANY_TOKENS = 65536
ROTATED_TOKENS = (8192, 65536)
"""Timed once more over several inputs in turn, so that the cache holds none of them."""
ROTATED_BYTES, MOST_ROTATED = 256 << 20, 64
FLOOR_EXPERTS = (128, 160, 256)
FLOOR_SLOTS = 8

Clock = Callable[[Callable[[int], object], int], float]
"""As routing_bench.timing.microseconds."""


class Opponent(Protocol):
    """Another library's router."""

    def call(
        self, spec: RouterSpec, logits_TE: Tensor, bias_E: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]] | None:
        """One call, which gives ids and weights; None for a router that it does not have."""
        ...


@dataclass(frozen=True, kw_only=True)
class Times:
    """Of one column, by tokens."""

    column: Column
    ours: dict[int, float] = field(default_factory=dict)
    rival: dict[int, float] = field(default_factory=dict)
    eager: dict[int, float] = field(default_factory=dict)
    ours_rotated: dict[int, float] = field(default_factory=dict)
    rival_rotated: dict[int, float] = field(default_factory=dict)
    rival_rows_otherwise: dict[str, int] = field(default_factory=dict)
    """Of so many rows, those for which the rival chooses other experts than eager PyTorch, and those for which it
    chooses the same and weighs them otherwise, in whatever slots."""


@dataclass(frozen=True, kw_only=True)
class Floors:
    """What bounds every router from below."""

    empty_node: float
    tokens: int
    moving: dict[int, float]
    """E -> the bytes of so many tokens moved, again and again the same ones."""
    moving_rotated: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Race:
    """Times columns on a device."""

    device: torch.device
    rival: Opponent | None
    clock: Clock = microseconds
    tokens: Sequence[int] = TOKENS
    rotated_tokens: Sequence[int] = ROTATED_TOKENS
    floor_tokens: int = MANY_TOKENS

    def times(self, column: Column) -> Times:
        """Ours, the rival's and eager PyTorch's."""
        times = Times(column=column)
        for T in self.tokens:
            calls = CALLS if T < MANY_TOKENS else CALLS_OF_MANY
            for name, found in self._at(column, T, calls).items():
                getattr(times, name)[T] = found
        for T in self.rotated_tokens:
            for name, found in self._rotated(column, T).items():
                getattr(times, f"{name}_rotated")[T] = found
        times.rival_rows_otherwise.update(self._otherwise(column))
        return times

    def floors(self) -> Floors:
        """The least of several shapes of a kernel that only moves bytes."""
        anything = torch.zeros(1, device=self.device)
        T, moving, moving_rotated = self.floor_tokens, {}, {}
        for E in FLOOR_EXPERTS:
            inputs = [torch.randn(T, E, device=self.device) for _ in range(_count(4 * T * E))]
            moving[E] = self._floor(inputs[:1], CALLS_OF_MANY)
            moving_rotated[E] = self._floor(inputs, len(inputs))
        return Floors(
            tokens=T,
            empty_node=self.clock(lambda _: kernel_floor.do_nothing(anything), CALLS),
            moving=moving,
            moving_rotated=moving_rotated,
        )

    def _floor(self, inputs: list[Tensor], calls: int) -> float:
        ids_TK = torch.empty(len(inputs[0]), FLOOR_SLOTS, dtype=torch.int32, device=self.device)
        weights_TK = torch.empty(len(inputs[0]), FLOOR_SLOTS, device=self.device)

        def moving(shape: tuple[int, int]) -> float:
            return self.clock(
                lambda index: kernel_floor.move_bytes(inputs[index % len(inputs)], ids_TK, weights_TK, shape), calls
            )

        return min(moving(shape) for shape in kernel_floor.SHAPES)

    def _at(self, column: Column, T: int, calls: int) -> dict[str, float]:
        """Every path at T tokens; the median over seeds."""
        found: dict[str, list[float]] = {}
        for seed in SEEDS:
            logits_TE, bias_E = operands(column.spec, T, seed, self.device)
            for name, call in self._paths(column, logits_TE, bias_E).items():
                found.setdefault(name, []).append(self.clock(_whatever(call), calls))
        return {name: statistics.median(times) for name, times in found.items()}

    def _rotated(self, column: Column, T: int) -> dict[str, float]:
        """Ours and the rival over inputs in turn."""
        spec = column.spec
        count = _count(T * spec.num_experts * spec.gate.output_dtype.itemsize)
        paths = [self._paths(column, *operands(spec, T, seed, self.device)) for seed in range(count)]
        return {
            name: self.clock(_in_turn([path[name] for path in paths]), count) for name in paths[0] if name != "eager"
        }

    def _paths(self, column: Column, logits_TE: Tensor, bias_E: Tensor | None) -> dict[str, Callable[[], object]]:
        """By name: what is timed beside what."""
        oracle = EagerOracle(spec=column.spec)
        paths: dict[str, Callable[[], object]] = {"ours": column.call(logits_TE, bias_E)}
        theirs = self._theirs(column, logits_TE, bias_E)
        if theirs is not None:
            paths["rival"] = theirs
        paths["eager"] = lambda: oracle(logits_TE, bias_E=bias_E, expert_scale_E=None)
        return paths

    def _theirs(
        self, column: Column, logits_TE: Tensor, bias_E: Tensor | None
    ) -> Callable[[], tuple[Tensor, Tensor]] | None:
        if self.rival is None or column.way is not Way.FUSED:
            return None
        return self.rival.call(column.spec, logits_TE, bias_E)

    def _otherwise(self, column: Column) -> dict[str, int]:
        logits_TE, bias_E = operands(column.spec, max(self.tokens), SEEDS[0], self.device)
        call = self._theirs(column, logits_TE, bias_E)
        if call is None:
            return {}
        expected = EagerOracle(spec=column.spec)(logits_TE, bias_E=bias_E, expert_scale_E=None)
        ids_TK, weights_TK = call()
        order_TK, wanted_TK = ids_TK.long().argsort(dim=1), expected.ids_TK.argsort(dim=1)
        other_T = (ids_TK.long().gather(1, order_TK) != expected.ids_TK.gather(1, wanted_TK)).any(dim=1)
        weights_TK = weights_TK.to(expected.weights_TK.dtype).gather(1, order_TK)
        heavier_T = (weights_TK != expected.weights_TK.gather(1, wanted_TK)).any(dim=1)
        return {
            "rows": len(logits_TE),
            "other_experts": int(other_T.sum()),
            "other_weights": int((heavier_T & ~other_T).sum()),
        }


def operands(spec: RouterSpec, T: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Standard normal logits [T, E] and bias [E]."""
    random = torch.Generator(device=device).manual_seed(seed)
    logits_TE = torch.randn(T, spec.num_experts, generator=random, device=device).to(spec.gate.output_dtype)
    return logits_TE, torch.randn(spec.num_experts, generator=random, device=device) if spec.has_bias else None


def _count(size: int) -> int:
    """Of inputs that together are past every cache."""
    return min(max(2, math.ceil(ROTATED_BYTES / size)), MOST_ROTATED)


def _whatever(call: Callable[[], object]) -> Callable[[int], object]:
    return lambda _: call()


def _in_turn(calls: list[Callable[[], object]]) -> Callable[[int], object]:
    return lambda index: calls[index]()
