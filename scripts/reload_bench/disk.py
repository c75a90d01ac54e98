"""Reads safetensors files into tensors that are on a device already: seconds, beside what the bus can do.

    python scripts/reload_bench/disk.py /dev/shm/reload --make-gib 24 --threads 8 16 --slice-mib 4 8 16

Makes the files if it is asked to (experts of Qwen3-30B-A3B), reads them with each setting, compares some tensors with
the files, and prints GB/s and the share of a plain copy out of page-locked memory. On a CPU it reads without a bus.
"""

import argparse
import json
import os
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from weights.disk.opened import OpenFolder  # noqa: E402
from weights.disk.reading import read_into  # noqa: E402
from weights.parallel_reader import ParallelReader  # noqa: E402

EXPERT = {"down_proj": (2048, 768), "gate_proj": (768, 2048), "up_proj": (768, 2048)}
EXPERT_BYTES = 3 * 2048 * 768 * 2
EXPERTS_PER_FILE = 400
BUS_BYTES = 2 << 30


@dataclass(frozen=True, kw_only=True)
class DiskTimes:
    """How long it took to read all files once."""

    threads: int
    slice_bytes: int
    first_s: float
    """With buffers to be made, and headers to be parsed."""
    seconds: float
    """The best of the later ones."""
    bytes: int
    gigabytes_per_s: float
    share_of_bus: float | None
    """Of `bus_gigabytes_per_s`; None without one."""


def make_files(folder: Path, total_bytes: int, writers: int = 8) -> None:
    """Writes files of about so many bytes, each tensor with bytes of its own, by several threads."""
    folder.mkdir(parents=True, exist_ok=True)
    experts = max(1, total_bytes // EXPERT_BYTES)
    noise = torch.randint(0, 256, (2 * EXPERT_BYTES,), dtype=torch.uint8).numpy().data
    jobs = [(first, min(EXPERTS_PER_FILE, experts - first)) for first in range(0, experts, EXPERTS_PER_FILE)]
    lock = threading.Lock()

    def write() -> None:
        while True:
            with lock:
                if not jobs:
                    return
                first, count = jobs.pop()
            with open(folder / f"experts-{first:06d}.safetensors", "wb") as file:
                header = _header(range(first, first + count))
                file.write(len(header).to_bytes(8, "little") + header)
                for expert in range(first, first + count):
                    start = expert * 4098 % EXPERT_BYTES
                    file.write(noise[start : start + EXPERT_BYTES])

    threads = [threading.Thread(target=write) for _ in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def time_reading(
    folder: Path, targets: dict[str, Tensor], *, threads: int, slice_bytes: int, repeats: int, bus: float | None
) -> DiskTimes:
    """Reads all tensors in `folder` into `targets`, by wire name, `repeats` times and once more before.

    bus: GB/s, from `bus_gigabytes_per_s`.
    """
    device = next(iter(targets.values())).device
    reader = ParallelReader(device, threads=threads, slice_bytes=slice_bytes)
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    seconds = []
    for _ in range(1 + repeats):
        began = time.perf_counter()
        with OpenFolder(folder) as opened:
            reading = read_into(opened, files, targets, reader)
        seconds.append(time.perf_counter() - began)  # with opening files and parsing headers
    best = min(seconds[1:])
    rate = reading.bytes / best / 1e9
    return DiskTimes(
        threads=threads,
        slice_bytes=slice_bytes,
        first_s=seconds[0],
        seconds=best,
        bytes=reading.bytes,
        gigabytes_per_s=rate,
        share_of_bus=None if bus is None else rate / bus,
    )


def targets_for(folder: Path, device: torch.device) -> dict[str, Tensor]:
    """An empty tensor for each that the files hold; gate above up of an expert in one, as hosts store them."""
    found: dict[str, Tensor] = {}
    with OpenFolder(folder) as opened:
        for _, stored in opened.stored(sorted(path.name for path in folder.glob("*.safetensors"))):
            if stored.name.endswith("gate_proj.weight"):
                rows, columns = stored.shape
                both = torch.empty(2 * rows, columns, dtype=stored.dtype, device=device)
                found[stored.name], found[stored.name.replace("gate_proj", "up_proj")] = both[:rows], both[rows:]
            elif stored.name not in found:
                found[stored.name] = torch.empty(stored.shape, dtype=stored.dtype, device=device)
    return found


def wrong_tensors(folder: Path, targets: dict[str, Tensor], every: int) -> list[str]:
    """Names of those whose bits are not the file's, among every n-th."""
    wrong = []
    with OpenFolder(folder) as opened:
        files = sorted(path.name for path in folder.glob("*.safetensors"))
        for index, (file, stored) in enumerate(opened.stored(files)):
            if index % every == 0:
                here = targets[stored.name].cpu().view(torch.uint8)
                if not torch.equal(here, file.read(stored).view(torch.uint8)):
                    wrong.append(stored.name)
    return wrong


def bus_gigabytes_per_s(device: torch.device) -> float | None:
    """Of one large copy out of page-locked memory, the best of five; None on a CPU."""
    if device.type == "cpu":
        return None
    source = torch.empty(BUS_BYTES, dtype=torch.uint8, pin_memory=True)
    target = torch.empty(BUS_BYTES, dtype=torch.uint8, device=device)
    rates = []
    for _ in range(6):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        target.copy_(source, non_blocking=True)
        end.record()
        end.synchronize()
        rates.append(BUS_BYTES / begin.elapsed_time(end) / 1e6)
    return max(rates[1:])


def _header(experts: range) -> bytes:
    plain: dict[str, object] = {}
    end = 0
    for expert in experts:
        for part, shape in EXPERT.items():
            size = shape[0] * shape[1] * 2
            name = f"model.layers.{expert // 128}.mlp.experts.{expert % 128}.{part}.weight"
            plain[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
            end += size
    text = json.dumps(plain).encode()
    return text + b" " * (-len(text) % 8)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--make-gib", type=float, help="write files of so many GiB there first")
    parser.add_argument("--threads", type=int, nargs="+", default=[8, 16])
    parser.add_argument("--slice-mib", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(arguments)
    device = torch.device(args.device)
    if args.make_gib is not None:
        began = time.perf_counter()
        make_files(args.folder, int(args.make_gib * (1 << 30)))
        print(f"made {args.make_gib} GiB in {time.perf_counter() - began:.1f} s", flush=True)
    bus = bus_gigabytes_per_s(device)
    targets = targets_for(args.folder, device)
    print(f"{len(targets)} tensors, {os.cpu_count()} cores, bus {bus} GB/s", flush=True)
    for threads in args.threads:
        for mebi in args.slice_mib:
            for target in targets.values():
                target.zero_()
            times = time_reading(
                args.folder, targets, threads=threads, slice_bytes=mebi << 20, repeats=args.repeats, bus=bus
            )
            print(json.dumps(asdict(times)), flush=True)
            wrong = wrong_tensors(args.folder, targets, every=97)
            if wrong:
                print(f"wrong bits in {', '.join(wrong)}")
                return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
