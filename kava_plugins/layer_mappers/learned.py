"""Learn a mixture of all teacher layers for every student layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_plugins.layer_mappers import LearnedConfig
from kava_plugins.layer_mappers._window import same_depth


class Learned(nn.Module):
    """``softmax(logits / temperature)`` over the teacher's layers.

    The logits begin at ``−2 · log(1 + distance)`` from the layer of the same depth. That tail is heavy on
    purpose: at temperature 1 a layer 27 away still weighs 1/784 of the nearest, so its gradient is not lost.
    """

    def __init__(self, config: LearnedConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.temperature = config.temperature
        self.learning_rate = config.learning_rate
        distance = (torch.arange(teacher.layer) - same_depth(teacher, student)[:, None]).abs()
        self.logits = nn.Parameter(-2 * torch.log1p(distance.float()))

    def forward(self) -> Float[Tensor, "layer t_layer"]:
        """Return the weights, whose rows sum to 1."""
        return (self.logits.float() / self.temperature).softmax(1)
