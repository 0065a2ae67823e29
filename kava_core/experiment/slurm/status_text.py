"""Show the status of runs to people: a table, once or again and again."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from kava_core.experiment.slurm.status import RunStatus

COLOURS = {"complete": "green", "running": "cyan", "failed": "red", "damaged": "red", "interrupted": "yellow"}


def status_table(rows: Sequence[RunStatus]) -> Table:
    """Return a table with a line for each run."""
    table = Table()
    for column in ("variant", "seed", "state", "step", "metric", "s/step", "left", "slurm"):
        is_number = column in ("seed", "step", "s/step", "left")
        table.add_column(column, justify="right" if is_number else "left", overflow="fold")
    for row in rows:
        table.add_row(*_cells_of_run(row))
    return table


def _cells_of_run(row: RunStatus) -> list[Text]:
    metric = "" if row.metric is None else f"{row.metric} {row.value:.4g}"
    pace = "" if row.seconds_per_step is None else f"{row.seconds_per_step:.3g}"
    left = "" if row.seconds_left is None else str(timedelta(seconds=round(row.seconds_left)))
    state = Text(_state_text(row), COLOURS.get(row.state, ""))
    others = (f"{row.step}/{row.steps}", metric, pace, left, row.slurm or "")
    return [Text(row.variant), Text(str(row.seed)), state, *map(Text, others)]


def _state_text(row: RunStatus) -> str:
    """Return the state with its reason: ``failed (4): NonFiniteError: …``."""
    return row.state if row.reason is None else f"{row.state} ({row.exit_code}): {row.reason}"


def show_status(statuses: Callable[[], Sequence[RunStatus]], every: float | None = None) -> None:
    """Print the table of runs.

    Args:
        statuses: returns the newest status of every run.
        every: seconds after which the table is printed anew, until all runs are complete or Ctrl-C; None:
            it is printed once.
    """
    rows, console = statuses(), Console()
    if every is None:
        console.print(status_table(rows))
        return
    try:
        with Live(status_table(rows), console=console, auto_refresh=False) as live:
            while any(row.state != "complete" for row in rows):
                time.sleep(every)
                rows = statuses()
                live.update(status_table(rows), refresh=True)
    except KeyboardInterrupt:
        return
