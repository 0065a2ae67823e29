"""Print for people: progress, sizes, whole tables, and silence for transformers' own chatter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def quiet() -> Iterator[None]:
    """transformers' own chatter off; kava reports what matters."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def print_whole(shown: Table, console: Console) -> None:
    """Print a table with every word whole, also where it is wider than the terminal."""
    needed = Measurement.get(console, console.options.update(max_width=10_000), shown).maximum
    console.width = max(console.width, needed)
    console.print(shown)


def size_text(size: float) -> str:
    """``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


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
