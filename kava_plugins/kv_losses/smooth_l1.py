"""Compare by the smooth L1 difference (KaVa, arXiv 2510.02312, with p = 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.kv.maths.masks import scaled_difference, weighted_sum
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import SmoothL1Config


class SmoothL1(nn.Module):
    """Mean over heads and width: quadratic below ``beta``, linear above; see ``F.smooth_l1_loss``."""

    def __init__(self, config: SmoothL1Config, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.parts, self.scale, self.beta = config.parts, config.scale, config.beta

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions, layers and parts."""
        terms = []
        for part, x in student.pick(self.parts).items():
            distance = self._elementwise_loss(x, getattr(target, part), weight)
            terms.append(weighted_sum(distance, weight))
        return torch.stack(terms).sum()

    def _elementwise_loss(self, x: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        difference = scaled_difference(x, target, weight, self.scale)
        zero = torch.zeros((), dtype=difference.dtype, device=difference.device).expand_as(difference)
        return F.smooth_l1_loss(difference, zero, beta=self.beta, reduction="none")
