"""How fast a learner's weights reach a host that generates, and what it costs the host: seconds, pause, memory.

    python scripts/bench_reload.py results/reload.json                                    # one GPU, cuda_ipc, 61 GB
    python scripts/bench_reload.py results/reload.json --learner-device 1 --transport nccl --add

A learner with weights only (Qwen3-30B-A3B's shape: 18,867 tensors under checkpoint names) in this process, a host in
another, which generates all the time. Every update is verified by digest on both sides, and at the end some tensors
are compared byte for byte by a hash that the updates do not use. `pause` is from the end of the last step under the old
weights to the start of the first under the new ones; `to new token` from the start of the update to the end of that
step. With --add the rows of an earlier run stay in the file.
"""

import argparse
import json
import multiprocessing
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
import triton  # noqa: E402
from reload_bench import generating_host  # noqa: E402
from reload_bench.memory import Watch  # noqa: E402
from reload_bench.rows import Row, row_of, table  # noqa: E402
from reload_bench.shapes import config_of, learner_tensors, optimizer_step_  # noqa: E402
from routing_bench.report import text  # noqa: E402

from weights.publisher import Publisher  # noqa: E402

NAME = "bench-reload"


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--transport", default="cuda_ipc", choices=("cuda_ipc", "nccl", "shared_memory"))
    parser.add_argument("--shadow", action="store_true", help="nccl: hosts keep a full copy before they vote")
    parser.add_argument("--shape", default="qwen3_30b_a3b")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--updates", type=int, default=20)
    parser.add_argument("--sequences", type=int, default=4, help="that the host generates at a time")
    parser.add_argument("--bucket-mib", type=int, default=1024)
    parser.add_argument("--learner-device", type=int, default=0)
    parser.add_argument("--host-device", type=int, default=0)
    parser.add_argument(
        "--unleased", action="store_true", help="cuda_ipc: through buckets, as for memory without handle"
    )
    parser.add_argument("--commit", help="of this repository; by default what git says")
    parser.add_argument("--add", action="store_true", help="keep the rows that the file has")
    args = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.error("no GPU here")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    report = report_of(args)
    row = measure(args) | {"commit": report["commit"]}
    report["rows"].append(row)
    args.path.parent.mkdir(parents=True, exist_ok=True)
    args.path.write_text(text(report) + "\n", encoding="utf-8")
    print(table(report["rows"]))
    return 0 if row["wrong_tensors"] == 0 and row["verified"] else 1


def measure(args: argparse.Namespace) -> Row:
    """One learner, one host, some updates."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MOE_ROLLOUT_RUNTIME_DIR"] = os.environ.get("MOE_ROLLOUT_RUNTIME_DIR", f"{folder}/run")
        config = config_of(args.shape, args.layers)
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        device = torch.device("cuda", args.learner_device)
        torch.cuda.set_device(device)
        tensors = learner_tensors(config, device)
        torch.cuda.synchronize()
        context = multiprocessing.get_context("spawn")
        here, there = context.Pipe()
        fields = fields_of(args, folder)
        process = context.Process(
            target=generating_host.run, args=(fields, "host-0", args.sequences, args.host_device, there), daemon=True
        )
        process.start()
        ready = here.recv()
        print(f"host up after {ready.start_s:.1f} s", flush=True)
        generating_host.list_hosts(fields, [ready])
        try:
            return drive(args, tensors, here)
        finally:
            here.send("stop")
            process.join(20)
            process.kill()


def drive(args: argparse.Namespace, tensors: dict[str, torch.Tensor], host: Any) -> Row:
    reports, starts = [], []
    with Publisher.connect(NAME, run="bench") as publisher, Watch((args.learner_device, args.host_device)) as watch:
        if args.unleased:
            publisher._loader._exporter.around = no_handle  # type: ignore[attr-defined]
        for step in range(1, args.updates + 1):
            optimizer_step_(tensors)
            torch.cuda.synchronize()
            time.sleep(0.3)  # the host runs a few steps under each version
            watch.begin()
            starts.append(time.monotonic())
            reports.append(publisher.publish(tensors, step=step))
            watch.end()
        time.sleep(0.5)
        names = list(tensors)[:: max(1, len(tensors) // 64)]
        host.send(["fingerprint", names])
        found = host.recv()
        wrong = [name for name in names if found[name] != generating_host.fingerprint(tensors[name])]
        host.send("verify")
        version, digest = host.recv()
        host.send("steps")
        steps = host.recv()
    last = reports[-1].version
    return row_of(
        args,
        tensors,
        reports,
        starts,
        steps,
        watch.extra_bytes,
        wrong,
        verified=version == last and digest == last.digest,
    )


def no_handle(address: int, device: torch.device) -> Any:
    """As an allocator whose memory cannot be shared."""
    from weights.errors import TransportError

    raise TransportError("asked for by --unleased")


def fields_of(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """The host's configuration."""
    weights: dict[str, Any] = {"transport": args.transport, "bucket_mib": args.bucket_mib}
    if args.transport == "nccl":
        weights["shadow"] = args.shadow
    return {
        "name": NAME,
        "model": folder,
        "load": "random",
        "rl_mode": True,
        "gate": "trainer",
        "device": "cuda",
        "engine": {"max_running": max(args.sequences, 1), "max_context": 2048},
        "weights": weights,
    }


def report_of(args: argparse.Namespace) -> dict[str, Any]:
    """The file as it is, or a new one."""
    report: dict[str, Any] = {
        "what": "hot reload: seconds from a learner's publish to a generating host's next token",
        "device": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "triton": triton.__version__,
        },
        "commit": commit() if args.commit is None else args.commit,
        "rows": [],
    }
    if args.add and args.path.exists():
        report["rows"] = json.loads(args.path.read_text(encoding="utf-8"))["rows"]
    return report


def commit() -> str:
    """Of the checkout that this file is in; "unknown" outside of one."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
