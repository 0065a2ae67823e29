"""Weigh teachers by constants for each task label."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import TaskConfig
from kava_plugins.fusers.fixed import constant_weights


class Task(nn.Module):
    """An example's label chooses its row of weights; an unknown or missing label gets ``default``."""

    needs_targets = False
    table: Float[Tensor, "_ teacher"]

    def __init__(self, config: TaskConfig, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        self.row_of_label = {label: row for row, label in enumerate(config.weights, 1)}
        rows = [config.default, *config.weights.values()]
        table = torch.stack([constant_weights(row, teachers, who="task") for row in rows])
        self.register_buffer("table", table, persistent=False)

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Return the weights of each example's label, the same at all positions and layers."""
        teacher, batch, time = context.valid.shape
        tasks = context.tasks if context.tasks is not None else ("",) * batch
        rows = torch.tensor([self.row_of_label.get(task, 0) for task in tasks], device=self.table.device)
        weights = self.table[rows].mT[:, :, None, None]
        return weights.expand(teacher, batch, context.student.any.shape[1], time)
