"""Faults in the middle of updates on GPUs: every cell of the table, what the hosts held after it, and a long run.

    python scripts/gpu_faults.py results/reload_faults.json --transport cuda_ipc     # one GPU: two hosts and a learner
    python scripts/gpu_faults.py results/reload_faults.json --transport nccl --add   # two GPUs or more, one a process
    python scripts/gpu_faults.py results/reload_faults.json --updates 500 --add      # updates in a row, and no faults

The exit status is 0 only if every promise was kept. Without a GPU, or with --cpu, the same cells run between CPUs,
with gloo for NCCL and shared files for CUDA's handles. With --add the rows of earlier runs stay in the file, but for
those of the same transport.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch  # noqa: E402
from ordeal.gpu.campaign import Found, run_cells  # noqa: E402
from ordeal.gpu.model import ON_CPU, ON_GPU  # noqa: E402
from ordeal.gpu.steady import Steady, run_steady  # noqa: E402
from ordeal.gpu.table import Kind, chosen  # noqa: E402
from ordeal.gpu.terms import Terms  # noqa: E402

LANES = {"cuda_ipc": 3, "nccl": 1}
"""Fleets at a time. Wires of several would share the same two GPUs, and their deadlines measure each other."""


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the rows go, as JSON")
    parser.add_argument("--transport", choices=("cuda_ipc", "nccl"), default="cuda_ipc")
    parser.add_argument("--updates", type=int, help="so many in a row of each kind, instead of the cells; at least 50")
    parser.add_argument("--only", action="append", default=[], help="cells whose name has these words")
    parser.add_argument("--lanes", type=int, help=f"fleets at a time (default {LANES})")
    parser.add_argument("--hosts", type=int, default=2, help="in a fleet; nccl takes as many as it has GPUs for")
    parser.add_argument("--message-s", type=float, default=1.5, help="deadline of an answer")
    parser.add_argument("--silence-s", type=float, default=2.0, help="how long a host waits for its learner")
    parser.add_argument("--cpu", action="store_true", help="although there are GPUs")
    parser.add_argument("--peers", action="store_true", help="cuda_ipc: hosts on other GPUs than the learner")
    parser.add_argument("--commit", help="of this repository; by default what git says")
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has")
    parsed = parser.parse_args(arguments)
    if parsed.updates is not None and parsed.updates < 50:
        parser.error(f"tenths of a run are compared: at least 50 updates, got {parsed.updates}")
    parsed.cpu = parsed.cpu or not torch.cuda.device_count()
    if not parsed.cpu and (parsed.transport == "nccl" or parsed.peers) and torch.cuda.device_count() < 2:
        parser.error("this takes a GPU for the learner and others for the hosts, and there is one")
    return parsed


def terms_of(parsed: argparse.Namespace, workspace: str) -> Terms:
    hosts, apart = parsed.hosts, parsed.transport == "nccl" or parsed.peers
    gpus = torch.cuda.device_count()
    if parsed.cpu:
        learner, devices = "cpu", ["cpu"] * hosts
    elif apart:
        hosts = min(hosts, gpus - 1) if parsed.transport == "nccl" else hosts
        learner, devices = "cuda:0", [f"cuda:{1 + index % (gpus - 1)}" for index in range(hosts)]
    else:
        learner, devices = "cuda:0", ["cuda:0"] * hosts
    return Terms(
        fleet="ordeal",
        workspace=workspace,
        transport=parsed.transport,
        hosts=tuple(f"host-{index}" for index in range(hosts)),
        host_devices=tuple(devices),
        learner_device=learner,
        bucket_bytes=(ON_CPU if parsed.cpu else ON_GPU).bucket_bytes,
        message_s=parsed.message_s,
        silence_s=parsed.silence_s,
    )


def main() -> None:
    parsed = parse(sys.argv[1:])
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # multicast between GPUs is of no use to a broadcast to one
    began = time.monotonic()
    cells: list[dict[str, Any]] = []
    updates: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="faults-") as workspace:
        terms = terms_of(parsed, workspace)
        if parsed.updates is None:
            names = [
                cell
                for cell in chosen(parsed.transport, len(terms.hosts))
                if all(words in str(cell) for words in parsed.only)
            ]
            lanes = min(parsed.lanes or LANES[parsed.transport], len(names))
            found, steps = run_cells(terms, names, lanes=lanes, told=tell)
            cells = [cell_row(parsed, terms, result) for result in found]
        else:
            kinds = [kind for kind in Kind if kind.transport == parsed.transport]
            kinds = [kind for kind in kinds if all(words in kind for words in parsed.only)]
            updates = [steady_row(parsed, result) for result in run_steady(terms, kinds, parsed.updates)]
            steps = 0
    seconds = time.monotonic() - began
    broken = [row for row in (*cells, *updates) if not row["kept"]]
    for row in updates:
        print(json.dumps(row))
    if cells:
        print(
            f"{len(cells)} cells in {seconds:.0f} s, {len(broken)} broke a promise; the hosts' steps read "
            f"{steps} versions, each whole"
        )
    write(parsed, cells, updates, seconds)
    sys.exit(1 if broken else 0)


def tell(result: Found) -> None:
    after = "" if result.verdict is None else result.verdict.after
    print(f"{result.seconds:6.2f} s  {result.cell}: {after}  {result.fault or 'kept'}", flush=True)


def cell_row(parsed: argparse.Namespace, terms: Terms, result: Found) -> dict[str, Any]:
    cell, verdict = result.cell, result.verdict
    return {
        **where(parsed),
        "kind": cell.kind.value,
        "hosts": len(terms.hosts),
        "victim": cell.victim,
        "blow": cell.blow,
        "phase": cell.phase,
        "after": None if verdict is None else verdict.after,
        "settled_s": None if verdict is None else round(verdict.seconds, 3),
        "allowed_s": None if verdict is None else verdict.limit_s,
        "kept": result.kept,
        "fault": result.fault,
    }


def steady_row(parsed: argparse.Namespace, result: Steady) -> dict[str, Any]:
    return {
        **where(parsed),
        "kind": result.kind.value,
        "hosts": result.hosts,
        "updates": result.updates,
        "second_tenth": {what: round(value, 6) for what, value in result.early.items()},
        "last_tenth": {what: round(value, 6) for what, value in result.late.items()},
        "grown": result.grown,
        "kept": not result.grown,
    }


def where(parsed: argparse.Namespace) -> dict[str, str]:
    return {"transport": parsed.transport, "device": "CPU" if parsed.cpu else torch.cuda.get_device_name(0)}


def write(
    parsed: argparse.Namespace, cells: list[dict[str, Any]], updates: list[dict[str, Any]], seconds: float
) -> None:
    """One file: what was measured now takes the place of the same part of an earlier run."""
    kept: dict[str, Any] = json.loads(parsed.path.read_text()) if parsed.add and parsed.path.exists() else {}
    commit = parsed.commit
    if commit is None:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
        commit = head.stdout.strip()
    here = (parsed.transport, "CPU" if parsed.cpu else torch.cuda.get_device_name(0))

    def merged(part: str, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        before = kept.get(part, [])
        return [row for row in before if not rows or (row["transport"], row["device"]) != here] + rows

    text = json.dumps(
        {
            "made_by": "scripts/gpu_faults.py",
            "commit": commit,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "deadlines_s": {"message": parsed.message_s, "silence": parsed.silence_s},
            "seconds": round(seconds, 1),
            "cells": merged("cells", cells),
            "updates": merged("updates", updates),
        },
        indent=1,
    )
    parsed.path.parent.mkdir(parents=True, exist_ok=True)
    parsed.path.write_text(text + "\n")


if __name__ == "__main__":
    main()
