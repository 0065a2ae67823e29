"""Weigh teachers by attention: the student's query attends over them at each position."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.fuser import FusionContext
from kava_plugins.fusers import AttentionConfig
from kava_plugins.fusers._routing import load_imbalance, negative_entropy, softmax_over_valid
from kava_plugins.fusers.learnable import require_hidden
from kava_plugins.fusers.similarity import heads_side_by_side


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
        """Return the teachers' weights, with gradient for the two maps."""
        hidden = require_hidden(context, "attention")
        query = self.query(hidden.to(self.query.weight.dtype))
        keys_of_teachers = []
        for cache, valid in zip(context.targets, context.valid, strict=True):
            vectors = heads_side_by_side(cache).detach().to(query.dtype)
            keys_of_teachers.append(self.key(torch.where(valid[:, None, :, None], vectors, 0)))
        keys = torch.stack(keys_of_teachers)
        scores = torch.einsum("btd,kbltd->kblt", query, keys) * self.scale
        return softmax_over_valid(scores, context.valid)

    def penalty(self, weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
        """Sum over positions ``entropy`` · (−H) + ``balance`` · imbalance of the weights."""
        return self.entropy * negative_entropy(weights) + self.balance * load_imbalance(weights)
