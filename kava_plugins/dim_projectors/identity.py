"""Leave the width of a head as it is."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import Geometry
from kava_plugins.dim_projectors import IdentityConfig


class Identity(nn.Module):
    """Gives back the tensor itself; if its width is not the student's, only basis-free losses fit."""

    linear = shared_width = keeps_width = True

    def __init__(self, config: IdentityConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(
        self, x: Float[Tensor, "batch layer head time dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Return ``x``, not copied."""
        return x
