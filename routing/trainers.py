"""What each trainer computes for each model family, as data: see routing.trainer_row and the tables in
routing.trainer_rows.

`preset` turns a row and a checkpoint's config into the plain mapping of a RouterSpec. Another family, or another
trainer, is another row.
"""

from collections.abc import Mapping

from routing.plain import nearest
from routing.trainer_config import CheckpointConfig
from routing.trainer_row import Row, Setting, Trainer
from routing.trainer_rows.megatron import MEGATRON
from routing.trainer_rows.paddle import PADDLE
from routing.trainer_rows.prime_rl import PRIME_RL
from routing.trainer_rows.torchtitan import TORCHTITAN
from routing.trainer_rows.transformers import TRANSFORMERS

TRAINERS: Mapping[str, Trainer] = {
    trainer.name: trainer for trainer in (TRANSFORMERS, *MEGATRON, TORCHTITAN, PRIME_RL, *PADDLE)
}


def trainer_named(name: str) -> Trainer:
    """The trainer of that name; ValueError naming the nearest."""
    if name not in TRAINERS:
        raise ValueError(f"unknown trainer {name!r}; {nearest(name, TRAINERS)}. Or spell a RouterSpec out.")
    return TRAINERS[name]


def row_for(trainer: str, hf_config: object) -> Row:
    """The row for the family of that config (a config.json mapping, or transformers' object).

    ValueError for an unknown trainer or family, and for a family whose router cannot be said, naming the operation.
    """
    known, model_types = trainer_named(trainer), CheckpointConfig(hf_config).model_types
    for model_type in model_types:
        for row in known.rows:
            if model_type in row.model_types:
                return row
        for refusal in known.refusals:
            if model_type in refusal.model_types:
                raise ValueError(
                    f"the router of model_type {model_type!r} under trainer {trainer!r} cannot be said by a RouterSpec:"
                    f" {refusal.why} ({refusal.source})"
                )
    families = ", ".join(sorted(name for row in known.rows for name in row.model_types))
    raise ValueError(
        f"no routing known for model_type {' or '.join(map(repr, model_types))} under trainer {trainer!r};"
        f" known families: {families}. Or spell a RouterSpec out."
    )


def preset(trainer: str, hf_config: object, *, model_dtype: str | None, gate: str) -> dict[str, object]:
    """The plain mapping of a RouterSpec, without its platform.

    `model_dtype` None takes the config's. `gate` is "fp32" (operands and logits in fp32 whatever the trainer does; in
    fp64 if that is what it does) or "trainer". ValueError for what the config leaves open, and for what it asks for and
    the row cannot do.
    """
    if gate not in ("fp32", "trainer"):
        raise ValueError(f"gate={gate!r}; 'fp32' or 'trainer' expected")
    config, row = CheckpointConfig(hf_config), row_for(trainer, hf_config)
    _check_demands(row, config)
    is_widened = gate == "fp32" and row.gate.output != "float64"
    operand, output = ("float32", "float32") if is_widened else (row.gate.operand, row.gate.output)
    dtypes = {"float32": "float32", "float64": "float64"}
    if "model" in (operand, output, row.chain, row.weight):
        dtypes["model"] = model_dtype if model_dtype is not None else config.dtype()
    dtypes["logits"] = dtypes[output]
    top_k = config.value(row.top_k)
    groups = _groups(row, config, top_k)
    return {
        "num_experts": _num_experts(row, config),
        "top_k": top_k,
        "score": row.score,
        "has_bias": _switch(row.bias, config),
        "groups": groups,
        "slot_order": row.slot_order
        if groups is None or row.groups is None
        else row.groups.slot_order or row.slot_order,
        "reduce": _reduce(row, config, top_k),
        "scale": None if row.scale is None else config.value(row.scale),
        "expert_scale": row.expert_scale,
        "chain_dtype": dtypes[row.chain],
        "weight_dtype": dtypes[row.weight],
        "gate": {
            "operand_dtype": dtypes[operand],
            "accumulate_dtype": "float64" if output == "float64" else "float32",
            "output_dtype": dtypes[output],
            "tf32": row.gate.tf32 and not is_widened,
            "has_bias": row.gate.has_bias,
        },
    }


def _check_demands(row: Row, config: CheckpointConfig) -> None:
    faults = []
    for demand in row.demands:
        found = config.value(demand.of)
        if found not in demand.values:
            expected = " or ".join(map(repr, demand.values))
            faults.append(f"{demand.of.names[0]}={found!r} asks for {demand.otherwise}; {expected} expected")
    if faults:
        raise ValueError(f"the router of {row.source} cannot be matched with this config: {'; '.join(faults)}")


def _switch(switch: bool | Setting, config: CheckpointConfig) -> bool:
    return switch if isinstance(switch, bool) else bool(config.value(switch))


def _number(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"the config's {name}: a whole number expected, got {value!r}")
    return value


def _num_experts(row: Row, config: CheckpointConfig) -> int:
    settings = [row.num_experts] if row.extra_experts is None else [row.num_experts, row.extra_experts]
    return sum(_number(setting.names[0], config.value(setting)) for setting in settings)


def _groups(row: Row, config: CheckpointConfig, top_k: object) -> dict[str, object] | None:
    groups = row.groups
    if groups is None or (groups.only_if is not None and config.value(groups.only_if[0]) != groups.only_if[1]):
        return None
    count, kept = (_number(which.names[0], config.value(which)) for which in (groups.count, groups.kept))
    if count == kept:
        return None  # every group is kept: the mask masks nothing
    return {
        "count": count,
        "kept": kept,
        "score": groups.score,
        "top": groups.top if groups.top is not None else _number("number of experts per token", top_k) // kept,
        "mask_value": groups.mask_value,
        "masks_scores": groups.masks_scores,
    }


def _reduce(row: Row, config: CheckpointConfig, top_k: object) -> dict[str, object]:
    if not _switch(row.normalise, config) or (top_k == 1 and not row.normalises_one):
        return {"kind": "none"}
    return {name: config.value(value) if isinstance(value, Setting) else value for name, value in row.reduce.items()}
