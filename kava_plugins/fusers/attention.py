"""The student's query attends over the teachers at each position."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import AttentionConfig
from kava_plugins.fusers._routing import imbalance, negative_entropy, routed
from kava_plugins.fusers.learnable import require_hidden
from kava_plugins.fusers.similarity import beside


class Attention(nn.Module):
    """``softmax over teachers of (W_q h) · (W_k c) / √width``, a head of attention whose keys are teachers.

    h is the student's last hidden state, detached; c is a teacher's aligned cache at the position and layer
    (first compared part, heads side by side), detached. W_q starts at zero, so teachers count alike at first.
    """

    needs_hidden = True

    def __init__(self, config: AttentionConfig, *, teachers: tuple[str, ...], student: Geometry) -> None:
        super().__init__()
        self.scale = 1 / math.sqrt(config.width)
        self.learning_rate, self.entropy, self.balance = config.learning_rate, config.entropy, config.balance
        self.query = nn.Linear(student.hidden, config.width, bias=False)
        self.key = nn.Linear(student.head * student.dim, config.width, bias=False)
        nn.init.zeros_(self.query.weight)

    def forward(self, context: FusionContext) -> Float[Tensor, "teacher batch layer time"]:
        """The weights, with gradient for the two maps."""
        query = self.query(require_hidden(context, "attention").to(self.query.weight.dtype))
        caches = zip(context.targets, context.valid, strict=True)
        keys = torch.stack(
            [
                self.key(torch.where(valid[:, None, :, None], beside(cache).detach().to(query.dtype), 0))
                for cache, valid in caches
            ]
        )
        scores = torch.einsum("btd,kbltd->kblt", query, keys) * self.scale
        return routed(scores, context.valid)

    def penalty(self, weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
        """Σ over positions: ``entropy`` · (−H) + ``balance`` · imbalance."""
        return self.entropy * negative_entropy(weights) + self.balance * imbalance(weights)
