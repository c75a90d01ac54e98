"""Puts the kernels that a run needs into Triton's cache on disk, on all cores at once."""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from enum import StrEnum

import torch
from certainty_kernel import certain_rows

from routing import RouterSpec, expert_counts, kernel_chosen, kernel_route
from routing.kernel import is_bounded, kernel_constants, launch_shape
from routing_bench.rows import bulk, odd_strides

FEW, MANY = 64, 4096
"""Tokens, on either side of what another shape of the kernel is launched for."""


class Kind(StrEnum):
    """What is compiled for a spec."""

    FEW = "few tokens"
    MANY = "many tokens"
    ODD_FEW = "few tokens at odd strides"
    ODD_MANY = "many tokens at odd strides"
    CHOSEN_FEW = "raw scores of few tokens"
    CHOSEN_MANY = "raw scores of many tokens"
    COUNTED_FEW = "few tokens, with counts"
    COUNTED_MANY = "many tokens, with counts"
    PADDED = "many tokens, with counts and padding"
    DOUBT = "what bounds leave in doubt"


WHOLE = (Kind.FEW, Kind.MANY)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A kernel to compile."""

    spec: RouterSpec
    kind: Kind

    @property
    def kernel(self) -> str:
        """The same for jobs that the compiler cannot tell apart."""
        raw = self.kind in (Kind.CHOSEN_FEW, Kind.CHOSEN_MANY)
        constants = kernel_constants(self.spec, score=str(self.spec.score), is_raw=raw)
        shape = launch_shape(_tokens(self.kind), self.spec, dtype=self.spec.gate.output_dtype)
        variant = "" if self.kind in WHOLE else self.kind
        return f"{variant} {self.spec.gate.output_dtype} {constants} {shape}"

    @property
    def cost(self) -> int:
        """Grows with the compiler's time."""
        return self.spec.num_experts * self.spec.top_k


@dataclass(frozen=True, kw_only=True)
class Compiled:
    """How it went."""

    kernels: int
    seconds: float
    errors: Mapping[Job, str]


def jobs_of(spec: RouterSpec, kinds: Iterable[Kind] = (*WHOLE, Kind.DOUBT)) -> list[Job]:
    """Those that make sense for the spec."""
    return [Job(spec=spec, kind=kind) for kind in kinds if kind is not Kind.DOUBT or is_bounded(spec)]


def compile_all(jobs: Iterable[Job]) -> Compiled:
    """The longest ones first."""
    began = time.monotonic()
    ordered = sorted({job.kernel: job for job in jobs}.values(), key=lambda job: -job.cost)
    context = multiprocessing.get_context("spawn")  # a forked process could not use the GPU
    with ProcessPoolExecutor(min(len(os.sched_getaffinity(0)), len(ordered)), mp_context=context) as pool:
        errors = list(pool.map(_compile, ordered))
    return Compiled(
        kernels=len(ordered),
        seconds=time.monotonic() - began,
        errors={job: error for job, error in zip(ordered, errors, strict=True) if error is not None},
    )


def _compile(job: Job) -> str | None:
    try:
        launch(job.spec, job.kind, torch.device("cuda"))
        torch.cuda.synchronize()
    except Exception as error:  # the edge of a process: named, and the run ends with it
        return f"{type(error).__name__}: {str(error)[-300:]}"
    return None


def launch(spec: RouterSpec, kind: Kind, device: torch.device) -> None:
    """Runs the kernel once."""
    (batch,) = bulk(spec, device, batches=1, tokens=_tokens(kind))
    operands = batch.operands
    if kind is Kind.DOUBT:
        certain_rows(batch.logits_TE, spec, bias_E=batch.bias_E)
        return
    if kind in (Kind.COUNTED_FEW, Kind.COUNTED_MANY, Kind.PADDED):
        operands["counts_E"] = expert_counts(spec.num_experts, device)
    if kind is Kind.PADDED:
        operands["num_tokens"] = torch.tensor(FEW, dtype=torch.int32, device=device)
    call: Callable[..., object] = kernel_chosen if kind in (Kind.CHOSEN_FEW, Kind.CHOSEN_MANY) else kernel_route
    rows = odd_strides(batch.logits_TE).values() if kind in (Kind.ODD_FEW, Kind.ODD_MANY) else [batch.logits_TE]
    for logits_TE in rows:
        call(logits_TE, spec, **operands)


def _tokens(kind: Kind) -> int:
    return FEW if kind in _FEW else MANY


_FEW = (Kind.FEW, Kind.ODD_FEW, Kind.CHOSEN_FEW, Kind.COUNTED_FEW)
