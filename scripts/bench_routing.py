"""The router on this GPU: wrong bits beside the trainers' own code, and microseconds beside vLLM's kernels.

    python scripts/bench_routing.py results/routing.json
    python scripts/bench_routing.py results/routing.json --rival .../vllm/_moe_C_stable_libtorch.abi3.so \
        --rival-version 0.24.0 --megatron .../site-packages

Bits: public models' routers, with fp32 and with bf16 logits, on the rows that routers get wrong and on random ones,
beside eager PyTorch's operations on the same GPU, transformers' own modules and Megatron-Core's function. Speed:
medians under CUDA-graph replay. Needs transformers; takes some minutes, most of them to compile on all cores. The exit
status is 0 only without a wrong bit. On a CPU, --bits compares the reference, with PyTorch's order of summation there.
"""

import argparse
import json
import platform
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]  # the rows that judge are the tests' own

import torch  # noqa: E402
import transformers  # noqa: E402
import triton  # noqa: E402
from routing_bench import models, tables  # noqa: E402
from routing_bench.columns import COLUMNS, KINDS, MORE_COLUMNS  # noqa: E402
from routing_bench.compilation import compile_all, jobs_of  # noqa: E402
from routing_bench.correctness import Correctness, Extent, Findings  # noqa: E402
from routing_bench.report import text  # noqa: E402
from routing_bench.rival import Rival  # noqa: E402
from routing_bench.speed import Floors, Race, Times  # noqa: E402

SIZES = (1, 2, 3, 7, 16, 33, 257, 4096, 65536)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--bits", action="store_true", help="this half only")
    parser.add_argument("--speed", action="store_true", help="this half only")
    parser.add_argument("--rival", type=Path, help="vLLM's compiled library, vllm/_moe_C*.so, for the PyTorch here")
    parser.add_argument("--rival-version", default="unknown", help="the library does not say it")
    parser.add_argument("--megatron", type=Path, help="a folder that holds the package megatron")
    parser.add_argument("--commit", help="of this repository; by default what git says")
    parser.add_argument("--models", nargs="+", help="only those whose name begins like one of these")
    parser.add_argument("--sizes", nargs="+", type=int, default=list(SIZES), help="tokens of the corpus's batches")
    parser.add_argument("--batches", type=int, default=16, help="of random rows, for each router")
    parser.add_argument("--batch-tokens", type=int, default=1 << 20)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    args = parser.parse_args(arguments)
    if not (args.bits or args.speed):
        args.bits = args.speed = True
    if args.device == "cpu" and args.speed:
        parser.error("speed is measured on a GPU: with --device cpu say --bits")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no GPU here: --bits --device cpu compares the reference instead")
    if min(*args.sizes, args.batches, args.batch_tokens) < 1:
        parser.error("--sizes, --batches and --batch-tokens: at least 1 expected")
    try:
        args.models = models.named(args.models)
    except ValueError as error:
        parser.error(f"--models: {error}")
    return args


def main(arguments: list[str]) -> int:
    began = time.monotonic()
    args = parse(arguments)
    device = torch.device(args.device)
    report: dict[str, Any] = {
        "what": "routing: wrong bits beside the trainers' code, and microseconds",
        "device": torch.cuda.get_device_name() if args.device == "cuda" else f"CPU, {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
        },
        "commit": commit() if args.commit is None else args.commit,
    }
    extent = Extent(sizes=args.sizes, batches=args.batches, batch_tokens=args.batch_tokens)
    correctness = Correctness(args.models, device, extent, args.megatron) if args.bits else None
    race = Race(device=device, rival=None if args.rival is None else Rival(args.rival)) if args.speed else None
    report["versions"] |= {} if race is None or race.rival is None else {"vllm": args.rival_version}
    columns = (*COLUMNS, *MORE_COLUMNS)
    if args.device == "cuda":
        jobs = list(correctness.jobs()) if correctness is not None else []
        if race is not None:
            jobs += [job for column in columns for job in jobs_of(column.spec, KINDS[column.way])]
        compiled = compile_all(jobs)
        print(f"{compiled.kernels} kernels compiled in {compiled.seconds:.0f} s", flush=True)
        if compiled.errors:
            print("\n".join(f"{job}: {error}" for job, error in compiled.errors.items()))
            return 2
    lines, is_clean = [], True
    if correctness is not None:
        findings = correctness.run()
        if correctness.megatron_version is not None:
            report["versions"]["megatron-core"] = correctness.megatron_version
        report["bits"] = bits_of(findings, extent)
        is_clean = findings.total.is_clean
        lines += [tables.bits_table(findings), tables.bits_summary(findings)]
        save(report, args.path)
    if race is not None:
        since = time.monotonic()
        times, least = [race.times(column) for column in columns], race.floors()
        print(f"speed: {len(columns)} columns in {time.monotonic() - since:.0f} s", flush=True)
        report["speed"] = speed_of(times, least)
        lines += [tables.speed_table(times), tables.floor_table(times, least), tables.rival_table(times)]
    report["seconds"] = round(time.monotonic() - began, 1)
    save(report, args.path)
    print("\n\n".join(line for line in lines if line))
    print(json.dumps({key: value for key, value in report.items() if key not in ("bits", "speed")}))
    if not is_clean:
        print("WRONG BITS: see the tables", file=sys.stderr)
    return 0 if is_clean else 1


def save(report: dict[str, Any], path: Path) -> None:
    """Also half of it: what is measured is not lost to what comes after."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text(report) + "\n", encoding="utf-8")


def bits_of(findings: Findings, extent: Extent) -> dict[str, Any]:
    """The half about bits, as JSON holds it."""
    return {
        **asdict(findings.total),
        "corpus_batch_tokens": extent.sizes,
        "refused": [model.name for model in models.REFUSED],
        "seconds": findings.seconds,
        "beside": findings.rows,
    }


def speed_of(times: list[Times], least: Floors) -> dict[str, Any]:
    """The half about speed, as JSON holds it."""
    return {
        "unit": "us, median of CUDA-graph replays",
        "columns": [
            {
                "name": each.column.name,
                "way": str(each.column.way),
                "router": each.column.spec.to_plain(),
                **{name: value for name, value in vars(each).items() if name != "column" and value},
            }
            for each in times
        ],
        "floors": asdict(least),
    }


def commit() -> str:
    """Of the checkout that this file is in, and whether anything was changed since; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
