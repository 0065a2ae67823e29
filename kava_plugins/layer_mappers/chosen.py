"""Read the teacher layers that the spec names."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.errors import SpecError
from kava_core.protocols.axes import Geometry
from kava_plugins.layer_mappers import ChosenConfig


class Chosen(nn.Module):
    """Student layer i reads the mean of the teacher layers in row i of ``layers``.

    Raises:
        SpecError: rows for another number of student layers, or a layer that the teacher does not have.
    """

    matrix: Float[Tensor, "layer t_layer"]

    def __init__(self, config: ChosenConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        rows = config.layers * (student.layer if len(config.layers) == 1 else 1)
        if len(rows) != student.layer:
            raise SpecError(
                f"layers: {len(rows)} rows for a student of {student.layer} layers; "
                f"give {student.layer}, or one for all"
            )
        matrix = torch.zeros(student.layer, teacher.layer)
        for student_layer, teacher_layers in enumerate(rows):
            for layer in teacher_layers:
                matrix[student_layer, _index_from_start(layer, teacher.layer)] = 1
        self.register_buffer("matrix", matrix / matrix.sum(1, keepdim=True), persistent=False)

    def forward(self) -> Float[Tensor, "layer t_layer"]:
        """Return the constant weights, whose rows sum to 1."""
        return self.matrix


def _index_from_start(layer: int, count: int) -> int:
    if not -count <= layer < count:
        raise SpecError(
            f"layers: no layer {layer} in a teacher of {count}; "
            f"possible: 0 to {count - 1}, or -1 to -{count} from the end"
        )
    return layer % count
