"""Times the gate's tiles on this GPU and prints the table for routing/gate_tiles.py.

python scripts/tune_gate.py tiles.json; --only fp32 for one kind of arithmetic. Every tile's logits are compared bit for
bit with the first one's: a tile that differs is named, and the run fails.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import torch
from gate_timing import VARIANTS, Job, compile_all, microseconds, operands
from torch.nn.functional import linear

from routing.bits import differs
from routing.gate_tiles import Arithmetic, Tile, Walk
from routing.kernel_gate import kernel_gate

SHAPES = ((128, 2048), (160, 5120), (256, 7168))
TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384, 65536)
VARIANT = {Arithmetic.HALF: "bf16", Arithmetic.TF32: "tf32", Arithmetic.FP32: "fp32", Arithmetic.FP64: "fp64"}
SHARED_MEMORY = 220 * 1024
TOLERANCE = 1.03
"""A row's tile serves the next row too, where it is at most this much slower."""


def candidates(arithmetic: Arithmetic, T: int) -> Iterator[Tile]:
    """Those worth timing for so many tokens."""
    match arithmetic:
        case Arithmetic.HALF:
            yield from _whole(_half(T), size=2)
        case Arithmetic.TF32:
            yield from _whole(_tf32(T), size=4)
        case Arithmetic.FP32:
            yield from _fp32(T)
        case Arithmetic.FP64:
            yield from _whole(_fp64(T), size=8)


Launch = tuple[int, int, int, int, tuple[int, ...]]
"""Tokens, experts, depth, warps; stages."""


def _whole(launches: Iterable[Launch], size: int) -> Iterator[Tile]:
    """size: bytes of an operand."""
    for tokens, experts, depth, warps, several in launches:
        for stages in several:
            if stages * (tokens + experts) * depth * size <= SHARED_MEMORY:
                yield Tile(tokens=tokens, experts=experts, depth=depth, warps=warps, stages=stages)


def _half(T: int) -> Iterator[Launch]:
    """A logit is a chain of D / 16 instructions, each waiting for the last: few tokens want little between them."""
    if T <= 256:
        for experts, depth, warps in (
            (8, 128, 2), (8, 256, 1), (8, 256, 2), (8, 512, 1), (8, 512, 2), (16, 128, 2), (16, 128, 4), (16, 256, 2),
            (16, 256, 4), (16, 512, 4), (32, 128, 4), (32, 256, 4),
        ):  # fmt: skip
            yield 16, experts, depth, warps, (3, 5)
    if 64 <= T <= 4096:
        yield from ((32, experts, depth, 4, (3, 5)) for experts in (16, 32) for depth in (128, 256))
    if 64 <= T <= 16384:
        yield from ((64, experts, depth, 4, (3, 5)) for experts in (16, 32, 64) for depth in (64, 128, 256))
    if T >= 1024:
        yield from ((128, experts, 64, warps, (3, 4)) for experts in (32, 64, 128) for warps in (4, 8))
        yield from (
            (64, 128, 64, 4, (3, 5)),
            (64, 256, 64, 8, (3, 5)),
            (128, 128, 64, 8, (5,)),
            (128, 256, 64, 8, (3, 4)),
        )


def _tf32(T: int) -> Iterator[Launch]:
    """All of them on the instruction that Tile.check asks for."""
    if T <= 16384:
        yield from ((64, experts, depth, 4, (3, 5)) for experts in (16, 32, 64) for depth in (32, 64, 128))
        yield from ((64, experts, 256, 4, (2, 3)) for experts in (16, 32))
    if T >= 1024:
        yield from ((128, experts, 32, warps, (3, 5)) for experts in (32, 64, 128) for warps in (4, 8))
        yield from (
            (64, 128, 32, 4, (3, 5)),
            (64, 256, 32, 8, (3, 5)),
            (128, 256, 32, 8, (3, 4)),
            (128, 64, 64, 8, (3,)),
        )


def _fp64(T: int) -> Iterator[Launch]:
    if T <= 1024:
        yield from ((16, 8, 64, 1, (3,)), (16, 8, 128, 1, (3, 4)), (16, 16, 64, 2, (3,)), (16, 16, 128, 2, (3, 4)))
    if T >= 64:
        yield from ((16, 32, 32, 2, (3,)), (32, 32, 32, 4, (3,)))
    if T >= 1024:
        yield from ((64, 64, 16, 4, (3, 4)), (32, 64, 16, 4, (3,)), (64, 32, 32, 4, (3,)))


def _fp32(T: int) -> Iterator[Tile]:
    if T <= 4:
        for depth, stages in ((4, 16), (8, 8), (16, 3), (16, 4), (16, 8)):
            yield Tile(walk=Walk.LANES, depth=depth, warps=1, stages=stages)
    chunks = partial(Tile, walk=Walk.CHUNKS)
    if T <= 64:
        for tokens, experts, depth, warps in ((16, 16, 64, 2), (16, 32, 32, 2), (16, 32, 64, 2), (64, 64, 64, 4)):
            yield chunks(tokens=tokens, experts=experts, depth=depth, warps=warps, stages=3)
    if T <= 1024:  # shared memory serves 16 logits and more a thread about as fast as they multiply, fewer it does not
        for tokens, experts, depth, warps in (
            (16, 32, 32, 1), (16, 32, 64, 1), (16, 32, 64, 2), (16, 64, 32, 2), (16, 64, 64, 2), (32, 32, 32, 2),
            (32, 32, 64, 2), (32, 32, 64, 4), (32, 64, 32, 4), (32, 64, 64, 4), (64, 64, 32, 4),
        ):  # fmt: skip
            if tokens <= max(16, T):
                for stages in (2, 3):
                    yield chunks(
                        tokens=tokens, experts=experts, depth=depth, is_transposed=True, warps=warps, stages=stages
                    )
    if T >= 256:
        for tokens, experts, depth, warps, stages in (
            (32, 32, 32, 4, 3), (32, 64, 32, 4, 2), (32, 64, 32, 4, 3), (32, 64, 16, 4, 3), (64, 64, 16, 4, 3),
            (64, 64, 32, 4, 2), (64, 64, 32, 4, 3), (64, 128, 16, 8, 3), (64, 128, 32, 8, 2), (64, 128, 32, 8, 3),
            (128, 64, 16, 8, 3), (128, 64, 16, 8, 4), (128, 64, 32, 8, 3), (128, 128, 16, 8, 3),
        ):  # fmt: skip
            yield Tile(tokens=tokens, experts=experts, depth=depth, is_transposed=True, warps=warps, stages=stages)


def timed(arithmetic: Arithmetic, refused: set[Job]) -> tuple[dict[int, dict[Tile, list[float]]], list[str]]:
    """Tokens -> tile -> microseconds per shape; and what differed."""
    variant = VARIANT[arithmetic]
    gate = VARIANTS[variant]
    times: dict[int, dict[Tile, list[float]]] = {T: {} for T in TOKENS}
    faults = []
    for E, D in SHAPES:
        hidden_TD, weight_ED = operands(gate, max(TOKENS), E, D)
        for T in TOKENS:
            expected = None
            for tile in candidates(arithmetic, T):
                if Job(variant=variant, tile=tile, E=E, D=D) in refused:
                    continue
                found = kernel_gate(hidden_TD[:T], weight_ED, gate, tile=tile)
                expected = found if expected is None else expected
                if (share := differs(found, expected).double().mean().item()) > 0:
                    faults.append(f"{variant} E={E} D={D} T={T}: {share:.2%} differ with {_text(tile)}")
                call = partial(kernel_gate, hidden_TD[:T], weight_ED, gate, tile=tile)
                times[T].setdefault(tile, []).append(microseconds(call, least_us=400.0, replays=3))
    for T in TOKENS:  # a tile that some shape refuses is no row of a table for all
        times[T] = {tile: found for tile, found in times[T].items() if len(found) == len(SHAPES)}
    return times, faults


def chosen(times: dict[int, dict[Tile, list[float]]]) -> dict[int, Tile]:
    """Tokens -> the tile with the least product of slowdowns over the shapes; prints its times, and the best there."""
    print(f"  us for (E, D) = {', '.join(map(str, SHAPES))}, in brackets the fastest tile's of that shape")
    rows: dict[int, Tile] = {}
    previous: Tile | None = None
    for T, found in times.items():
        best = [min(us[shape] for us in found.values()) for shape in range(len(SHAPES))]
        cost = {tile: math.prod(map(_over, us, best)) ** (1 / len(best)) for tile, us in found.items()}
        fastest = min(cost, key=lambda tile: cost[tile])
        is_kept = previous in cost and cost[previous] <= TOLERANCE * cost[fastest]
        previous = rows[T] = previous if is_kept and previous is not None else fastest
        us = "  ".join(f"{mine:.2f} ({least:.2f})" for mine, least in zip(found[previous], best, strict=True))
        print(f"  T={T:6d} {us}  {_short(previous)}", flush=True)
    return rows


def _over(us: float, best: float) -> float:
    return us / best


def _short(tile: Tile) -> str:
    kind = f"{tile.walk.value}{' transposed' if tile.is_transposed else ''}"
    return f"{kind} {tile.tokens}x{tile.experts}x{tile.depth} w{tile.warps} s{tile.stages}"


def _text(tile: Tile) -> str:
    """As Python."""
    walk = "" if tile.walk is Walk.WHOLE else f"walk=Walk.{tile.walk.name}, "
    block = "" if tile.walk is Walk.LANES else f"tokens={tile.tokens}, experts={tile.experts}, "
    transposed = "is_transposed=True, " if tile.is_transposed else ""
    return f"Tile({walk}{block}depth={tile.depth}, {transposed}warps={tile.warps}, stages={tile.stages})"


def table(arithmetic: Arithmetic, rows: dict[int, Tile]) -> str:
    """The entry of TILES: a row reaches half way, by ratio, to the next number of tokens."""
    lines = []
    tokens = list(rows)
    for index, T in enumerate(tokens):
        is_last = index + 1 == len(tokens)
        if not is_last and rows[tokens[index + 1]] == rows[T]:
            continue
        up_to = None if is_last else int(math.sqrt(T * tokens[index + 1]))
        lines.append(f"        _Row(up_to={up_to}, tile={_text(rows[T])}),")
    return "\n".join((f"    Arithmetic.{arithmetic.name}: (", *lines, "    ),"))


def tf32_rounding() -> list[str]:
    """How PyTorch's TF32 product takes fp32 operands: ours rounds them, ties to even; or they are treated before."""
    gate = VARIANTS["tf32"]
    lines = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    for E, D in SHAPES[:2]:
        for T in (1, 16, 64, 256, 512, 1024, 2048, 8192):
            random = torch.Generator(device="cuda").manual_seed(T)
            hidden_TD = torch.randn(T, D, generator=random, device="cuda")
            weight_ED = torch.randn(E, D, generator=random, device="cuda") * D**-0.5
            theirs = linear(hidden_TD, weight_ED)
            treatments = {"as they are": (0, 0), "cut": (0, -8192), "rounded, ties away": (4096, -8192)}
            for name, (added, mask) in treatments.items():
                pair = [hidden_TD, weight_ED]
                if mask:
                    pair = [((x.view(torch.int32) + added) & mask).view(torch.float32) for x in pair]
                share = differs(kernel_gate(pair[0], pair[1], gate), theirs).double().mean().item()
                lines.append(f"TF32 E={E} D={D} T={T}: operands {name}: {share:.3%} of logits differ from torch's")
    torch.set_float32_matmul_precision(before)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="where the times go, as JSON")
    parser.add_argument("--only", choices=[kind.value for kind in Arithmetic], help="one kind of arithmetic")
    arguments = parser.parse_args()
    kinds = [kind for kind in Arithmetic if arguments.only in (None, kind.value)]
    began = time.monotonic()
    jobs = [
        Job(variant=VARIANT[kind], tile=tile, E=E, D=D)
        for kind in kinds
        for E, D in SHAPES
        for T in TOKENS
        for tile in candidates(kind, T)
    ]
    refused = compile_all(jobs)
    print(f"{len(set(jobs))} kernels compiled in {time.monotonic() - began:.0f} s", flush=True)
    for job, why in refused.items():
        print(f"refused: {job.variant} D={job.D} {_short(job.tile)}: {why}")
    faults, tables, record = [], [], {}
    for kind in kinds:
        print(f"{kind.value} ({time.monotonic() - began:.0f} s)", flush=True)
        times, found = timed(kind, set(refused))
        faults += found
        tables.append(table(kind, chosen(times)))
        record[kind.value] = {str(T): {_short(tile): us for tile, us in row.items()} for T, row in times.items()}
    rounding = tf32_rounding() if Arithmetic.TF32 in kinds else []
    arguments.path.write_text(
        json.dumps({"shapes": SHAPES, "us": record, "faults": faults, "tables": tables, "tf32": rounding}, indent=1)
    )
    print("\n".join((*rounding, "", *tables, "", *faults[:40], f"{len(faults)} tiles differ")))
    print(f"{time.monotonic() - began:.0f} s", flush=True)
    sys.exit(1 if faults else 0)


if __name__ == "__main__":
    main()
