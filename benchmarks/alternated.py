"""Timing that can be compared: arms in one process, one after another, round by round, as ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def clock(work: Callable[[], object], device: str = "cpu") -> float:
    """Seconds of CPU time (all threads), or of wall time on a synchronised GPU."""
    if device == "cpu":
        begin = time.process_time()
        work()
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def alternate(
    arms: Mapping[str, Callable[[], object]], rounds: int, device: str = "cpu", warm: int = 1
) -> dict[str, list[float]]:
    """Seconds of every arm in every round, in turn forwards and backwards, after ``warm`` rounds unseen."""
    found: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(rounds + warm):
        names = list(arms) if turn % 2 else list(arms)[::-1]
        for name in names:
            seconds = clock(arms[name], device)
            if turn >= warm:
                found[name].append(seconds)
    return found


def ratio(over: list[float], under: list[float]) -> float:
    """Median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(over, under, strict=True))


def quartiles(over: list[float], under: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile of the rounds' ratios."""
    low, middle, high = statistics.quantiles([a / b for a, b in zip(over, under, strict=True)], n=4)
    return low, middle, high
