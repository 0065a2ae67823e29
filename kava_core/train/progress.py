"""How far a long job over examples is: a bar on a terminal, a few lines otherwise; on stderr."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
"""Progress lines on something that is no terminal."""


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Gives a function to be called with the number of examples done since the last call."""
    if sys.stderr.isatty() and "CI" not in os.environ:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
    else:
        yield _Lines(title, total, done)


class _Lines:
    """Prints how far it is, at most ten times."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.told = done * LINES // max(total, 1)

    def __call__(self, count: int) -> None:
        """``count`` more examples are done."""
        self.done += count
        if self.done * LINES // self.total > self.told:
            self.told = self.done * LINES // self.total
            print(f"{self.title} {self.done}/{self.total} examples", file=sys.stderr, flush=True)
