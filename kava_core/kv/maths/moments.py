"""Sum over pairs of rows, batch by batch in float64: all that a closed-form projection needs of the data."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """First and second moments of paired rows ``x`` and ``like``, each less a fixed origin.

    The origin is the mean of the first batch. A channel's mean can be thousands of times its spread
    (massive activations); squares of the difference keep the digits that squares of the value lose.
    """

    positions: int
    """Valid positions seen."""
    rows: int
    """Rows seen by each basis: positions, times heads where these share one."""
    origin: Float[Tensor, "layer head t_dim"]
    like_origin: Float[Tensor, "layer head dim"]
    total: Float[Tensor, "layer head t_dim"]
    like_total: Float[Tensor, "layer head dim"]
    outer: Float[Tensor, "layer head t_dim t_dim"]
    """Sum of x xᵀ."""
    cross: Float[Tensor, "layer head dim t_dim"]
    """Sum of like xᵀ."""

    @classmethod
    def empty(
        cls, x: Float[Tensor, "layer head time t_dim"], like: Float[Tensor, "layer head time dim"]
    ) -> Moments:
        """Return moments of no rows yet, with the means of the given rows as origins."""
        origin, like_origin = x.mean(2), like.mean(2)
        return cls(
            positions=0,
            rows=0,
            origin=origin,
            like_origin=like_origin,
            total=torch.zeros_like(origin),
            like_total=torch.zeros_like(like_origin),
            outer=origin.new_zeros(*origin.shape, origin.shape[-1]),
            cross=origin.new_zeros(*like_origin.shape, origin.shape[-1]),
        )

    def plus(
        self,
        x: Float[Tensor, "layer head time t_dim"],
        like: Float[Tensor, "layer head time dim"],
        positions: int,
    ) -> Moments:
        """Return these moments with more rows added.

        Args:
            x: rows of the side that is projected.
            like: the other side's rows, paired with them.
            positions: how many valid positions the rows are of.
        """
        x, like = x - self.origin[:, :, None], like - self.like_origin[:, :, None]
        return replace(
            self,
            positions=self.positions + positions,
            rows=self.rows + x.shape[2],
            total=self.total + x.sum(2),
            like_total=self.like_total + like.sum(2),
            outer=self.outer + x.mT @ x,
            cross=self.cross + like.mT @ x,
        )

    @property
    def mean(self) -> Float[Tensor, "layer head t_dim"]:
        """Return the mean of ``x`` over all rows."""
        return self.origin + self.total / self.rows

    @property
    def like_mean(self) -> Float[Tensor, "layer head dim"]:
        """Return the mean of ``like`` over all rows."""
        return self.like_origin + self.like_total / self.rows

    @property
    def covariance(self) -> Float[Tensor, "layer head t_dim t_dim"]:
        """Return the covariance of ``x``: the mean of x xᵀ, means removed."""
        shift = self.total / self.rows
        return self.outer / self.rows - shift[..., :, None] * shift[..., None, :]

    @property
    def cross_covariance(self) -> Float[Tensor, "layer head dim t_dim"]:
        """Return the covariance of ``like`` with ``x``: the mean of like xᵀ, means removed."""
        shift, like_shift = self.total / self.rows, self.like_total / self.rows
        return self.cross / self.rows - like_shift[..., :, None] * shift[..., None, :]


def rows_of(
    x: Float[Tensor, "batch layer head time dim"], valid: Bool[Tensor, "batch time"], *, per_head: bool
) -> Float[Tensor, "layer _ _ dim"]:
    """Gather the valid positions of all examples one after another, in float64.

    Args:
        x: a cache's keys, values or queries.
        valid: the positions that count.
        per_head: keep heads apart; else the rows of all heads follow one another under a single head.
    """
    rows = rearrange(x.detach(), "batch layer head time dim -> layer head batch time dim")[:, :, valid]
    if not per_head:
        rows = rearrange(rows, "layer head time dim -> layer 1 (head time) dim")
    return rows.to(torch.float64)
