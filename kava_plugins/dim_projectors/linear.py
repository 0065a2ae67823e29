"""One matrix for each layer, without bias: from the teacher's width of a head to the student's."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import PARTS, Geometry
from kava_plugins.dim_projectors import LinearConfig
from kava_plugins.dim_projectors._matrices import normal, orthogonal, owners, project


class Linear(nn.Module):
    """Each layer's matrix serves all its heads or one of them, keys and values together or one of them.

    Queries go through the keys' matrix where heads share one; otherwise they have their own.
    """

    linear = True

    def __init__(self, config: LinearConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.shared_width = config.share_heads
        self.learning_rate = config.learning_rate
        self.owner = owners(share_heads=config.share_heads, share_kv=config.share_kv)
        self.layered = tuple(self.owner.values())
        draw = orthogonal if config.init == "orthogonal" else normal
        for order, part in enumerate(PARTS):
            if self.owner[part] == part and teacher.heads(part):
                head = 1 if config.share_heads else teacher.heads(part)
                shape = (teacher.layer, head, student.dim, teacher.dim)
                matrix = draw(shape, seed=config.seed + order)
                self.register_parameter(part, nn.Parameter(matrix, requires_grad=config.trainable))

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Every head's vectors times its matrix."""
        return project(x, getattr(self, self.owner[part]))
