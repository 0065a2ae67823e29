"""How positions relate to one another: needs no common basis, head count or width.

Relations instead of states: MiniLMv2 (arXiv 2012.15828), which compares softmaxed products; cosines are ours.
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.linalg import vector_norm

from kava_core.errors import SpecError
from kava_core.kv.maths.masks import live, select, widen, without_autocast
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import RelationConfig
from kava_plugins.kv_losses._attention_divergence import attention_divergence
from kava_plugins.kv_losses._row_blocks import Masking, Side, of_one_dtype, sum_of_rows

TINY = 1e-10
"""Positions of a smaller length relate to nothing: cosine 0. So do those that differ from the mean
only by rounding."""


class Relation(nn.Module):
    """Differences of the relations between positions, of each example and layer, mean over relation heads.

    ``cosine``: the loss of position i is the mean over the valid positions j of
    ``(cos(s_i, s_j) − cos(t_i, t_j))²``; ``softmax``: KL(softmax_j t_i · t_j / √dim ‖ that of the student).
    With ``center`` the mean over the valid positions is removed first.

    Raises:
        SpecError: ``heads`` does not divide the width of one side.
    """

    def __init__(self, config: RelationConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.parts, self.center, self.form = config.parts, config.center, config.form
        self.heads = 1 if config.heads == "merged" else config.heads
        for side, geometry in (("student", student), ("target", teacher)):
            for part in self.parts:
                _check_width(geometry.heads(part) * geometry.dim, self.heads, f"the {side}'s {part}")

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
        x, target = (split_heads(select(widen(one), where), self.heads) for one in (x, target))
        compare = self._cosine if self.form == "cosine" else self._softmax
        return compare(x, target, where, weight)

    def _cosine(self, x: Tensor, target: Tensor, where: Tensor, weight: Tensor) -> Tensor:
        sides = (directions(one, where, center=self.center).flatten(0, 1) for one in (x, target))
        mine, theirs = of_one_dtype(*(Side(one, one) for one in sides))
        valid = where.sum((2, 3, 4)).clamp_min(1)
        share = (weight.to(mine.queries.dtype) / valid[..., None]).flatten(0, 1)
        return sum_of_rows(mine, theirs, share, Masking(causal=False, live=None), _squares)

    def _softmax(self, x: Tensor, target: Tensor, where: Tensor, weight: Tensor) -> Tensor:
        if self.center:
            x, target = (one - mean_over_time(one, where) for one in (x, target))
        return attention_divergence(x, x, target, target, weight, causal=False)


def _check_width(width: int, heads: int, whose: str) -> None:
    if width % heads:
        raise SpecError(f"loss 'relation': heads {heads} does not divide {whose}, all heads {width} wide")


def _squares(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    each = torch.mul(mine.sub_(theirs), mine, out=spare).sum(-1, keepdim=True)
    mine.mul_(2 * weight)
    if wanted:
        torch.neg(mine, out=theirs)
    return each


def split_heads(
    x: Float[Tensor, "batch layer head time dim"], heads: int
) -> Float[Tensor, "batch layer {heads} time _"]:
    """The heads side by side, cut into ``heads`` of equal width."""
    merged = rearrange(x, "batch layer head time dim -> batch layer time (head dim)")
    split: Tensor = rearrange(merged, "batch layer time (head dim) -> batch layer head time dim", head=heads)
    return split


def mean_over_time(
    x: Float[Tensor, "batch layer head time dim"], where: Bool[Tensor, "batch layer 1 time 1"]
) -> Float[Tensor, "batch layer head 1 dim"]:
    """Mean over the positions ``where``; ``x`` is zero elsewhere. 0 where there are none."""
    return x.sum(3, keepdim=True) / where.sum(3, keepdim=True).clamp_min(1)


def directions(
    x: Float[Tensor, "batch layer head time dim"],
    where: Bool[Tensor, "batch layer 1 time 1"],
    *,
    center: bool,
) -> Float[Tensor, "batch layer head time dim"]:
    """Unit vectors of the positions, at least float32; zero where they have no length. ``x`` is zero
    elsewhere than ``where``."""
    least = x.new_full((), TINY)
    if center:
        mean = mean_over_time(x, where)
        least = least + 8 * torch.finfo(x.dtype).eps * vector_norm(mean.detach(), dim=-1, keepdim=True)
        x = torch.where(where, x - mean, 0)
    length = vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > least, length, torch.inf)
