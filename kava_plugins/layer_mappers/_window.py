"""Find the teacher layers of the same depth, and average their neighbours."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from kava_core.protocols.axes import Geometry


def same_depth(teacher: Geometry, student: Geometry) -> Int[Tensor, " layer"]:
    """Return teacher layer ``round((i + 1) · T / L) − 1`` for student layer i of L, not below 0."""
    depth = torch.arange(1, student.layer + 1)
    nearest = (2 * depth * teacher.layer + student.layer) // (2 * student.layer) - 1
    return nearest.clamp_min(0)


def mean_around(
    centre: Int[Tensor, " layer"], t_layer: int, sources: int
) -> Float[Tensor, "layer {t_layer}"]:
    """Return equal weights for the ``sources`` layers nearest to each centre; for all if there are fewer."""
    sources = min(sources, t_layer)
    first = (centre - sources // 2).clamp(0, t_layer - sources)
    steps_after_first = torch.arange(t_layer) - first[:, None]
    inside = (steps_after_first >= 0) & (steps_after_first < sources)
    return inside.float() / sources
