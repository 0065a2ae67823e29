"""Mask and sum as every KV loss must: positions of weight 0 have no influence, sums are at least float32."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


def widen(x: Float[Tensor, " ..."]) -> Float[Tensor, " ..."]:
    """Cast half precision to float32; return float32 and float64 as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off inside, so that products keep the dtype of their factors.

    Does nothing if the device has no autocast, as meta.
    """
    if not torch.amp.is_autocast_available(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def live(weight: Float[Tensor, "batch layer time"]) -> Bool[Tensor, "batch layer 1 time 1"]:
    """Return where a position counts (its weight is not 0), in a shape that broadcasts with a cache."""
    return rearrange(weight != 0, "batch layer time -> batch layer 1 time 1")


def select(
    x: Float[Tensor, "batch layer head time dim"], where: Bool[Tensor, "batch layer 1 time 1"]
) -> Float[Tensor, "batch layer head time dim"]:
    """Return ``x`` with zeros elsewhere; what it held there, NaN too, reaches neither value nor gradient."""
    return torch.where(where, x, 0)


def weighted_sum(
    each: Float[Tensor, "batch layer head time _"], weight: Float[Tensor, "batch layer time"]
) -> Float[Tensor, ""]:
    """Return the sum over positions and layers of weight × mean of ``each`` over heads and width."""
    return (each.mean(dim=(2, 4)) * weight.to(each.dtype)).sum()


def scaled_difference(
    x: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    weight: Float[Tensor, "batch layer time"],
    scale: Literal["none", "batch", "example"],
) -> Float[Tensor, "batch layer head time dim"]:
    """Return ``x − target`` at positions whose weight is not 0, zero elsewhere; in float32 or better.

    Args:
        x: the student's side.
        target: the teacher's side.
        weight: of every position in every layer.
        scale: divide by each layer's standard deviation of the target: over the whole batch, over each
            example, or not at all.
    """
    where = live(weight)
    difference = select(widen(x) - widen(target), where)
    if scale == "none":
        return difference
    return difference / layer_std(target, where, per_example=scale == "example")


def layer_std(
    target: Float[Tensor, "batch layer head time dim"],
    where: Bool[Tensor, "batch layer 1 time 1"],
    *,
    per_example: bool,
) -> Float[Tensor, "_ layer 1 1 1"]:
    """Return the standard deviation of each layer over the positions that count, heads and width, detached.

    1 where there are no positions or no spread, so that dividing by it is always safe.
    """
    over = (2, 3, 4) if per_example else (0, 2, 3, 4)
    x = select(widen(target.detach()), where)
    count = (where.sum(over, keepdim=True) * x.shape[2] * x.shape[4]).clamp_min(1)
    mean = x.sum(over, keepdim=True) / count
    variance = select(x - mean, where).square().sum(over, keepdim=True) / count
    std = variance.sqrt()
    return torch.where(std > 8 * torch.finfo(std.dtype).eps * mean.abs(), std, 1)
