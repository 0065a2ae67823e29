"""Weigh the terms of the loss over a run."""

from __future__ import annotations

import math

from kava_core.config import WeightedTerm


def schedule_factor(config: WeightedTerm, progress: float) -> float:
    """Return the factor by which the schedule multiplies a term's weight λ: 1 at first, ``end`` at last.

    Args:
        config: the term.
        progress: how far the run is, from 0 to 1.
    """
    if config.schedule == "constant":
        return 1.0
    way_gone = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 + (config.end - 1) * way_gone


def unique_names(names: list[str]) -> list[str]:
    """Number names that occur again: ``relation, relation`` → ``relation, relation_2``."""
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        unique.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return unique
