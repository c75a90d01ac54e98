"""moe-rollout check: what a configuration will run, and what may be promised about its bits."""

import argparse
import os

from rollout.arrivals import keeps_shadow
from rollout.cli.memory import HostMemory, Room, host_memory, refuse_shortage, room
from rollout.cli.terminal import amount, show, show_json, show_table
from rollout.config import RolloutConfig
from rollout.model.storage import parameter_count
from rollout.prospect import Prospect, prospect_of
from rollout.statement import Row, first_moe, statement
from routing import GateSpec, ReduceKind, RouterSpec

NAME = "check"
SUMMARY = "say what a configuration will run, and start nothing"
DESCRIPTION = """\
Reads a configuration and the headers of its checkpoint, and says what `launch` would run: model, memory, routing, and
for each operation whether its bits are the trainer's.

  equal        the trainer's bits, given the trainer's input
  unproved     they may be equal; nothing here shows it
  impossible   they differ, or follow the batch, and why

Exit status 1 where the fleet could not be launched here."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("config", metavar="CONFIG", help="a YAML file, see rollout.config.RolloutConfig")
    parser.add_argument("--json", action="store_true", help="one line of JSON in place of tables")


def run(arguments: argparse.Namespace) -> int:
    """Shows everything; the memory's verdict comes last, as an error."""
    prospect = prospect_of(RolloutConfig.from_yaml(arguments.config), os.environ)
    config, spec = prospect.config, prospect.spec
    need, found = host_memory(config, spec), room(config, prospect.platform)
    rows = statement(config, spec, prospect.trainers, prospect.platform)
    facts = facts_of(prospect, need, found)
    if arguments.json:
        operations = [{"operation": row.operation, "bits": str(row.verdict), "why": row.why} for row in rows]
        show_json({"fleet": config.name, "facts": facts, "operations": operations, "hints": list(prospect.hints)})
    else:
        show_table(f"fleet {config.name}", ("", ""), list(facts.items()))
        show("")
        show_table(premise(prospect), ("operation", "bits", "why"), [_cells(row) for row in rows])
        for hint in prospect.hints:
            show(f"note: {hint}")
    refuse_shortage(config, need, found)
    return 0


def facts_of(prospect: Prospect, need: HostMemory, found: Room) -> dict[str, str]:
    """What will run, line by line."""
    config, spec, moe = prospect.config, prospect.spec, first_moe(prospect.spec)
    engine = config.engine
    facts = {
        "checkpoint": f"{config.model} ({amount(prospect.checkpoint_bytes)})",
        "model": f"{spec.architecture}, {len(spec.layers)} layers, {parameter_count(spec):,} parameters, "
        f"{_dtype(spec.dtype)}, {spec.context_length} positions",
        "hosts": f"{config.hosts} on {prospect.platform}",
        "memory per host": f"{amount(need.total)}: {amount(need.parameters)} of parameters, {amount(need.kv_cache)} of "
        f"KV cache ({engine.blocks} blocks of {engine.block_size} tokens)",
        "memory found": f"{amount(found.bytes)} free {found.where}, for {found.hosts} of the hosts",
        "weight updates": _updates(config, need),
        "RL mode": "on" if config.rl_mode else "off",
    }
    if moe is not None:
        facts["router"] = _router(config, moe.router)
        facts["gate"] = _gate(moe.router.gate)
        facts["reduce function"] = _reduce(moe.router)
    return facts


def premise(prospect: Prospect) -> str:
    """What the statement takes for granted."""
    trainer = prospect.config.trainer if isinstance(prospect.config.trainer, str) else "the trainer"
    return (
        f"bits compared with {trainer}: eager PyTorch of the same release on {prospect.platform}, "
        f"model in {_dtype(prospect.spec.dtype)}"
    )


def _cells(row: Row) -> tuple[str, str, str]:
    return row.operation, str(row.verdict), row.why


def _updates(config: RolloutConfig, need: HostMemory) -> str:
    if config.weights.transport is None:
        return "none (weights.transport is null)"
    where = f", steps in {config.weights.folder}" if config.weights.folder is not None else ""
    return (
        f"{config.weights.transport}{where}; {_staging(config, need)}; "
        f"running requests: {config.weights.requests_in_flight}"
    )


def _staging(config: RolloutConfig, need: HostMemory) -> str:
    """What an update takes while it is under way, and what a host does whose learner dies in its commit."""
    buckets = f"two buckets of {config.weights.bucket_mib} MiB"
    if config.weights.transport == "cuda_ipc":
        return f"read from the learner's device memory, or through {buckets} there; a learner lost in a commit: torn"
    if config.weights.transport != "nccl":
        return f"one in flight holds about {amount(need.parameters)} more of this machine's memory"
    if keeps_shadow(config, need.parameters):
        each = amount(need.parameters)
        return f"a full second copy in this machine's memory ({each} per host) and {buckets} at each end"
    return f"written in place as it comes, {buckets} at each end; a learner lost in a commit: torn"


def _router(config: RolloutConfig, router: RouterSpec) -> str:
    whose = f"as {config.trainer}" if isinstance(config.trainer, str) else "as spelled out"
    return (
        f"{whose}: {router.top_k} of {router.num_experts} experts by {router.score}"
        f"{' with a bias' if router.has_bias else ''}; digest {router.digest[:8]}"
    )


def _gate(gate: GateSpec) -> str:
    bias = ", with a bias" if gate.has_bias else ""
    return f"{_dtype(gate.operand_dtype)} operands, {_dtype(gate.output_dtype)} logits{bias}"


def _reduce(router: RouterSpec) -> str:
    scale = "" if router.scale is None else f", then times {router.scale:g}"
    if router.reduce.kind is ReduceKind.CALLABLE:
        return f"{router.reduce.path}, digest {str(router.reduce.digest)[:8]}{scale}"
    eps = "" if router.reduce.eps is None else f" {router.reduce.eps:g}"
    return f"{router.reduce.kind}{eps}{scale}"


def _dtype(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
