"""Measure how far apart the scores are by which an evictor chooses: nearly equal ones choose nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.distill.distiller import Distiller

PREFIX = "spread"


def eviction_score_spreads(distiller: Distiller, batch: Mapping[str, Any]) -> dict[str, float]:
    """Return ``spread/TEACHER/SCORE`` for every teacher whose tokens are chosen by scores.

    These teachers run once more. A spread that cannot be computed is left out.
    """
    spreads = {}
    for teacher in distiller.teachers:
        if teacher.eviction is None:
            continue
        for name, score in teacher.eviction_scores(batch["teachers"][teacher.name]).items():
            spread = float(score_spread(score))
            if not math.isnan(spread):
                spreads[f"{PREFIX}/{teacher.name}/{name}"] = spread
    return spreads


def score_spread(score: Float[Tensor, "batch t_layer t_head t_time"]) -> Float[Tensor, ""]:
    """Return the standard deviation over a trace's tokens, mean over traces, layers and heads.

    The number of tokens is the divisor. A score of −inf is no token. Traces of fewer than 2 tokens are left
    out; NaN if there is no other.
    """
    real = score > -torch.inf
    count = real.sum(3)
    mean = torch.where(real, score, 0).sum(3) / count.clamp_min(1)
    variance = torch.where(real, score - mean[..., None], 0).square().sum(3) / count.clamp_min(1)
    has_several = count > 1
    return torch.where(has_several, variance.sqrt(), 0).sum() / has_several.sum()
