"""What the terminal shows while the demo runs: a live table, or plain lines where there is no terminal."""

from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from grpo.agreement import Replayed
from grpo.record import Record, agreement_of, replayed_of

BARS = "▁▂▃▄▅▆▇█"


class View(Protocol):
    """Shows a run; leave the block before printing anything else."""

    def phase(self, text: str) -> None:
        """What is being done now."""

    def update(self, record: Record) -> None:
        """One more update is done."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class PlainView:
    """A line per update."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def phase(self, text: str) -> None:
        self._line(text)

    def update(self, record: Record) -> None:
        cells = rows([record])
        self._line(f"update {record.update:3d}  " + "  ".join(f"{name} {value}" for name, value in cells.items()))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to put away."""

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)


class LiveView:
    """A panel that stays in place: the last update's figures, the run's totals, the reward so far.

    Args:
        updates: how many there will be.
    """

    def __init__(self, console: Console, *, title: str, updates: int) -> None:
        self._records: list[Record] = []
        self._title = title
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn(), TimeElapsedColumn(), expand=True
        )
        self._task = self._progress.add_task("starting", total=updates)
        self._live = Live(console=console, get_renderable=self._panel, refresh_per_second=8)

    def phase(self, text: str) -> None:
        self._progress.update(self._task, description=text)

    def update(self, record: Record) -> None:
        self._records.append(record)
        self._progress.update(self._task, completed=record.update)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, trace)

    def _panel(self) -> Panel:
        parts: list[Table | Progress | Text] = []
        if self._records:
            table = Table.grid(padding=(0, 2))
            for name, value in rows(self._records).items():
                table.add_row(Text(name, style="dim"), Text(value, style="bold"))
            rewards = [record.reward for record in self._records]
            parts = [table, Text(sparkline(rewards), style="green")]
        return Panel(Group(*parts, self._progress), title=self._title, title_align="left")


def rows(records: Sequence[Record]) -> dict[str, str]:
    """The last record's figures, and the whole run's gaps and mismatches."""
    last, total, replayed = records[-1], agreement_of(records), replayed_of(records)
    return {
        "reward": f"{last.reward:.3f}",
        "tokens/s": f"{last.generated / last.seconds:.0f}",
        "version": last.published,
        "update": f"{last.update_s * 1e3:.0f} ms (hosts paused {max(last.pause_s) * 1e3:.1f} ms)",
        "staleness": f"{last.staleness:.2f} updates ({last.crossed} completions across the commit)",
        "log-prob gap": f"{total.logprob_abs_diff_max:.1e} over {total.tokens} tokens",
        "routing mismatches": f"{total.mismatches} of {total.decisions} ({total.near_ties} near ties)",
        **({} if replayed is None else {"replay": _replay(replayed)}),
        "sample": last.example,
    }


def _replay(replayed: Replayed) -> str:
    return (
        f"{replayed.differing} of {replayed.decisions} decisions not the learner's own, log-prob gap"
        f" {replayed.logprob_abs_diff_max:.1e} over {replayed.tokens} tokens"
    )


def sparkline(shares: Sequence[float]) -> str:
    """Numbers in [0, 1] as one line of bars."""
    return "".join(BARS[min(int(share * len(BARS)), len(BARS) - 1)] for share in shares)
