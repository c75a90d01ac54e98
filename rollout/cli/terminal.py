"""What a person sees: tables and results on stdout, everything else on stderr."""

import json
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import MofNCompleteColumn as Counted
from rich.table import Table
from rich.text import Text

PIPE_COLUMNS = 200
"""Width of a table that does not go to a terminal."""


def say(text: str) -> None:
    """A line on stderr."""
    print(text, file=sys.stderr, flush=True)


def show(text: str) -> None:
    """A line of the result."""
    print(text, flush=True)


def show_json(plain: object) -> None:
    """A result for a program: one line of JSON."""
    show(json.dumps(plain))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table of the result."""
    table = Table(
        show_header=any(columns),
        title=title,
        title_justify="left",
        title_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    console = Console(file=sys.stdout)
    console.width = console.width if console.is_terminal else PIPE_COLUMNS
    console.print(table)


def progress(unit: str) -> Progress:
    """A bar on stderr that counts `unit`; draws nothing where stderr is no terminal."""
    console = Console(stderr=True)
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        Counted(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
        transient=True,
    )


def amount(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
