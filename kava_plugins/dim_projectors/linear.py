"""Project by one matrix for each layer, without bias, from the teacher's head width to the student's."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import PARTS, Geometry
from kava_plugins.dim_projectors import LinearConfig
from kava_plugins.dim_projectors._matrices import (
    apply_matrices,
    matrix_owners,
    normal_matrices,
    orthogonal_matrices,
)


class Linear(nn.Module):
    """One matrix for each layer, or for each of its heads; keys and values share it or have their own.

    Queries go through the keys' matrix if heads share one; otherwise they have their own.
    """

    linear = True

    def __init__(self, config: LinearConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.shared_width = config.share_heads
        self.learning_rate = config.learning_rate
        self.owner = matrix_owners(share_heads=config.share_heads, share_kv=config.share_kv)
        self.layered = tuple(self.owner.values())
        draw_matrices = orthogonal_matrices if config.init == "orthogonal" else normal_matrices
        for order, part in enumerate(PARTS):
            if self.owner[part] == part and teacher.heads(part):
                head = 1 if config.share_heads else teacher.heads(part)
                shape = (teacher.layer, head, student.dim, teacher.dim)
                matrix = draw_matrices(shape, seed=config.seed + order)
                self.register_parameter(part, nn.Parameter(matrix, requires_grad=config.trainable))

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Multiply every head's vectors by its matrix."""
        return apply_matrices(x, getattr(self, self.owner[part]))
