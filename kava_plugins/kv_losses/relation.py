"""How positions relate to one another: needs no common basis, head count or width.

Relations instead of states: MiniLMv2 (arXiv 2012.15828), with cosines in place of softmaxed products.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.linalg import vector_norm

from kava_core.kv.axes import Cache, Geometry
from kava_core.kv.masks import live, select, widen, without_autocast
from kava_plugins.kv_losses import Relation as Config

TINY = 1e-10
"""Positions of a smaller length relate to nothing: cosine 0. So do those that differ from the mean
only by rounding."""

BLOCK = 256
"""Query positions compared at once."""


class Relation(nn.Module):
    """Mean squared difference of the cosine Gram matrices over time, of each example and layer.

    The loss of position i is the mean over the valid positions j of ``(cos(s_i, s_j) − cos(t_i, t_j))²``,
    heads merged. With ``center`` the mean over the valid positions is removed first.
    """

    def __init__(self, config: Config, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.parts, self.center = config.parts, config.center

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Σ weight × loss of the position, over positions, layers and parts."""
        where = live(weight)
        with without_autocast(weight.device):
            terms = [
                self._part(x, getattr(target, part), where, weight)
                for part, x in student.pick(self.parts).items()
            ]
            return torch.stack(terms).sum()

    def _part(self, x: Tensor, target: Tensor, where: Tensor, weight: Tensor) -> Tensor:
        mine, theirs = directions(x, where, center=self.center), directions(target, where, center=self.center)
        valid = where.sum((2, 3, 4)).clamp_min(1)
        blocks = zip(torch.split(mine, BLOCK, 2), torch.split(theirs, BLOCK, 2), strict=True)
        each = torch.cat([vector_norm(m @ mine.mT - t @ theirs.mT, dim=-1) for m, t in blocks], -1)
        return (each.square() / valid[..., None] * weight.to(each.dtype)).sum()


def directions(
    x: Float[Tensor, "batch layer head time dim"],
    where: Bool[Tensor, "batch layer 1 time 1"],
    *,
    center: bool,
) -> Float[Tensor, "batch layer time _"]:
    """Unit vectors of the positions, heads merged, at least float32; zero where invalid or without length."""
    x = rearrange(select(widen(x), where), "batch layer head time dim -> batch layer time (head dim)")
    least = x.new_full((), TINY)
    if center:
        valid = rearrange(where, "batch layer 1 time 1 -> batch layer time 1")
        mean = x.sum(2, keepdim=True) / valid.sum(2, keepdim=True).clamp_min(1)
        least = least + 8 * torch.finfo(x.dtype).eps * vector_norm(mean.detach(), dim=-1, keepdim=True)
        x = torch.where(valid, x - mean, 0)
    length = vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > least, length, torch.inf)
