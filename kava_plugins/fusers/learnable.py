"""Weigh teachers by a router: a small network that reads the student's hidden state."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.errors import KavaError
from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import LearnableConfig
from kava_plugins.fusers._routing import load_imbalance, mean_over_time, negative_entropy, softmax_over_valid


class Learnable(nn.Module):
    """``softmax(W₂ SiLU(W₁ h + b₁) + b₂)`` over teachers; h is the student's last hidden state, detached.

    Teachers count alike at first. The router learns from the KV losses it weighs, so it moves to the teacher
    that is easiest to match; ``entropy`` and ``balance`` hold it back.
    """

    needs_targets = False
    needs_hidden = True

    def __init__(self, config: LearnableConfig, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        self.teachers, self.by_example = len(teachers), config.per == "example"
        self.layers = student.layer if config.per_layer else 1
        self.temperature, self.learning_rate = config.temperature, config.learning_rate
        self.entropy, self.balance = config.entropy, config.balance
        self.inner = nn.Linear(student.hidden, config.width)
        self.outer = nn.Linear(config.width, self.teachers * self.layers)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """Return the teachers' weights, with gradient for the router's parameters."""
        hidden = require_hidden(context, "learnable").to(self.inner.weight.dtype)
        if self.by_example:
            hidden = mean_over_time(hidden, context.valid.any(0))
        inner = torch.nn.functional.silu(self.inner(hidden))
        scores = self.outer(inner) / self.temperature
        scores = rearrange(
            scores, "batch time (teacher layer) -> teacher batch layer time", teacher=self.teachers
        )
        teacher, batch, time = context.valid.shape
        return softmax_over_valid(
            scores.expand(teacher, batch, context.student.any.shape[1], time), context.valid
        )

    def penalty(self, weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
        """Sum over positions ``entropy`` · (−H) + ``balance`` · imbalance of the weights."""
        return self.entropy * negative_entropy(weights) + self.balance * load_imbalance(weights)


def require_hidden(context: FusionContext, name: str) -> Float[Tensor, "batch time hidden"]:
    """Return the student's hidden states, detached.

    Raises:
        KavaError: the context holds none.
    """
    if context.hidden is None:
        raise KavaError(f"fuser {name}: needs the student's hidden states, which this caller does not give")
    return context.hidden.detach()
