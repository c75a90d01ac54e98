"""The vocabulary of the trainers' tables: where a checkpoint's config keeps each number, and what is done about it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

Rounding = Literal["model", "logits", "float32", "float64"]
"""A dtype: the model's, that of the gate's logits, or itself."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A number or a switch of the config. A dot in a name leads into a part of the config."""

    names: tuple[str, ...]
    """Its names in any release; where several are given, they have to agree."""
    default: object = None
    """What the trainer's config class assumes without it; None: it has to be there."""
    may_be_null: bool = False
    """Whether null says something, instead of nothing."""


def setting(*names: str, default: object = None, may_be_null: bool = False) -> Setting:
    """A Setting under these names."""
    return Setting(names=names, default=default, may_be_null=may_be_null)


@dataclass(frozen=True, kw_only=True)
class Demand:
    """What a config must say, or leave unsaid, for the row to hold."""

    of: Setting
    values: tuple[object, ...]
    otherwise: str
    """What the config asks for with any other value."""


@dataclass(frozen=True, kw_only=True)
class Groups:
    """Groups of experts, as far as the config asks for them."""

    count: Setting
    kept: Setting
    only_if: tuple[Setting, object] | None = None
    """There are groups only where that setting has that value."""
    score: str = "top_sum"
    top: int | None = 2
    """A group's score is the sum of this many of its best; None: top_k // kept."""
    mask_value: str | float = "-inf"
    masks_scores: bool = False
    slot_order: str | None = None
    """Of a choice among groups, where it is not the row's."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The product that makes the logits, as the trainer's modules compute it."""

    operand: Rounding
    output: Rounding
    tf32: bool = False
    has_bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trainer's router for one model family."""

    model_types: tuple[str, ...]
    """What config.json calls the family, or the language model within it."""
    source: str
    """The class that this row restates, or the function."""
    num_experts: Setting
    extra_experts: Setting | None = None
    """Experts without weights, which the gate numbers after the others."""
    top_k: Setting
    score: str
    bias: bool | Setting = False
    """Whether a correction bias takes part in the choice, and in nothing else."""
    rounds_bias: bool = False
    """Whether loading the model in its dtype rounds that bias to it. The rollout takes it in fp32, as it is sent."""
    groups: Groups | None = None
    slot_order: str
    normalise: bool | Setting
    """Whether the reduce happens."""
    normalises_one: bool = True
    """Whether it also happens where a token has one expert."""
    reduce: Mapping[str, object]
    """As TopkReduce.to_plain has it; a Setting in place of a number is read from the config."""
    scale: Setting | None = None
    expert_scale: bool = False
    chain: Rounding = "float32"
    weight: Rounding
    gate: Gate
    demands: tuple[Demand, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A family whose router no RouterSpec describes."""

    model_types: tuple[str, ...]
    source: str
    why: str
    """The operation that cannot be said."""


@dataclass(frozen=True, kw_only=True)
class Trainer:
    """A trainer's routers."""

    name: str
    description: str
    """Which code, in which setting; one sentence or two."""
    rows: tuple[Row, ...]
    refusals: tuple[Refusal, ...] = ()
    unproved: str | None = None
    """Why its bits cannot be compared with, where its kernels do not run beside PyTorch."""
