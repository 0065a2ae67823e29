"""Compute the terms of latent reasoning beside KV losses: of CODI and of the written steps."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kava_core.data.encoding.encode import NO_LABEL
from kava_core.distill.denominators import EXAMPLES

CODI, STEPS, READING = "codi", "step_ce", "reading_ce"
"""Names of the terms."""


def codi_term(
    student: Float[Tensor, "layer batch hidden"],
    teacher: Float[Tensor, "layer batch hidden"],
    items: Float[Tensor, "4"],
) -> Float[Tensor, ""]:
    """Return smooth L1 of the states before the answer, divided by the teacher's standard deviation.

    The deviation is each layer's own. A mean over layers and width, summed over examples and divided by their
    number in the whole batch. The teacher has no gradient.

    Args:
        student: hidden states of every layer at the token before the answer.
        teacher: likewise.
        items: denominators of the whole batch.

    Source: CODI (arXiv 2502.21074).
    """
    student, teacher = student.float(), teacher.detach().float()
    spread = teacher.std((1, 2), correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    distance = F.smooth_l1_loss(student, teacher, reduction="none").mean((1, 2)) / spread
    return distance.mean() * student.shape[1] / items[EXAMPLES]


def step_cross_entropy(
    logits: Float[Tensor, "batch time vocab"], trace: Int[Tensor, "batch time"], items: Float[Tensor, "4"]
) -> Float[Tensor, ""]:
    """Return the cross-entropy of the written steps' tokens at the positions that write latent tokens.

    In float32, in nats. A mean over an example's labels, summed over examples and divided by their number in
    the whole batch.

    Args:
        logits: at the position before each latent token.
        trace: tokens of the written steps; NO_LABEL if there are fewer than latent tokens.
        items: denominators of the whole batch.
    """
    labelled = trace.ne(NO_LABEL)
    losses = F.cross_entropy(logits.transpose(1, 2).float(), trace, ignore_index=NO_LABEL, reduction="none")
    return (losses.sum(1) / labelled.sum(1).clamp_min(1)).sum() / items[EXAMPLES]
