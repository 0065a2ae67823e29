"""One sparse, row-stochastic map from a teacher's positions to a student's, per example.

Every time warp is such a map: student position i is a weighted mean of a few teacher positions (its
*taps*). Rows have equal numbers of taps, so a batch of maps is two dense tensors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class TimeMap:
    """``index`` and ``weight`` of each student position's taps; rows of valid positions sum to 1."""

    index: Int[Tensor, "batch time tap"]
    weight: Float[Tensor, "batch time tap"]
    valid: Bool[Tensor, "batch time"]
    identity: bool = False
    """True where position i reads exactly position i: applying the map costs nothing."""

    @classmethod
    def same(cls, valid: Bool[Tensor, "batch time"]) -> TimeMap:
        """Position i reads position i."""
        index = torch.arange(valid.shape[1], device=valid.device).expand_as(valid)
        return cls(
            index[..., None], torch.ones_like(index, dtype=torch.float32)[..., None], valid, identity=True
        )

    @classmethod
    def gather(cls, index: Int[Tensor, "batch time"], valid: Bool[Tensor, "batch time"]) -> TimeMap:
        """Position i reads one teacher position."""
        index = torch.where(valid, index, 0)
        return cls(index[..., None], torch.ones_like(index, dtype=torch.float32)[..., None], valid)

    @classmethod
    def between(
        cls,
        low: Int[Tensor, "batch time"],
        high: Int[Tensor, "batch time"],
        fraction: Float[Tensor, "batch time"],
        valid: Bool[Tensor, "batch time"],
    ) -> TimeMap:
        """Position i reads ``(1 − fraction) · low + fraction · high``."""
        index = torch.where(valid[..., None], torch.stack([low, high], -1), 0)
        fraction = fraction.float()
        return cls(index, torch.stack([1 - fraction, fraction], -1), valid)

    def apply(
        self, x: Float[Tensor, "batch layer head t_time dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """The warped tensor. Invalid positions hold zeros."""
        if self.identity:
            return x
        batch, layer, head, t_time, dim = x.shape
        if t_time == 0:
            return x.new_zeros(batch, layer, head, self.valid.shape[1], dim)
        rows = rearrange(x, "batch layer head time dim -> (batch layer head time) dim")
        start = torch.arange(batch * layer * head, device=x.device).view(batch, layer * head, 1, 1) * t_time
        index = (self.index[:, None] + start).flatten(0, 2)
        weight = self.weight[:, None].expand(-1, layer * head, -1, -1).flatten(0, 2).to(x.dtype)
        taken = F.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)
        taken = taken.view(batch, layer, head, self.valid.shape[1], dim)
        # Not by weight 0: a NaN among the rows would come through.
        return torch.where(self.valid[:, None, None, :, None], taken, 0)

    def dense(self, t_time: int) -> Float[Tensor, "batch time t_time"]:
        """The map as a matrix; rows of invalid positions are zero."""
        matrix = self.weight.new_zeros(*self.valid.shape, t_time)
        return matrix.scatter_add_(2, self.index, self.weight * self.valid[..., None])
