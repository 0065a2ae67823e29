"""Show an experiment's progress: bars on a terminal, a line for every beginning and end elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kava_core.runs.folder import Folder

METRICS_TAIL_BYTES = 65_536
"""Bytes of a metrics file that are sure to hold its last line."""


class ExperimentProgress:
    """Shows on stderr how far the runs of an experiment have come."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._start_times: dict[str, float] = {}
        self.total = self.complete = 0

    def begin(self, *, total: int, complete: int) -> None:
        """Show how many runs there are, before the first one starts."""
        self.total, self.complete = total, complete
        self._print_line(f"{self.title}: {complete} of {total} runs are complete")
        if sys.stderr.isatty() and "CI" not in os.environ and complete < total:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
            self._whole_task = self.bars.add_task(self.title, total=total, completed=complete)
            self.bars.start()

    def run_started(self, run: Folder) -> None:
        """Show that a run's process has started."""
        self._start_times[run.label] = time.monotonic()
        if self.bars is not None:
            self._tasks[run.label] = self.bars.add_task(run.label, total=run.spec.train.steps)
        else:
            self._print_line(f"{run.label}: started; {run.log}")

    def update_bars(self, active: Sequence[Folder]) -> None:
        """Bring the bars to the steps that the runs have reached."""
        if self.bars is None:
            return
        for run in active:
            self.bars.update(self._tasks[run.label], completed=last_logged_step(run))

    def run_ended(self, run: Folder, end: str) -> None:
        """Show that a run's process has ended.

        Args:
            run: whose process it was.
            end: how it ended; ``complete`` counts.
        """
        seconds = time.monotonic() - self._start_times[run.label]
        self.complete += end == "complete"
        if self.bars is not None:
            self.bars.remove_task(self._tasks[run.label])
            self.bars.update(self._whole_task, completed=self.complete)
        count = f"{self.complete} of {self.total} complete"
        self._print_line(f"{run.label}: {end} after {seconds:.0f} s; {count}")

    def close(self) -> None:
        """Remove the bars."""
        if self.bars is not None:
            self.bars.stop()

    def _print_line(self, text: str) -> None:
        if self.bars is not None:
            self.bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def last_logged_step(run: Folder) -> int:
    """Return the newest step that a run has logged, 0 before the first."""
    file = run.metrics
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - METRICS_TAIL_BYTES))
            lines = stream.read().split(b"\n")
        # The last line is empty, or is being written.
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0
    except (OSError, ValueError, KeyError):
        return 0
