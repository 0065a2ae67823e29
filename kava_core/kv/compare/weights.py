"""Weigh the terms of the loss over a run."""

from __future__ import annotations

import math

from kava_core.config import KVLossConfig


def schedule_factor(config: KVLossConfig, progress: float) -> float:
    """What is left of λ: 1 at first, ``end`` at last."""
    if config.schedule == "constant":
        return 1.0
    gone = progress if config.schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return 1 + (config.end - 1) * gone
