"""Read both models at the same relative depth."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_plugins.layer_mappers import RatioConfig
from kava_plugins.layer_mappers._window import mean_around, same_depth


class Ratio(nn.Module):
    """Student layer i of L reads teacher layer ``round((i + 1) · T / L) − 1`` of T, counted from 0.

    The last layers always meet; a teacher with fewer layers is read repeatedly. With ``sources = k`` the mean
    of the k layers nearest to it is read, of all layers if there are fewer than k.
    """

    matrix: Float[Tensor, "layer t_layer"]

    def __init__(self, config: RatioConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        matrix = mean_around(same_depth(teacher, student), teacher.layer, config.sources)
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self) -> Float[Tensor, "layer t_layer"]:
        """Return the constant weights, whose rows sum to 1."""
        return self.matrix
