"""Print for people: progress, sizes, whole tables, and silence for transformers' own chatter."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table


@contextmanager
def quiet() -> Iterator[None]:
    """Switch off what transformers itself prints; kava reports what matters."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def print_whole(table: Table, console: Console) -> None:
    """Print a table with every word whole, even if it is wider than the terminal."""
    needed = Measurement.get(console, console.options.update(max_width=10_000), table).maximum
    console.width = max(console.width, needed)
    console.print(table)


@cache
def tell_once(line: str) -> None:
    """Print a line on stderr, unless this process has printed the same line before."""
    print(line, file=sys.stderr, flush=True)


def size_text(size: float) -> str:
    """Return a number of bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} TiB"


PROGRESS_LINES = 10
"""Progress lines if stderr is not a terminal."""


@contextmanager
def progress(title: str, total: int, done: int = 0) -> Iterator[Callable[[int], None]]:
    """Show how many of ``total`` examples are done: a bar on a terminal, a few lines elsewhere.

    Args:
        title: what is done.
        total: examples.
        done: examples that were done before.

    Yields:
        A function to be called with the number of examples done since the last call.
    """
    if sys.stderr.isatty() and "CI" not in os.environ:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda count: bar.advance(task, count)
    else:
        yield _ProgressLines(title, total, done)


class _ProgressLines:
    """Prints on stderr how many examples are done, at most ten times."""

    def __init__(self, title: str, total: int, done: int) -> None:
        self.title, self.total, self.done = title, total, done
        self.printed = done * PROGRESS_LINES // max(total, 1)

    def __call__(self, count: int) -> None:
        """Count more examples as done."""
        self.done += count
        reached = self.done * PROGRESS_LINES // self.total
        if reached > self.printed:
            self.printed = reached
            print(f"{self.title} {self.done}/{self.total} examples", file=sys.stderr, flush=True)
