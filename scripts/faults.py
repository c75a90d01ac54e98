"""Runs the table of faults: messages in one process, learners, hosts, disks and drivers for real; ends with a table.

python scripts/faults.py [--only learner] [--repeat 3]; the exit status is 0 only if every promise was kept.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # messages are judged with the tests' own fakes

import torch  # noqa: E402
from ordeal.arena import Arena, Verdict  # noqa: E402
from ordeal.driver_faults import strike_driver  # noqa: E402
from ordeal.messages import strike_message  # noqa: E402
from ordeal.table import DRIVER_CELLS, MESSAGE_CELLS, PROCESS_CELLS, Cell, Victim  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

KINDS = ("message", *(victim.value for victim in Victim))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, action="append", help="these victims only (default: all)")
    parser.add_argument("--repeat", type=int, default=1, help="times that every cell is run (default 1)")
    arguments = parser.parse_args()
    chosen = set(arguments.only or KINDS)
    torch.set_num_threads(1)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    console = Console()
    table = Table("victim", "blow", "when", "transport", "hosts hold after", "seconds", "allowed", "kept")
    broken = Counter[bool]()
    if "message" in chosen:
        outcomes = [strike_message(cell) for cell in MESSAGE_CELLS for _ in range(arguments.repeat)]
        for (message, after), count in sorted(Counter((o.cell.message, o.after) for o in outcomes).items()):
            table.add_row("message", f"{count} faults", message, "memory", after, "", "", "yes")
        broken[False] += len(outcomes)
    with tempfile.TemporaryDirectory(prefix="faults-") as workspace:
        os.environ["MOE_ROLLOUT_RUNTIME_DIR"] = f"{workspace}/run"
        for cell, verdict, fault in strike_all(Path(workspace), chosen, arguments.repeat, console):
            broken[bool(fault)] += 1
            found = (
                ("", "", "") if verdict is None else (verdict.after, f"{verdict.seconds:.1f}", f"{verdict.limit_s:.1f}")
            )
            table.add_row(cell.victim, cell.blow, cell.phase, cell.transport, *found, fault or "yes")
    console.print(table)
    console.print(f"{broken[False]} cells kept every promise, {broken[True]} did not")
    sys.exit(1 if broken[True] else 0)


def strike_all(
    workspace: Path, chosen: set[str], repeat: int, console: Console
) -> Iterator[tuple[Cell, Verdict | None, str]]:
    """Every chosen cell of processes and disks, and what was wrong; a broken arena makes way for a new one."""
    arena: Arena | None = None
    try:
        for cell in [cell for cell in PROCESS_CELLS if cell.victim in chosen for _ in range(repeat)]:
            began = time.monotonic()
            try:
                if cell in DRIVER_CELLS:
                    if arena is not None:
                        arena.close()
                        arena = None
                    verdict = strike_driver(cell, workspace)
                else:
                    arena = arena or Arena(workspace, "arena")
                    verdict = arena.run(cell)
            except (AssertionError, TimeoutError) as error:
                console.print(f"[red]{cell}: {error}")
                yield cell, None, str(error)
                if arena is not None:
                    arena.close()
                    arena = None
            else:
                console.print(f"{cell}: {verdict.after} [dim]({time.monotonic() - began:.1f} s)")
                yield cell, verdict, ""
    finally:
        if arena is not None:
            arena.close()


if __name__ == "__main__":
    main()
