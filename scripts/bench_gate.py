"""The gate on this GPU: microseconds beside PyTorch's own product, and where the two agree in every bit.

python scripts/bench_gate.py results/gate.json --commit $(git rev-parse --short HEAD)

Times are medians under CUDA-graph replay. Ours starts from bf16 hidden states and converts them on the way; PyTorch's
product is given operands converted beforehand. Scratch is what one call of ours takes besides its logits. Last come the
entries of FROM_TOKENS in routing/gate_claims.py. The exit status is 0 only if every row of ours has the same bits at
every number of tokens and in another order.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import triton
from gate_timing import FP32, VARIANTS, Job, compile_all, microseconds, operands
from torch import Tensor
from torch.nn.functional import linear

from routing.gate_claims import gate_claim
from routing.gate_measure import GateMeasurement, measure_gate
from routing.gate_tiles import Arithmetic, tile_for
from routing.kernel_gate import kernel_gate
from routing.plain import dtype_name
from routing.terms import GateSpec

SHAPES = ((128, 2048), (128, 4096), (160, 5120), (256, 7168))
TOKENS = (1, 16, 64, 256, 1024, 8192, 65536)
MEASURED_TOKENS = (1, 2, 7, 16, 33, 64, 128, 256, 333, 512, 1024, 2048, 4096, 8192, 16384, 65536)
FP64_TOKENS = 8192
"""At most, in fp64: more takes seconds."""


def torch_call(gate: GateSpec, hidden_TD: Tensor, weight_ED: Tensor) -> Callable[[], Tensor]:
    """PyTorch's product, operands converted."""
    hidden_TD, weight_ED = hidden_TD.to(gate.operand_dtype), weight_ED.to(gate.operand_dtype)
    if gate.output_dtype == gate.operand_dtype:
        return partial(linear, hidden_TD, weight_ED)
    return partial(torch.mm, hidden_TD, weight_ED.t(), out_dtype=gate.output_dtype)


def timed(gate: GateSpec, E: int, D: int, tokens: Sequence[int]) -> dict[int, tuple[float, float]]:
    """Tokens -> microseconds of ours and of PyTorch's."""
    hidden_TD, weight_ED = operands(gate, max(tokens), E, D)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if gate.tf32 else "highest")
    times = {}
    for T in tokens:
        ours = microseconds(partial(kernel_gate, hidden_TD[:T], weight_ED, gate))
        times[T] = ours, microseconds(torch_call(gate, hidden_TD[:T], weight_ED))
    torch.set_float32_matmul_precision(before)
    return times


def scratch_bytes(gate: GateSpec, E: int, D: int, T: int) -> int:
    """What a call allocates at its peak, besides the logits."""
    hidden_TD, weight_ED = operands(gate, T, E, D)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    logits_TE = kernel_gate(hidden_TD, weight_ED, gate)
    return torch.cuda.max_memory_allocated() - before - logits_TE.nbytes


def claimed(name: str, found: Mapping[tuple[int, int], int | None]) -> str:
    """An entry of FROM_TOKENS: (E, D) -> the tokens from which on every tried batch was equal."""
    gate = VARIANTS[name]
    key = "tf32" if gate.tf32 else dtype_name(gate.operand_dtype), dtype_name(gate.output_dtype)
    return f"    {key}: { {shape: least for shape, least in found.items() if least is not None} },"


def report(
    variant: str,
    E: int,
    D: int,
    times: dict[int, tuple[float, float]],
    scratch: dict[int, int],
    measured: GateMeasurement,
) -> None:
    """One shape of one variant."""
    ours = "  ".join(f"{T}: {us:.1f} ({torch_us:.1f})" for T, (us, torch_us) in times.items())
    other = ", ".join(f"{T}: {part:.2%}" for T, part in measured.differing.items() if part)
    varies = [T for T, part in measured.torch_varies.items() if part]
    print(
        f"{variant:12s} E={E} D={D}\n    us at T, torch's in brackets: {ours}\n"
        f"    scratch MiB: {'  '.join(f'{T}: {taken / 2**20:.1f}' for T, taken in scratch.items())}\n"
        f"    ours is {'the same at every T' if measured.is_invariant else 'NOT INVARIANT'};"
        f" equal to torch's from T={measured.from_tokens}; logits that differ: {other or 'none'}\n"
        f"    torch's own rows are not those of T={max(measured.torch_varies)} at T = {varies or 'none'}",
        flush=True,
    )


def fp64_seen_in_fp32(E: int, D: int, T: int = 8192) -> float:
    """The part of fp64 logits, rounded to fp32 as scores take them, that differ between our product and torch.mm's."""
    gate = VARIANTS["fp64"]
    hidden_TD, weight_ED = operands(gate, T, E, D)
    theirs = torch_call(gate, hidden_TD, weight_ED)()
    return (kernel_gate(hidden_TD, weight_ED, gate).to(FP32) != theirs.to(FP32)).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the numbers go, as JSON")
    parser.add_argument("--commit", default="unknown", help="of this repository")
    parser.add_argument("--only", choices=list(VARIANTS), help="one variant")
    arguments = parser.parse_args()
    variants = {name: gate for name, gate in VARIANTS.items() if arguments.only in (None, name)}
    began = time.monotonic()
    tokens = {name: [T for T in TOKENS if name != "fp64" or T <= FP64_TOKENS] for name in variants}
    measured_tokens = {name: [T for T in MEASURED_TOKENS if max(tokens[name]) >= T] for name in variants}
    jobs = [
        Job(variant=name, tile=tile_for(Arithmetic.of(gate), T), E=E, D=D)
        for name, gate in variants.items()
        for E, D in SHAPES
        for T in {*tokens[name], *measured_tokens[name]}
    ]
    refused = compile_all(jobs)
    assert not refused, refused
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"{len(set(jobs))} kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
    rows: list[dict[str, object]] = []
    claims: dict[str, dict[tuple[int, int], int | None]] = {}
    for name, gate in variants.items():
        for E, D in SHAPES:
            times = timed(gate, E, D, tokens[name])
            _, weight_ED = operands(gate, 1, E, D)
            measured = measure_gate(gate, weight_ED, measured_tokens[name])
            scratch = {T: scratch_bytes(gate, E, D, T) for T in tokens[name]}
            report(name, E, D, times, scratch, measured)
            claims.setdefault(name, {})[E, D] = measured.from_tokens
            rows.append(
                {
                    "variant": name,
                    "experts": E,
                    "hidden": D,
                    "us": {T: us for T, (us, _) in times.items()},
                    "torch_us": {T: us for T, (_, us) in times.items()},
                    "differing": dict(measured.differing),
                    "torch_varies": dict(measured.torch_varies),
                    "equal_from_tokens": measured.from_tokens,
                    "is_invariant": measured.is_invariant,
                    "scratch_bytes": scratch,
                }
            )
    in_fp32 = {f"{E}, {D}": fp64_seen_in_fp32(E, D) for E, D in SHAPES} if "fp64" in variants else {}
    for shape, part in in_fp32.items():
        print(f"fp64 ({shape}): after rounding to fp32, {part:.2e} of logits differ from torch.mm's")
    for name, found in claims.items():
        if gate_claim(VARIANTS[name]).impossible is None:
            print(claimed(name, found).replace("'", '"'))
    document = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": arguments.commit,
        "rows": rows,
        "fp64_differing_in_fp32": in_fp32,
    }
    arguments.path.parent.mkdir(parents=True, exist_ok=True)
    arguments.path.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    sys.exit(0 if all(row["is_invariant"] for row in rows) else 1)


if __name__ == "__main__":
    main()
