"""What was found, as short tables for a terminal."""

from collections.abc import Iterable, Mapping, Sequence

from routing_bench.correctness import EAGER, Findings
from routing_bench.models import Logits
from routing_bench.speed import FLOOR_SLOTS, Floors, Times
from routing_bench.tally import Count


def bits_table(findings: Findings) -> str:
    """Rows by model, then the parts, then the sum."""
    lines = [f"{'':28}{'logits':>7}{'tokens':>13}{'ids wrong':>11}{'weights wrong':>15}{'exact path':>12}"]
    for row in findings.rows[EAGER]:
        share = row["exact_share"]
        lines.append(
            f"{row['model']!s:28}{row['logits']!s:>7}{_counts(row)}"
            f"{'' if share is None else f'{float(str(share)):.3%}':>12}"
        )
    for part, rows in findings.rows.items():
        if part == EAGER:
            continue
        wrong = [row for row in rows if row["ids_rows_wrong"] or row["weights_rows_wrong"]]
        total = sum((_count(row) for row in rows), Count())
        lines.append(f"{part + f', {len(rows)} comparisons':35}{_counts(vars(total))}")
        lines += [f"    {' '.join(str(value) for value in row.values())}" for row in wrong]
    lines.append(f"{'all':35}{_counts(vars(findings.total))}")
    return "\n".join(lines)


def bits_summary(findings: Findings) -> str:
    """The same for every model together."""
    lines = []
    for logits in Logits:
        rows = [row for row in findings.rows[EAGER] if row["logits"] == logits]
        lines.append(
            f"{len(rows)} routers, {logits} logits:{_counts(vars(sum((_count(row) for row in rows), Count())))}"
        )
    return "\n".join(lines)


def speed_table(found: Sequence[Times]) -> str:
    """Ours / the rival's / eager PyTorch's, by column and tokens; slower cells are marked."""
    width = max(len(times.column.name) for times in found)
    tokens = list(found[0].ours)
    lines = [f"{'us at T =':{width}}" + "".join(f"{T:>20}" for T in tokens)]
    for times in found:
        cells = [_cell(times.ours[T], times.rival.get(T), times.eager.get(T)) for T in tokens]
        lines.append(f"{times.column.name:{width}}" + "".join(f"{cell:>20}" for cell in cells))
    lines.append("ours/rival/eager PyTorch; * where the rival is faster")
    return "\n".join(lines)


def floor_table(found: Sequence[Times], floors: Floors) -> str:
    """How far ours is above what moves the same bytes."""
    T = floors.tokens
    lines = [f"empty node {floors.empty_node:.2f} us; {T:,} tokens, k={FLOOR_SLOTS}, inputs in cache | in turn:"]
    for E, least in floors.moving.items():
        least_rotated = floors.moving_rotated[E]
        lines.append(f"E={E}: floor {least:.1f} | {least_rotated:.1f} us")
        for times in found:
            spec = times.column.spec
            if (spec.num_experts, spec.top_k, spec.gate.output_dtype.itemsize) == (E, FLOOR_SLOTS, 4):
                warm, rotated, theirs = times.ours[T], times.ours_rotated[T], times.rival_rotated.get(T)
                lines.append(
                    f"    {times.column.name:24}{warm:7.1f} ({warm / least:.1f}x) |{rotated:7.1f}"
                    f" ({rotated / least_rotated:.1f}x)" + ("" if theirs is None else f", rival {theirs:.1f}")
                )
    return "\n".join(lines)


def rival_table(found: Iterable[Times]) -> str:
    """In how many rows the rival's bits are others."""
    lines = [
        f"    {times.column.name:24}{others['other_experts']:8,} other experts, {others['other_weights']:8,} other"
        f" weights for the same experts, of {others['rows']:,} rows"
        for times in found
        if (others := times.rival_rows_otherwise)
    ]
    return "\n".join(["the rival beside eager PyTorch:", *lines]) if lines else ""


def _cell(ours: float, rival: float | None, eager: float | None) -> str:
    parts = [ours, *([] if rival is None else [rival]), *([] if eager is None else [eager])]
    text = "/".join(f"{part:.2f}" if part < 10 else f"{part:.1f}" if part < 100 else f"{part:.0f}" for part in parts)
    return text + ("*" if rival is not None and ours >= rival else "")


def _count(row: Mapping[str, object]) -> Count:
    names = ("tokens", "ids_rows_wrong", "weights_rows_wrong")
    return Count(**{name: int(str(row[name])) for name in names})


def _counts(row: Mapping[str, object]) -> str:
    return f"{row['tokens']:>13,}{row['ids_rows_wrong']:>11,}{row['weights_rows_wrong']:>15,}"
