"""Provide what routers share: a softmax over the valid teachers, and penalties that keep it spread."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def softmax_over_valid(
    scores: Float[Tensor, "teacher batch layer time"], valid: Bool[Tensor, "teacher batch time"]
) -> Float[Tensor, "teacher batch layer time"]:
    """Return the softmax of the scores over the teachers valid at each position; 0 where none is."""
    is_valid = valid[:, :, None].expand_as(scores)
    # Positions without any valid teacher keep their scores: a softmax over −inf alone would be NaN.
    any_valid = is_valid.any(0, keepdim=True)
    masked = scores.float().masked_fill(~is_valid & any_valid, -torch.inf)
    return torch.where(is_valid, masked.softmax(0), 0)


def mean_over_time(
    x: Float[Tensor, "batch time hidden"], where: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch 1 hidden"]:
    """Return the mean over the positions ``where``; 0 for an example without any."""
    kept = torch.where(where[..., None], x, 0)
    count = where.sum(1)[:, None, None].clamp_min(1)
    return kept.sum(1, keepdim=True) / count


def negative_entropy(weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
    """Sum over positions the mean over layers of Σ w log w: least where teachers count alike."""
    return -entropy_terms(weights).sum(0).mean(1).sum()


def entropy_terms(share: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Return ``−w log w`` of every share; a share of 0 has no gradient, though the formula's is infinite."""
    return torch.special.entr(share.clamp_min(torch.finfo(share.dtype).tiny))


def load_imbalance(weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
    """Return positions × (teachers · Σ over teachers of (mean weight)² − 1): 0 if all are used alike.

    Means are over the positions of the batch and its layers.

    Source: a soft form of the load-balancing loss of the Switch Transformer (arXiv 2101.03961, equation 4).
    """
    teachers, layers = weights.shape[0], weights.shape[2]
    has_teacher = weights.sum(0) > 0
    count = has_teacher.sum().clamp_min(1)
    mean_weights = weights.sum(dim=(1, 2, 3)) / count
    return (teachers * mean_weights.square().sum() - 1) * count / layers
