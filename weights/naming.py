"""Where each wire tensor lies in hosted storage, declared once and read in both directions.

The wire speaks Hugging Face checkpoint names and full tensors. Hosted storage fuses some of them (q|k|v rows, gate|up
rows of every expert) and keeps checkpoint row order, so that each wire tensor is one contiguous block of rows of one
parameter: copying in, reading out and verifying are all the same view.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from weights.dtypes import dtype_name


class Shaped(Protocol):
    """What a layout needs to know of a parameter: a tensor will do, on any device, `meta` included."""

    @property
    def shape(self) -> Sequence[int]: ...
    @property
    def dtype(self) -> torch.dtype: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class HostedSlice:
    """Rows [start, stop) of `parameters[parameter][index]`: where one wire tensor lies."""

    parameter: str
    index: tuple[int, ...]
    """Leading dimensions taken whole: (expert,) for expert weights, () for most."""
    start: int
    stop: int
    """Rows of the dimension after `index`; (0, 1) where nothing is left of the shape, as for a scalar."""
    shape: tuple[int, ...]
    """The wire tensor's shape."""
    dtype: torch.dtype
    """The hosted dtype."""

    def offset(self, shape: Sequence[int]) -> int:
        """Its first element in a parameter of this shape."""
        start = 0
        for dimension, index in enumerate(self.index):
            start += index * prod(shape[dimension + 1 :])
        return start + self.start * prod(shape[len(self.index) + 1 :])

    def view(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The block itself, no copy: contiguous if the parameter is."""
        block = parameters[self.parameter].detach()[self.index]
        return block[self.start : self.stop] if self.shape else block


class Rule(Protocol):
    """Names the wire tensors that a parameter is made of."""

    @property
    def parameter(self) -> str: ...

    def slices(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, HostedSlice]]:
        """(wire name, where it lies) for a parameter of this shape.

        ValueError where the rule does not fit the shape.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """A parameter that is one wire tensor."""

    parameter: str
    name: str

    def slices(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, HostedSlice]]:
        rows = shape[0] if shape else 1
        yield self.name, HostedSlice(parameter=self.parameter, index=(), start=0, stop=rows, shape=shape, dtype=dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """A parameter [sum of rows, ...] that holds wire tensors one below the other, e.g. q|k|v."""

    parameter: str
    names: tuple[str, ...]
    rows: tuple[int, ...]
    """Rows of each, in the order of `names`."""

    def slices(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, HostedSlice]]:
        if len(self.names) != len(self.rows) or not shape or sum(self.rows) != shape[0]:
            raise ValueError(
                f"{self.parameter}: shape {shape} is not made of {dict(zip(self.names, self.rows, strict=False))}"
            )
        yield from _stacked(self.parameter, (), self.names, self.rows, shape, dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertRows:
    """A parameter [E, sum of rows, ...] that holds each expert's wire tensors one below the other, e.g. gate|up."""

    parameter: str
    patterns: tuple[str, ...]
    """Wire names with `{expert}` in place of the expert's number."""
    rows: tuple[int, ...] | None = None
    """Rows of each, in the order of `patterns`; left out, equal parts."""

    def slices(self, shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[str, HostedSlice]]:
        if len(shape) < 2 or not self.patterns or not all("{expert}" in pattern for pattern in self.patterns):
            raise ValueError(
                f"{self.parameter}: shape {shape} with patterns {self.patterns}; "
                "expected [E, rows, ...] and {expert} in each pattern"
            )
        rows = self.rows if self.rows is not None else (shape[1] // len(self.patterns),) * len(self.patterns)
        if len(rows) != len(self.patterns) or sum(rows) != shape[1]:
            raise ValueError(
                f"{self.parameter}: {shape[1]} rows of an expert are not made of "
                f"{dict(zip(self.patterns, rows, strict=False))}"
            )
        for expert in range(shape[0]):
            names = tuple(pattern.replace("{expert}", str(expert)) for pattern in self.patterns)
            yield from _stacked(self.parameter, (expert,), names, rows, shape[1:], dtype)


def _stacked(
    parameter: str,
    index: tuple[int, ...],
    names: Sequence[str],
    rows: Sequence[int],
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Iterator[tuple[str, HostedSlice]]:
    start = 0
    for name, count in zip(names, rows, strict=True):
        yield (
            name,
            HostedSlice(
                parameter=parameter,
                index=index,
                start=start,
                stop=start + count,
                shape=(count, *shape[1:]),
                dtype=dtype,
            ),
        )
        start += count


class HostedLayout(Mapping[str, HostedSlice]):
    """Wire name -> HostedSlice, for a whole model: every element of every parameter lies in exactly one slice.

    Iteration gives the hosted state dict's names in the order of the rules.
    """

    def __init__(
        self, rules: Iterable[Rule], parameters: Mapping[str, Shaped], *, tied: Mapping[str, str] | None = None
    ) -> None:
        """rules: one or more for each parameter. parameters: the storage's shapes and dtypes.

        tied: a wire name that a checkpoint may repeat -> the wire name under which it is hosted ("lm_head.weight" ->
        "model.embed_tokens.weight"). ValueError names every offender: rules without a parameter, parameters without a
        rule, names given twice, elements in no slice or in two, and ties that lead nowhere.
        """
        self._slices: dict[str, HostedSlice] = {}
        self.tied: Mapping[str, str] = dict(tied or {})
        """Alias -> the wire name that hosts it. Aliases are not keys of the layout."""
        faults: list[str] = []
        for rule in rules:
            if rule.parameter not in parameters:
                faults.append(f"{rule.parameter}: a rule names it and the storage lacks it")
                continue
            spec = parameters[rule.parameter]
            try:
                found = list(rule.slices(tuple(spec.shape), spec.dtype))
            except ValueError as error:
                faults.append(str(error))
                continue
            for name, where in found:
                if name in self._slices:
                    faults.append(f"{name}: given twice, by {self._slices[name].parameter} and {where.parameter}")
                self._slices[name] = where
        faults += self._gaps(parameters)
        for alias, name in self.tied.items():
            if alias in self._slices or name not in self._slices:
                faults.append(f"{alias}: tied to {name}; the first must not be hosted itself and the second must")
        if faults:
            raise ValueError("the naming rules do not fit the storage:\n  " + "\n  ".join(faults))

    def __getitem__(self, name: str) -> HostedSlice:
        return self._slices[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._slices)

    def __len__(self) -> int:
        return len(self._slices)

    @cached_property
    def digest(self) -> str:
        """32 hexadecimal digits: two layouts share them if they host the same wire tensors in the same dtypes."""
        lines = [f"{name}\t{list(at.shape)}\t{dtype_name(at.dtype)}" for name, at in sorted(self._slices.items())]
        lines += [f"{alias}\t= {name}" for alias, name in sorted(self.tied.items())]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=16).hexdigest()

    def state_dict(self, parameters: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """(wire name, view) of all hosted tensors, no copies, without aliases."""
        return ((name, where.view(parameters)) for name, where in self._slices.items())

    def _gaps(self, parameters: Mapping[str, Shaped]) -> Iterator[str]:
        """Names the parameters whose elements are not each in exactly one slice."""
        spans: dict[str, list[tuple[int, int]]] = {name: [] for name in parameters}
        for where in self._slices.values():
            spans[where.parameter].append(_span(where, tuple(parameters[where.parameter].shape)))
        for name, found in spans.items():
            if not found:
                yield f"{name}: no rule names it"
                continue
            end = 0
            for start, stop in sorted(found):
                if start != end:
                    count = "no slice" if start > end else "more than one slice"
                    yield f"{name}: elements [{min(start, end)}, {max(start, end)}) lie in {count}"
                end = max(end, stop)
            size = prod(parameters[name].shape)
            if end != size:
                yield f"{name}: elements [{end}, {size}) lie in no slice"


def _span(where: HostedSlice, shape: tuple[int, ...]) -> tuple[int, int]:
    """The elements of a parameter of this shape that a slice takes, as [first, last + 1)."""
    start = where.offset(shape)
    return start, start + prod(where.shape)


_STACKED_EXPERTS = re.compile(r"(?P<prefix>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)")
_EXPERT_PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


def to_wire(named_tensors: Iterable[tuple[str, Tensor]], *, keep_tied: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Wire names and tensors of a trainer's state dict; detached views, no copies.

    Modules of transformers 5 hold experts stacked: `...experts.gate_up_proj` [E, 2I, D] (gate above up) and
    `...experts.down_proj` [E, D, I] become `...experts.{e}.gate_proj.weight` and so on. A tensor that shares the
    whole storage of an earlier one that is still alive is its tied duplicate and left out, unless keep_tied.
    ValueError for stacked experts of another shape and for sharded tensors.
    """
    seen: dict[tuple[object, ...], StorageWeakRef] = {}
    for name, tensor in named_tensors:
        if hasattr(tensor, "full_tensor"):
            raise ValueError(
                f"{name} is sharded (a DTensor): publish gathered(module) on one rank of the learner and call "
                f"take_part(module) on every other, both of weights.sharded"
            )
        tensor = tensor.detach()
        if not keep_tied and tensor.numel():
            # A weak reference keeps the storage's identity from being given to another one: gathered
            # tensors come and go.
            storage = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            key = (storage.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype)
            if key in seen:
                continue
            seen[key] = storage
        stacked = _STACKED_EXPERTS.fullmatch(name)
        if stacked is None:
            yield name, tensor
        else:
            yield from _unstacked(name, stacked["prefix"], _EXPERT_PARTS[stacked["kind"]], tensor)


def _unstacked(name: str, prefix: str, parts: tuple[str, ...], tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if tensor.dim() != 3 or tensor.shape[1] % len(parts):
        raise ValueError(
            f"{name}: stacked experts are [E, {len(parts)} x rows, columns], got shape {tuple(tensor.shape)}"
        )
    for expert in range(tensor.shape[0]):
        for part, rows in zip(parts, tensor[expert].chunk(len(parts)), strict=True):
            yield f"{prefix}.{expert}.{part}.weight", rows
