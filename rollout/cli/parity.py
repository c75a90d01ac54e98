"""moe-rollout parity: whether a router has a trainer's bits on this machine, operation by operation, by trying it."""

import argparse
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from rollout.cli.terminal import say, show, show_table
from rollout.errors import ConfigError
from rollout.gate_weight import find_gate_weight
from rollout.model.checkpoint import read_config
from routing import RouterSpec, TopkReduce
from routing.gate_parity import drawn_weight, gate_row
from routing.parity import ParityRefused, ParityReport, ParityRow, examine
from routing.trainers import trainer_named
from routing.verdict import Verdict

COLUMNS = ("operation", "expected", "found", "bits")
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
COMPILED = (
    "what torch.compile makes of a router adds, divides and takes exponentials otherwise; let the router run eagerly"
)
NAME = "parity"
SUMMARY = "try a trainer's router on this machine, and say which operations have its bits"
DESCRIPTION = """\
Routes probe rows along the path that a host serves with and by the trainer's own operations in eager PyTorch, on this
machine's GPU or, without one, on its CPU, and compares every bit. Nothing is started and no weights are needed: of the
model only config.json is read, and a gate's weights where there are any.

  equal        every bit of every row tried is the trainer's
  unproved     they may be equal; nothing here can show it, and the note says why
  impossible   they differ, and the note says why

Exit status 1 where something that was tried differs from the trainer's."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Options of this command."""
    parser.add_argument("--trainer", required=True, metavar="NAME", help="whose router, as in a configuration")
    parser.add_argument("--model", required=True, metavar="FOLDER", help="a checkpoint; its config.json will do")
    parser.add_argument("--dtype", choices=DTYPES, help="of the model in the trainer; the checkpoint's unless said")
    parser.add_argument(
        "--gate", choices=("fp32", "trainer"), default="fp32", help="as in a configuration; fp32 unless said"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="where to try it; the GPU where there is one")
    parser.add_argument(
        "--reduce", metavar="MODULE:FUNCTION", help="a reduce function in place of the trainer's; see topk_reduce_func"
    )
    parser.add_argument("--compiled", action="store_true", help="the trainer compiles its router (torch.compile)")
    parser.add_argument("--exhaustive", action="store_true", help="exponentials on all 2^32 numbers; some seconds more")
    parser.add_argument("--plain", action="store_true", help="lines of fields with tabs between, in place of a table")


def run(arguments: argparse.Namespace) -> int:
    """Shows everything; a mismatch comes last, as an error."""
    device = _device(arguments.device)
    config = _config(arguments.model)
    spec, trainers = (_spec(arguments, config, device, gate) for gate in (arguments.gate, "trainer"))
    unproved = COMPILED if arguments.compiled else trainer_named(arguments.trainer).unproved
    report = examine(spec, device, stages=True, exhaustive=arguments.exhaustive)
    gate = _gate(Path(arguments.model), config, spec, trainers, device)
    rows = [_vouched(row, unproved) for row in (gate, *report.rows)]
    if arguments.plain:
        show("\t".join((*COLUMNS, "why")))
        for row in rows:
            show("\t".join((*_cells(row), row.why)))
    else:
        show_table(_title(arguments, report), COLUMNS, [_cells(row) for row in rows])
        for note in _notes(rows):
            show(f"note: {note}")
    if device.type == "cpu":
        say("note: CUDA was not asked: this is what the CPU computes, and a GPU adds, ranks and ties in other orders")
    if report.refusal is not None:
        raise ParityRefused(report.refusal)
    if gate.is_mismatch:
        raise ParityRefused(f"{gate.operation}: expected {gate.expected}; found {gate.found}")
    return 0


def _device(named: str | None) -> torch.device:
    if named == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda, but PyTorch sees no GPU here; leave it out to ask the CPU")
    return torch.device(named if named is not None else "cuda" if torch.cuda.is_available() else "cpu")


def _config(folder: str) -> Mapping[str, Any]:
    if not Path(folder).is_dir():
        raise ConfigError(f"--model: there is no folder {folder}; give one that holds a config.json")
    return read_config(folder)


def _spec(arguments: argparse.Namespace, config: Mapping[str, Any], device: torch.device, gate: Any) -> RouterSpec:
    spec = RouterSpec.from_trainer(
        arguments.trainer,
        config,
        dtype=None if arguments.dtype is None else DTYPES[arguments.dtype],
        platform="cuda" if device.type == "cuda" else "cpu",
        gate=gate,
    )
    return spec if arguments.reduce is None else replace(spec, reduce=TopkReduce.of(arguments.reduce))


def _gate(
    folder: Path, config: Mapping[str, Any], spec: RouterSpec, trainers: RouterSpec, device: torch.device
) -> ParityRow:
    found = find_gate_weight(folder, spec.num_experts)
    if found is None:
        hidden = config.get("hidden_size", (config.get("text_config") or {}).get("hidden_size", 2048))
        whose, weight_ED = "random weights", drawn_weight(spec.num_experts, hidden, device)
    else:
        whose, weight_ED = found[0], found[1].to(device)
    bias_E = weight_ED[:, 0].clone() if spec.gate.has_bias else None
    return gate_row(spec.gate, trainers.gate, weight_ED, whose, bias_E)


def _vouched(row: ParityRow, unproved: str | None) -> ParityRow:
    """What was measured with PyTorch says nothing of a trainer that runs on something else."""
    if unproved is None or row.verdict is not Verdict.EQUAL:
        return row
    return replace(row, verdict=Verdict.UNPROVED, why=unproved)


def _cells(row: ParityRow) -> tuple[str, str, str, str]:
    return str(row.operation), row.expected, row.found, str(row.verdict)


def _title(arguments: argparse.Namespace, report: ParityReport) -> str:
    orders = report.orders
    return f"{arguments.trainer}, {arguments.model}, on {orders.device} with PyTorch {orders.release}"


def _notes(rows: Iterable[ParityRow]) -> list[str]:
    """Why, once for all operations of which the same is said; what is said of most comes first."""
    operations: dict[str, list[str]] = {}
    for row in rows:
        operations.setdefault(row.why, []).append(str(row.operation))
    first, *others = sorted(operations, key=lambda why: -len(operations[why]))
    return [first, *(f"{', '.join(operations[why])}: {why}" for why in others)]
