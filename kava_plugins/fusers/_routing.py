"""What routers share: a softmax over the teachers that are there, and penalties that keep it spread."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def routed(
    scores: Float[Tensor, "teacher batch layer time"], valid: Bool[Tensor, "teacher batch time"]
) -> Float[Tensor, "teacher batch layer time"]:
    """Softmax of the scores over the teachers valid at each position; 0 where none is."""
    there = valid[:, :, None].expand_as(scores)
    some = there.any(0, keepdim=True)
    masked = scores.float().masked_fill(~there & some, -torch.inf)
    return torch.where(there, masked.softmax(0), 0)


def mean_over_time(
    x: Float[Tensor, "batch time hidden"], where: Bool[Tensor, "batch time"]
) -> Float[Tensor, "batch 1 hidden"]:
    """Mean of the positions that count; 0 for an example without any."""
    kept = torch.where(where[..., None], x, 0)
    count = where.sum(1)[:, None, None].clamp_min(1)
    return kept.sum(1, keepdim=True) / count


def negative_entropy(weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
    """Σ over positions of the mean over layers of Σ w log w: least where teachers count alike."""
    return -entropy(weights).sum(0).mean(1).sum()


def entropy(share: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """``−w log w`` of every share; a share of 0 has no gradient, where the formula's is infinite."""
    return torch.special.entr(share.clamp_min(torch.finfo(share.dtype).tiny))


def imbalance(weights: Float[Tensor, "teacher batch layer time"]) -> Float[Tensor, ""]:
    """Positions × (teachers · Σ over teachers of (mean weight)² − 1): 0 where all are used alike.

    A soft form of the load-balancing loss of the Switch Transformer (arXiv 2101.03961, equation 4), over the
    positions of the batch and its layers.
    """
    used = weights.sum(0) > 0
    count = used.sum().clamp_min(1)
    share = weights.sum(dim=(1, 2, 3)) / count
    return (weights.shape[0] * share.square().sum() - 1) * count / weights.shape[2]
