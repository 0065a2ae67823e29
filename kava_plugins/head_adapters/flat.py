"""Merge all heads of a layer to one, or all heads of all layers: the baseline without structure."""

from __future__ import annotations

from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.protocols.axes import Geometry
from kava_plugins.head_adapters import FlatConfig


class Flat(nn.Module):
    """One head as wide as all together, on both sides; the projector does the rest."""

    linear = True

    def __init__(self, config: FlatConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.layers = config.layers
        self.teacher_view = _flat_view(teacher, config.layers)
        self.student_view = _flat_view(student, config.layers)

    def forward(
        self, x: Float[Tensor, "batch layer t_head time dim"], part: Part
    ) -> Float[Tensor, "batch _ 1 time _"]:
        """Put the teacher's heads side by side.

        Raises:
            KavaError: for queries, whose width would be another.
        """
        if part == "queries":
            raise KavaError("head_adapter flat: queries cannot be flattened; possible parts: keys, values")
        return self.fold(x)

    def fold(self, x: Float[Tensor, "batch layer head time dim"]) -> Float[Tensor, "batch _ 1 time _"]:
        """Put the student's heads side by side, layer after layer if these are merged too."""
        if self.layers:
            return rearrange(x, "batch layer head time dim -> batch 1 1 time (layer head dim)")
        return rearrange(x, "batch layer head time dim -> batch layer 1 time (head dim)")


def _flat_view(side: Geometry, layers: bool) -> Geometry:
    """Return the extents with one head, and one layer if these are merged too."""
    merged_layers = side.layer if layers else 1
    dim = merged_layers * side.head * side.dim
    return side.with_(layer=side.layer // merged_layers, head=1, qhead=1, dim=dim)
