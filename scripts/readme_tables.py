"""The Markdown tables of README.md and routing/NUMERICS.md that are made of results/*.json.

    python scripts/readme_tables.py             # prints them all
    python scripts/readme_tables.py --write     # puts each where its name stands in a document

A table's place is between the lines `<!-- table: NAME -->` and `<!-- end of table -->`.
"""

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "routing/NUMERICS.md")
PLACE = re.compile(r"(<!-- table: (?P<name>[^>]*?) -->\n).*?(<!-- end of table -->\n)", re.DOTALL)
OPENING = "<!-- table:"
LIBRARIES = {
    "torch": "PyTorch",
    "triton": "Triton",
    "transformers": "transformers",
    "megatron-core": "Megatron-Core",
    "vllm": "vLLM",
}
Json = Mapping[str, Any]


def routing_bits(found: Json) -> str:
    """What was compared with whose code, and the rows with a wrong bit."""
    bits = found["bits"]
    rows = [_bits_row(part, len(each), _summed(each)) for part, each in bits["beside"].items()]
    rows.append(_bits_row("**all**", sum(map(len, bits["beside"].values())), bits))
    return table(("beside", "comparisons", "tokens", "with wrong ids", "with wrong weights"), rows) + _machine(found)


def routing_speed(found: Json) -> str:
    """Microseconds by router and tokens, ours beside the rival's where it has such a router."""
    columns = found["speed"]["columns"]
    tokens = list(columns[0]["ours"])
    most = tokens[-1]
    heads = ("router", *(f"{int(T):,}" for T in tokens), f"eager, {int(most):,}", "vLLM's other rows")
    rows = []
    for column in columns:
        rival, others = column.get("rival", {}), column.get("rival_rows_otherwise")
        cells = [_pair(column["ours"][T], rival.get(T)) for T in tokens]
        rows.append((column["name"], *cells, short(column["eager"][most]), "" if others is None else _others(others)))
    return table(heads, rows)


def routing_floor(found: Json) -> str:
    """How far the routers with fp32 logits are above what moves the same bytes, with inputs in cache and in turn."""
    floors = found["speed"]["floors"]
    most = str(floors["tokens"])
    rows = []
    for column in found["speed"]["columns"]:
        router, E = column["router"], str(column["router"]["num_experts"])
        is_wide = router["gate"]["output_dtype"] == "float32"
        if column["way"] == "fused" and is_wide and router["top_k"] == 8 and E in floors["moving"]:
            warm, least = column["ours"][most], floors["moving"][E]
            turned, least_turned = column["ours_rotated"][most], floors["moving_rotated"][E]
            beside = (_beside(warm, least), _beside(turned, least_turned))
            rows.append((column["name"], *beside))
    return table((f"us for {int(most):,} tokens", "one input again and again", "inputs in turn, past the cache"), rows)


def bounds(found: Json) -> str:
    """Random rows that bounds leave to the definition."""
    rows = []
    for logits in ("fp32", "bf16"):
        beside = found["bits"]["beside"]["eager PyTorch"]
        shares = {
            row["model"]: row["exact_share"]
            for row in beside
            if row["logits"] == logits and row["exact_share"] is not None
        }
        most = max(shares, key=lambda model: shares[model])
        median = statistics.median(shares.values())
        rows.append((logits, str(len(shares)), f"{median:.3%}", f"{shares[most]:.3%} ({most})"))
    return table(("logits", "routers", "median", "most"), rows)


def replay_gap(found: Json) -> str:
    """How far learner and rollout are apart, by gate and routing."""
    heads = ("rollout's gate", "learner's gate", "learner's routing", "mean", "99 %", "max", "decisions", "tokens")
    rows = [
        (
            row["rollout_gate"],
            row["learner_gate"],
            row["routing"],
            *(f"{row[f'logprob_abs_diff_{name}']:.4f}" for name in ("mean", "p99", "max")),
            f"{row['own_decisions_differing_share']:.1%}",
            f"{row['own_positions_differing_share']:.1%}",
        )
        for row in found["rows"]
    ]
    model, tokens = found["model"], found["rows"][0]["tokens"]
    what = f"{model['layers']} layers of {model['num_experts']} experts, {model['dtype']}, random weights"
    return table(heads, rows) + _machine(found, f"; {what}; {tokens:,} sampled tokens a row")


def gate(found: Json) -> str:
    """Microseconds of the gate's variants for the smallest and the largest shape, ours beside PyTorch's product."""
    shapes = sorted({(row["experts"], row["hidden"]) for row in found["rows"]}, key=lambda shape: shape[0] * shape[1])
    tokens = max((list(row["us"]) for row in found["rows"]), key=len)
    heads = ("gate", "E x D", *(f"{int(T):,}" for T in tokens), "PyTorch's bits")
    rows = []
    for row in found["rows"]:
        if (row["experts"], row["hidden"]) in (shapes[0], shapes[-1]):
            cells = [_pair(row["us"][T], row["torch_us"][T]) if T in row["us"] else "" for T in tokens]
            least = row["equal_from_tokens"]
            since = "not in batches of any size" if least is None else f"from {least:,} tokens on"
            rows.append((row["variant"], f"{row['experts']} x {row['hidden']:,}", *cells, since))
    return table(heads, rows) + _machine({"versions": {"torch": found["torch"], "triton": found["triton"]}, **found})


def reload(found: Json) -> str:
    """Seconds of hot reloads by transport: medians without the first update, the worst in brackets."""
    heads = (
        *("transport", "where", "sequences", "GB", "updates", "whole update, s", "GB/s"),
        *("between two steps, ms", "to the first new token, s", "a step, ms", "extra device memory, MiB"),
    )
    rows = [
        (
            row["transport"],
            row["devices"],
            str(row["sequences"]),
            f"{row['bytes'] / 1e9:.1f}",
            str(row["updates"]),
            _worst(row["seconds"], 1.0, 2),
            f"{row['bytes'] / 1e9 / statistics.median(row['seconds'][1:]):.0f}",
            _worst(row["between_steps_s"], 1e3, 0),
            _worst(row["to_new_token_s"], 1.0, 2),
            f"{row['step_s'] * 1e3:.0f}",
            f"{row['extra_device_bytes'] / 2**20:,.0f}",
        )
        for row in found["rows"]
    ]
    commits = sorted({f"`{row['commit'][:7]}`" for row in found["rows"]})
    return table(heads, rows) + _machine(found, f"; rows of commits {', '.join(commits)}")


def reload_faults(found: Json) -> str:
    """Cells by how the bytes come, how many kept their promise, and how 500 updates in a row began and ended."""
    heads = ("how the bytes come", "hosts", "cells", "kept", "500 updates: ms each", "host memory, MiB", "device, MiB")
    rows = []
    for run in found["runs"]:
        steady = {row["kind"]: row for row in run["updates"]}
        for kind in dict.fromkeys(cell["kind"] for cell in run["cells"]):
            cells = [cell for cell in run["cells"] if cell["kind"] == kind]
            kept = sum(cell["kept"] for cell in cells)
            shown = "**" if kept < len(cells) else ""
            row = steady.get(kind)
            drift = ("", "", "") if row is None else _drift(row)
            rows.append((kind, str(cells[0]["hosts"]), str(len(cells)), f"{shown}{kept}{shown}", *drift))
    commits = ", ".join(f"`{run['commit'][:12]}`" for run in found["runs"])
    return table(heads, rows) + f"\n{found['device']}, PyTorch {found['versions']['torch']}; commits {commits}.\n"


def _drift(row: Json) -> tuple[str, str, str]:
    first, last = row["second_tenth"], row["last_tenth"]
    return (
        f"{first['seconds'] * 1e3:.1f} -> {last['seconds'] * 1e3:.1f}",
        f"{first['memory_mib']:,.0f} -> {last['memory_mib']:,.0f}",
        f"{first['device_used_mib']:,.0f} -> {last['device_used_mib']:,.0f}",
    )


def _worst(values: Sequence[float], scale: float, digits: int) -> str:
    kept = [value * scale for value in values[1:]]
    return f"{statistics.median(kept):.{digits}f} ({max(kept):.{digits}f})"


TABLES: Mapping[str, tuple[str, Callable[[Json], str]]] = {
    "routing bits": ("routing.json", routing_bits),
    "routing speed": ("routing.json", routing_speed),
    "routing floor": ("routing.json", routing_floor),
    "bounds": ("routing.json", bounds),
    "replay gap": ("replay_gap.json", replay_gap),
    "gate": ("gate.json", gate),
    "reload": ("reload.json", reload),
    "reload faults": ("reload_faults.json", reload_faults),
}
"""Name -> the file that it is made of, and how."""


def tables(results: Path) -> dict[str, str]:
    """All of them, by name; of a file that is not there, a line that says so."""
    made = {}
    for name, (file, make) in TABLES.items():
        path = results / file
        made[name] = (
            make(json.loads(path.read_text("utf-8"))) if path.exists() else f"`results/{file}` is not there yet.\n"
        )
    return made


def placed(text: str, made: Mapping[str, str]) -> str:
    """`text` with every table in its place. ValueError for a place without an end, or with a name that none has."""
    names = [match["name"] for match in PLACE.finditer(text)]
    unknown = [name for name in names if name not in made]
    if unknown:
        raise ValueError(f"no table is called {', '.join(map(repr, unknown))}; known: {', '.join(made)}")
    if text.count(OPENING) != len(names):
        raise ValueError(f"{text.count(OPENING)} tables begin and {len(names)} end; expected an end for each")
    return PLACE.sub(lambda match: f"{match[1]}\n{made[match['name']]}\n{match[3]}", text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown, a line each."""
    return "".join(f"| {' | '.join(cells)} |\n" for cells in (heads, ["---"] * len(heads), *rows))


def short(number: float) -> str:
    """Three digits."""
    return f"{number:.2f}" if number < 9.995 else f"{number:.1f}" if number < 99.95 else f"{number:,.0f}"


def _pair(ours: float, rival: float | None) -> str:
    """The rival in bold where it is not slower."""
    if rival is None:
        return short(ours)
    return f"{short(ours)} / {short(rival)}" if ours < rival else f"{short(ours)} / **{short(rival)}**"


def _beside(us: float, floor: float) -> str:
    return f"{short(us)}, {us / floor:.1f} times {short(floor)}"


def _others(others: Json) -> str:
    experts, weights = (others[name] / others["rows"] for name in ("other_experts", "other_weights"))
    return f"{weights:.2%}" if not experts else f"{weights:.2%}, and {experts:.2%} with other experts"


def _bits_row(name: str, comparisons: int, counted: Json) -> tuple[str, ...]:
    counts = (counted[key] for key in ("tokens", "ids_rows_wrong", "weights_rows_wrong"))
    return name, str(comparisons), *(f"{count:,}" for count in counts)


def _summed(rows: Sequence[Json]) -> dict[str, int]:
    return {key: sum(row[key] for row in rows) for key in ("tokens", "ids_rows_wrong", "weights_rows_wrong")}


def _machine(found: Json, more: str = "") -> str:
    versions = [f"{LIBRARIES[name]} {version}" for name, version in found["versions"].items() if name in LIBRARIES]
    return f"\n{found['device']}, {', '.join(versions)}; commit `{found['commit'][:12]}`{more}.\n"


def main(arguments: list[str], root: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="into the documents, in place of printing")
    args = parser.parse_args(arguments)
    made = tables(root / "results")
    if not args.write:
        print("\n".join(f"{name}\n\n{made[name]}" for name in made), end="")
        return 0
    for document in DOCUMENTS:
        path = root / document
        path.write_text(placed(path.read_text("utf-8"), made), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
