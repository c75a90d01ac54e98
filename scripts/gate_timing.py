"""What bench_gate.py and tune_gate.py share: the variants, tensors of a gate's size, a clock, and a parallel compiler.

T tokens, E experts, D hidden.
"""

import multiprocessing
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from routing.gate_tiles import Tile
from routing.kernel_gate import kernel_gate
from routing.terms import GateSpec

BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
VARIANTS: Mapping[str, GateSpec] = {
    "bf16": GateSpec(operand_dtype=BF16, output_dtype=BF16),
    "bf16 to fp32": GateSpec(operand_dtype=BF16),
    "tf32": GateSpec(tf32=True),
    "fp32": GateSpec(),
    "fp64": GateSpec(operand_dtype=FP64, accumulate_dtype=FP64, output_dtype=FP64),
}
HIDDEN_DTYPE = BF16
"""Of activations, whatever the gate."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kernel to compile."""

    variant: str
    tile: Tile
    E: int
    D: int


def weight_dtype(gate: GateSpec) -> torch.dtype:
    """As a host holds the weight of that gate."""
    return BF16 if gate.operand_dtype == BF16 else FP32


def operands(gate: GateSpec, T: int, E: int, D: int, *, seed: int = 0) -> tuple[Tensor, Tensor]:
    """hidden [T, D] and weight [E, D] on the GPU."""
    random = torch.Generator(device="cuda").manual_seed(seed)
    hidden_TD = torch.randn(T, D, generator=random, device="cuda", dtype=HIDDEN_DTYPE)
    weight_ED = torch.randn(E, D, generator=random, device="cuda") * D**-0.5
    return hidden_TD, weight_ED.to(weight_dtype(gate))


def microseconds(call: Callable[[], object], *, least_us: float = 2000.0, replays: int = 5) -> float:
    """Of one call: the median over replays of a CUDA graph that holds as many as fill least_us."""
    call()
    torch.cuda.synchronize()
    count = max(1, min(50, int(least_us / max(1.0, _elapsed(call)))))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(count):
            call()
    graph.replay()
    return statistics.median(_elapsed(graph.replay) for _ in range(replays)) / count


def _elapsed(call: Callable[[], object]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def compile_all(jobs: Iterable[Job]) -> dict[Job, str]:
    """Puts every kernel into Triton's cache on disk, on all cores. Returns those that do not compile, and why."""
    jobs = list(dict.fromkeys(jobs))
    context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    with ProcessPoolExecutor(workers, mp_context=context) as pool:
        errors = pool.map(_compile, jobs, chunksize=max(1, len(jobs) // (4 * workers)))
        return {job: error for job, error in zip(jobs, errors, strict=True) if error is not None}


def _compile(job: Job) -> str | None:
    gate = VARIANTS[job.variant]
    try:
        kernel_gate(*operands(gate, job.tile.tokens, job.E, job.D), gate, tile=job.tile)
        torch.cuda.synchronize()
    except Exception as error:  # a tile too large for the card, or one that the compiler refuses: named, and left out
        return f"{type(error).__name__}: {str(error).splitlines()[-1][:200]}"
    return None
