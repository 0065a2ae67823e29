"""Compare by the mean squared difference (KaVa, arXiv 2510.02312, with p = 2)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.kv.maths.masks import scaled_difference, weighted_sum
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import MSEConfig


class MSE(nn.Module):
    """Mean over heads and width of (student − target)², optionally in units of the target's deviation."""

    def __init__(self, config: MSEConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.parts, self.scale = config.parts, config.scale

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions, layers and parts."""
        terms = []
        for part, x in student.pick(self.parts).items():
            difference = scaled_difference(x, getattr(target, part), weight, self.scale)
            terms.append(weighted_sum(difference.square(), weight))
        return torch.stack(terms).sum()
