"""Let the last layers of both models meet, one by one."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_plugins.layer_mappers import LastAlignedConfig
from kava_plugins.layer_mappers._window import mean_around


class LastAligned(nn.Module):
    """Student layer i of L reads teacher layer ``T − L + i`` of T, counted from 0; 0 where that is less.

    With ``sources = k`` the mean of the k layers nearest to it is read.
    """

    matrix: Float[Tensor, "layer t_layer"]

    def __init__(self, config: LastAlignedConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        centre = (torch.arange(student.layer) + teacher.layer - student.layer).clamp_min(0)
        matrix = mean_around(centre, teacher.layer, config.sources)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self) -> Float[Tensor, "layer t_layer"]:
        """Return the constant weights, whose rows sum to 1."""
        return self.matrix
