"""The run as a picture."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from grpo.record import Record


def draw(records: Sequence[Record], path: Path, *, title: str) -> None:
    """Reward, speed, staleness and the log-probability gap over the updates, as a PNG at `path`."""
    updates = [record.update for record in records]
    figure = Figure(figsize=(10, 6), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display, and leaves pyplot's global state alone
    figure.suptitle(title)
    panels = {
        "reward": [record.reward for record in records],
        "tokens/s": [record.generated / record.seconds for record in records],
        "staleness (updates)": [record.staleness for record in records],
        "log-probability gap, max": [record.agreement.logprob_abs_diff_max for record in records],
    }
    axes = figure.subplots(2, 2, sharex=True).flat
    for axis, (name, values) in zip(axes, panels.items(), strict=True):
        axis.plot(updates, values)
        axis.set_title(name)
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.3)
        axis.set_xlabel("update")
    figure.savefig(path)
