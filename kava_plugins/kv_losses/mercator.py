"""One minus the cosine of student and target, vector by vector: the direction counts, the length does not."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import KVLossConfig
from kava_core.kv.axes import Cache, Geometry
from kava_core.kv.masks import live, select, weighted_sum, widen

TINY = 1e-20
"""Vectors of a smaller squared length have no direction: loss 0, gradient 0."""


class Mercator(nn.Module):
    """Mean over heads of 1 − cos, computed as ½‖ŝ − t̂‖², which keeps its precision near 0."""

    def __init__(self, config: KVLossConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.parts = config.parts

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Σ weight × loss of the position, over positions, layers and parts."""
        where = live(weight)
        return sum(
            weighted_sum(one_minus_cosine(select(x, where), select(getattr(target, part), where)), weight)
            for part, x in student.pick(self.parts).items()
        )


def one_minus_cosine(
    x: Float[Tensor, "batch layer head time dim"], target: Float[Tensor, "batch layer head time dim"]
) -> Float[Tensor, "batch layer head time 1"]:
    """1 − cos of each pair of vectors, in float32 or better; 0 where one of them has no direction."""
    x, target = widen(x), widen(target)
    length, t_length = x.square().sum(-1, keepdim=True), target.square().sum(-1, keepdim=True)
    directed = (length > TINY) & (t_length > TINY)
    # Guarded before the root: the gradient of rsqrt at 0 is infinite, and 0 · inf is NaN.
    unit = x * torch.where(directed, length, 1).rsqrt()
    t_unit = target * torch.where(directed, t_length, 1).rsqrt()
    difference = torch.where(directed, unit - t_unit, 0)
    return difference.square().sum(-1, keepdim=True) / 2
