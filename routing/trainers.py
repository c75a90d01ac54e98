"""What each trainer computes for each model family, as data: one row per (trainer, family).

A row says where the checkpoint's config keeps each number and what the trainer does about it; `preset` turns a row and
a config into the plain mapping of a RouterSpec. Another family, or another trainer, is another row.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from routing.plain import nearest

Rounding = Literal["model", "float32", "logits"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One trainer's router for one model family. Dtypes are "float32", the "model" dtype, or that of the "logits"."""

    trainer: str
    model_type: str
    source: str
    """The module this row restates."""
    num_experts_keys: tuple[str, ...]
    """The config's names for the number of experts, in any release."""
    top_k_key: str = "num_experts_per_tok"
    score: str
    has_bias: bool
    """A correction bias that takes part in the choice only."""
    group_count_key: str | None = None
    group_kept_key: str | None = None
    group_top: int = 2
    """A group's score is the sum of this many of its best."""
    slot_order: str
    normalise_key: str | None
    """The config's switch for the reduce; None: always on."""
    normalise_default: bool = True
    """What the trainer's config class assumes where the checkpoint says nothing."""
    reduce: Mapping[str, object]
    scale_key: str | None = None
    gate_operand: Rounding
    gate_output: Rounding
    weight: Rounding


ROWS: tuple[Row, ...] = (
    Row(
        trainer="transformers",
        model_type="qwen3_moe",
        source="transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeTopKRouter",
        num_experts_keys=("num_local_experts", "num_experts"),
        score="softmax",
        has_bias=False,
        slot_order="sorted",
        normalise_key="norm_topk_prob",
        normalise_default=False,  # the released checkpoints say true
        reduce={"kind": "sum"},
        gate_operand="model",
        gate_output="model",
        weight="logits",
    ),
    Row(
        trainer="transformers",
        model_type="glm4_moe",
        source="transformers.models.glm4_moe.modeling_glm4_moe.Glm4MoeTopkRouter",
        num_experts_keys=("n_routed_experts", "num_local_experts", "num_experts"),
        score="sigmoid",
        has_bias=True,
        group_count_key="n_group",
        group_kept_key="topk_group",
        slot_order="unsorted",
        normalise_key="norm_topk_prob",
        reduce={"kind": "sum_eps", "eps": 1e-20},
        scale_key="routed_scaling_factor",
        gate_operand="float32",
        gate_output="float32",
        weight="float32",
    ),
)


def row_for(trainer: str, model_type: str) -> Row:
    """The row of that trainer and family; ValueError naming the known ones."""
    rows = {row.model_type: row for row in ROWS if row.trainer == trainer}
    if not rows:
        trainers = sorted({row.trainer for row in ROWS})
        raise ValueError(f"unknown trainer {trainer!r}; {nearest(trainer, trainers)}. Or spell a RouterSpec out.")
    if model_type not in rows:
        raise ValueError(
            f"no routing known for model_type {model_type!r} under trainer {trainer!r};"
            f" known families: {', '.join(sorted(rows))}. Or spell a RouterSpec out."
        )
    return rows[model_type]


def preset(trainer: str, hf_config: object, *, model_dtype: str | None, gate: str) -> dict[str, object]:
    """The plain mapping of a RouterSpec, without its platform.

    `hf_config` is a config.json as a mapping, or transformers' config object. `model_dtype` None takes the config's.
    `gate` is "fp32" (operands and logits in fp32 whatever the trainer does) or "trainer". ValueError for what the
    config leaves open.
    """
    if gate not in ("fp32", "trainer"):
        raise ValueError(f"gate={gate!r}; 'fp32' or 'trainer' expected")
    config = _Config(hf_config)
    row = row_for(trainer, str(config.required("model_type")))
    model = model_dtype if model_dtype is not None else _model_dtype(config)
    operand, output = ("float32", "float32") if gate == "fp32" else (row.gate_operand, row.gate_output)
    dtypes = {"model": model, "float32": "float32"}
    dtypes["logits"] = dtypes[output]
    normalised = row.normalise_key is None or config.get(row.normalise_key, default=row.normalise_default)
    return {
        "num_experts": config.agreed(row.num_experts_keys),
        "top_k": config.required(row.top_k_key),
        "score": row.score,
        "has_bias": row.has_bias,
        "groups": _groups(row, config),
        "slot_order": row.slot_order,
        "reduce": row.reduce if normalised else {"kind": "none"},
        "scale": None if row.scale_key is None else config.get(row.scale_key, default=1.0),
        "weight_dtype": dtypes[row.weight],
        "gate": {"operand_dtype": dtypes[operand], "output_dtype": dtypes[output]},
    }


def _groups(row: Row, config: "_Config") -> dict[str, object] | None:
    if row.group_count_key is None or row.group_kept_key is None:
        return None
    count, kept = config.get(row.group_count_key, default=1), config.get(row.group_kept_key, default=1)
    if count == kept:
        return None  # every group is kept: the mask masks nothing
    return {"count": count, "kept": kept, "score": "top_sum", "top": row.group_top, "mask_value": "-inf"}


def _model_dtype(config: "_Config") -> str:
    for name in ("dtype", "torch_dtype"):
        value = config.get(name, default=None)
        if value is not None:
            return str(value).removeprefix("torch.")
    raise ValueError("the config names no dtype (neither 'dtype' nor 'torch_dtype'): pass dtype=torch.bfloat16, say")


class _Config:
    """One way to read a config.json mapping and a config object."""

    def __init__(self, hf_config: object) -> None:
        self._config = hf_config

    def get(self, name: str, *, default: object) -> object:
        if isinstance(self._config, Mapping):
            found = self._config.get(name, default)
        else:
            found = getattr(self._config, name, default)
        return default if found is None else found

    def required(self, name: str) -> object:
        found = self.get(name, default=None)
        if found is None:
            raise ValueError(f"the config has no {name!r}")
        return found

    def agreed(self, names: tuple[str, ...]) -> object:
        found = {name: value for name in names if (value := self.get(name, default=None)) is not None}
        if len(set(found.values())) != 1:
            what = "disagrees with itself" if found else f"has none of {', '.join(names)}"
            raise ValueError(f"the config {what}: {found}")
        return next(iter(found.values()))
