"""How an experiment's progress is shown: bars on a terminal, a line for every beginning and end elsewhere."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from kava_core.runs.folder import Folder

ENOUGH = 65_536
"""Bytes of a metrics file that are sure to hold its last line."""


class Watch:
    """Writes to stderr."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._since: dict[str, float] = {}
        self.total = self.complete = 0

    def begin(self, *, total: int, complete: int) -> None:
        """Before the first run."""
        self.total, self.complete = total, complete
        self._say(f"{self.title}: {complete} of {total} runs are complete")
        if sys.stderr.isatty() and "CI" not in os.environ and complete < total:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            self.bars = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
            self._whole = self.bars.add_task(self.title, total=total, completed=complete)
            self.bars.start()

    def started(self, run: Folder) -> None:
        """A run's process is there."""
        self._since[run.label] = time.monotonic()
        if self.bars is not None:
            self._tasks[run.label] = self.bars.add_task(run.label, total=run.spec.train.steps)
        else:
            self._say(f"{run.label}: started; {run.log}")

    def look(self, active: Sequence[Folder]) -> None:
        """Bring the bars to the steps that the runs have reached."""
        for run in active if self.bars is not None else ():
            assert self.bars is not None
            self.bars.update(self._tasks[run.label], completed=last_step(run))

    def ended(self, run: Folder, how: str) -> None:
        """A run's process is gone."""
        seconds = time.monotonic() - self._since[run.label]
        self.complete += how == "complete"
        if self.bars is not None:
            self.bars.remove_task(self._tasks[run.label])
            self.bars.update(self._whole, completed=self.complete)
        self._say(f"{run.label}: {how} after {seconds:.0f} s; {self.complete} of {self.total} complete")

    def close(self) -> None:
        """Take the bars away."""
        if self.bars is not None:
            self.bars.stop()

    def _say(self, text: str) -> None:
        if self.bars is not None:
            self.bars.console.print(text, highlight=False, markup=False, soft_wrap=True)
        else:
            print(text, file=sys.stderr, flush=True)


def last_step(run: Folder) -> int:
    """The newest step that a run has logged; 0 before the first."""
    file = run.metrics
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - ENOUGH))
            lines = stream.read().split(b"\n")
        return int(json.loads(lines[-2])["step"]) if len(lines) > 1 else 0
    except (OSError, ValueError, KeyError):
        return 0
