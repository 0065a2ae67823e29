"""The terms of latent reasoning beside KV losses: what CODI, LOTUS and self-distillation add."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from kava_core.data.encode import NO_LABEL
from kava_core.distill.denominators import EXAMPLES

CODI, STEPS, READING = "codi", "step_ce", "reading_ce"
"""Names of the terms."""


def codi_term(
    student: Float[Tensor, "layer batch hidden"],
    teacher: Float[Tensor, "layer batch hidden"],
    items: Float[Tensor, "4"],
) -> Float[Tensor, ""]:
    """Smooth L1 of the states before the answer, divided by the teacher's standard deviation in each layer.

    A mean over layers and width, summed over examples and divided by their number in the whole batch
    (arXiv 2502.21074). The teacher has no gradient.
    """
    student, teacher = student.float(), teacher.detach().float()
    spread = teacher.std((1, 2), correction=0).clamp_min(torch.finfo(torch.float32).tiny)
    distance = F.smooth_l1_loss(student, teacher, reduction="none").mean((1, 2)) / spread
    return distance.mean() * student.shape[1] / items[EXAMPLES]


def step_cross_entropy(
    logits: Float[Tensor, "batch time vocab"], trace: Int[Tensor, "batch time"], items: Float[Tensor, "4"]
) -> Float[Tensor, ""]:
    """Cross-entropy of the written steps' tokens where the latent ones are written, in float32.

    A mean over an example's labels, summed over examples and divided by their number in the whole batch.
    """
    labelled = trace.ne(NO_LABEL)
    losses = F.cross_entropy(logits.transpose(1, 2).float(), trace, ignore_index=NO_LABEL, reduction="none")
    return (losses.sum(1) / labelled.sum(1).clamp_min(1)).sum() / items[EXAMPLES]
