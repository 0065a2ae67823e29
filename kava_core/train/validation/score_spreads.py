"""How far apart the scores lie by which an evictor chooses: nearly equal ones choose nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.distill.distiller import Distiller

PREFIX = "spread"


def spreads(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, float]:
    """``spread/TEACHER/SCORE`` for every teacher whose tokens are chosen by scores; runs these once more."""
    found = {}
    for teacher in distiller.teachers:
        if teacher.eviction is not None:
            for name, score in teacher.eviction_scores(batch["teachers"][teacher.name]).items():
                found[f"{PREFIX}/{teacher.name}/{name}"] = float(spread(score))
    return {name: value for name, value in found.items() if value == value}


def spread(score: Float[Tensor, "batch t_layer t_head t_time"]) -> Float[Tensor, ""]:
    """Standard deviation over a trace's tokens (their number as divisor), mean over traces, layers and heads.

    −inf is no token. Traces of fewer than 2 tokens are left out; NaN where no other is.
    """
    real = score > -torch.inf
    count = real.sum(3)
    mean = torch.where(real, score, 0).sum(3) / count.clamp_min(1)
    square = torch.where(real, score - mean[..., None], 0).square().sum(3) / count.clamp_min(1)
    several = count > 1
    return torch.where(several, square.sqrt(), 0).sum() / several.sum()
