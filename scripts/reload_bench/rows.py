"""From what was timed to a row of results, and a table of rows."""

import argparse
from collections.abc import Sequence
from itertools import pairwise
from statistics import median
from typing import Any

import torch

from reload_bench.generating_host import Step
from weights.report import PublishReport

Row = dict[str, Any]


def row_of(
    args: argparse.Namespace,
    tensors: dict[str, torch.Tensor],
    reports: Sequence[PublishReport],
    starts: Sequence[float],
    steps: Sequence[Step],
    extra_bytes: Sequence[int],
    wrong: Sequence[str],
    *,
    verified: bool,
) -> Row:
    """Seconds are lists of one value per update; the first update opens and agrees on everything."""
    changes = {after.version: (before, after) for before, after in pairwise(steps) if before.version != after.version}
    taken = [changes.get(report.version.step) for report in reports]
    hosts = [next(iter(report.hosts.values())) for report in reports]
    bytes_ = reports[0].bytes
    seconds = [report.seconds for report in reports]
    return {
        "transport": args.transport
        + (" through buckets" if args.unleased else "")
        + (" shadow" if args.shadow else ""),
        "devices": "one GPU" if args.learner_device == args.host_device else "two GPUs",
        "shape": args.shape,
        "layers": args.layers,
        "tensors": len(tensors),
        "bytes": bytes_,
        "updates": len(reports),
        "sequences": args.sequences,
        "bucket_mib": args.bucket_mib,
        "seconds": rounded(seconds),
        "pause_s": rounded(report.pause_s for report in hosts),
        "copy_s": rounded(report.copy_s for report in hosts),
        "verify_s": rounded(report.verify_s for report in hosts),
        "phases_s": {phase: rounded(report.phases[phase] for report in reports) for phase in reports[0].phases},
        "between_steps_s": rounded(each[1].began_s - each[0].ended_s for each in taken if each is not None),
        "to_new_token_s": rounded(
            each[1].ended_s - start for each, start in zip(taken, starts, strict=True) if each is not None
        ),
        "step_s": rounded([median(step.ended_s - step.began_s for step in steps)])[0] if steps else None,
        "extra_device_bytes": max(extra_bytes),
        "extra_device_bytes_later": max(extra_bytes[1:], default=0),
        "gb_per_s": round(bytes_ / 1e9 / median(seconds[1:] or seconds), 1),
        "wrong_tensors": len(wrong),
        "verified": verified,
    }


def rounded(values: Any) -> list[float]:
    """To 0.1 ms."""
    return [round(value, 4) for value in values]


def table(rows: Sequence[Row]) -> str:
    """Medians without the first update, and the worst in brackets."""
    head = f"{'transport':<26}{'GB':>7}{'total s':>16}{'pause s':>16}{'to new token s':>18}{'GB/s':>8}{'extra MiB':>11}"
    lines = [head]
    for row in rows:
        lines.append(
            f"{row['transport'] + ', ' + row['devices']:<26}{row['bytes'] / 1e9:>7.1f}{_pair(row['seconds']):>16}"
            f"{_pair(row['between_steps_s']):>16}{_pair(row['to_new_token_s']):>18}{row['gb_per_s']:>8}"
            f"{row['extra_device_bytes'] / 2**20:>11.0f}"
        )
        phases = ", ".join(f"{phase} {median(values[1:] or values):.3f}" for phase, values in row["phases_s"].items())
        inside = ", ".join(f"{name} {median(row[f'{name}_s']):.4f}" for name in ("pause", "copy", "verify"))
        lines.append(f"    first {row['seconds'][0]:.2f} s; phases {phases}; host {inside}; step {row['step_s']}")
    return "\n".join(lines)


def _pair(values: Sequence[float]) -> str:
    kept = values[1:] or values
    return f"{median(kept):.3f} ({max(kept):.3f})" if kept else "-"
