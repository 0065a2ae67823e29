"""``kava status`` for people: a table, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kava_core.experiment.slurm.status import Row

COLOURS = {"complete": "green", "running": "cyan", "failed": "red", "damaged": "red", "interrupted": "yellow"}


def table(rows: Sequence[Row]) -> Table:
    """A line for each run."""
    made = Table()
    for column in ("variant", "seed", "state", "step", "metric", "s/step", "left", "slurm"):
        right = column in ("seed", "step", "s/step", "left")
        made.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        made.add_row(*_cells(row))
    return made


def _cells(row: Row) -> list[Text]:
    metric = "" if row.metric is None else f"{row.metric} {row.value:.4g}"
    pace = "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}"
    left = "" if row.seconds_left is None else str(timedelta(seconds=round(row.seconds_left)))
    state = Text(_state(row), COLOURS.get(row.state, ""))
    plain = (f"{row.step}/{row.steps}", metric, pace, left, row.slurm or "")
    return [Text(row.variant), Text(str(row.seed)), state, *map(Text, plain)]


def _state(row: Row) -> str:
    """``failed (4): NonFiniteError: …``."""
    return row.state if row.reason is None else f"{row.state} ({row.exit_code}): {row.reason}"


def show(rows: Callable[[], Sequence[Row]], every: float | None = None) -> None:
    """Print the table; with ``every`` anew after so many seconds, until all runs are complete or Ctrl-C."""
    found, console = rows(), Console()
    if every is None:
        console.print(table(found))
        return
    try:
        with Live(table(found), console=console, auto_refresh=False) as live:
            while any(row.state != "complete" for row in found):
                time.sleep(every)
                found = rows()
                live.update(table(found), refresh=True)
    except KeyboardInterrupt:
        return
