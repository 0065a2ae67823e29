"""Measure signs that an aligner, and not the student, made the KV loss fall.

A projector that exists only inside the loss can absorb the mismatch: the target shrinks to what the student
already is. Its effective rank and variance then fall, and so does the loss of a student that never moved.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.kv.maths.masks import widen

MOST_ROWS = 512
"""Positions an effective rank is computed from."""


def valid_rows(
    x: Float[Tensor, "batch layer head time dim"], valid: Bool[Tensor, "batch time"]
) -> Float[Tensor, "layer head _ dim"]:
    """Gather the valid positions of all examples one after another, in float32 or better."""
    return widen(x.movedim(0, 2)[:, :, valid])


def effective_rank(rows: Float[Tensor, "layer head time dim"]) -> Float[Tensor, "layer head"]:
    """Return exp(entropy) of the normalised spectrum of the covariance: from 1 to ``dim``; 0 without spread.

    At most ``MOST_ROWS`` evenly chosen rows are used, which also bounds what the result can reach.

    Source: Roy & Vetterli, "The effective rank", EUSIPCO 2007, with eigenvalues of the covariance as the
    spectrum.
    """
    step = -(-rows.shape[2] // MOST_ROWS) or 1
    rows = rows[:, :, ::step]
    centred = rows - rows.mean(2, keepdim=True)
    gram = centred @ centred.mT if centred.shape[2] < centred.shape[3] else centred.mT @ centred
    values = torch.linalg.eigvalsh(gram.double()).clamp_min(0)
    total = values.sum(-1, keepdim=True)
    share = values / torch.where(total > 0, total, 1)
    return torch.where(total[..., 0] > 0, torch.special.entr(share).sum(-1).exp(), 0).to(rows.dtype)


def mean_variance(rows: Float[Tensor, "layer head time dim"]) -> Float[Tensor, ""]:
    """Return the variance over positions, averaged over channels, heads and layers; 0 for one position."""
    return rows.var(2, correction=0).mean()


def mean_cosine(
    x: Float[Tensor, "layer head time dim"], y: Float[Tensor, "layer head time dim"]
) -> Float[Tensor, ""]:
    """Return the cosine over the width, averaged over positions, heads and layers; 0 for a zero vector."""
    return torch.cosine_similarity(x, y, dim=-1, eps=torch.finfo(x.dtype).tiny).mean()


def absorbed_share(before: Tensor, aligner_alone: Tensor, now: Tensor) -> Tensor:
    """Return the share of the loss's fall that needs no change of the student.

    Args:
        before: loss of the first student with the first aligner.
        aligner_alone: loss of the first student with the present aligner.
        now: loss of the present student with the present aligner.

    Returns:
        ``(before − aligner_alone) / (before − now)``; NaN if the loss did not fall.
    """
    fell = before - now
    return torch.where(fell > 0, (before - aligner_alone) / torch.where(fell > 0, fell, 1), torch.nan)
