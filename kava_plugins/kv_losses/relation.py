"""Compare how positions relate to one another: needs no common basis, head count or width.

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
from kava_plugins.kv_losses._row_blocks import Masking, Side, sum_of_rows, to_common_dtype

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
                width = geometry.heads(part) * geometry.dim
                _check_width(width, self.heads, f"the {side}'s {part}")

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions, layers and parts."""
        where = live(weight)
        with without_autocast(weight.device):
            terms = [
                self._part_loss(x, getattr(target, part), where, weight)
                for part, x in student.pick(self.parts).items()
            ]
            return torch.stack(terms).sum()

    def _part_loss(self, x: Tensor, target: Tensor, where: Tensor, weight: Tensor) -> Tensor:
        x = split_heads(select(widen(x), where), self.heads)
        target = split_heads(select(widen(target), where), self.heads)
        compare = self._cosine_loss if self.form == "cosine" else self._softmax_loss
        return compare(x, target, where, weight)

    def _cosine_loss(self, x: Tensor, target: Tensor, where: Tensor, weight: Tensor) -> Tensor:
        # Products of unit vectors are cosines, so both sides are their own queries and keys.
        unit = unit_directions(x, where, center=self.center).flatten(0, 1)
        t_unit = unit_directions(target, where, center=self.center).flatten(0, 1)
        mine, theirs = to_common_dtype(Side(unit, unit), Side(t_unit, t_unit))
        valid_positions = where.sum((2, 3, 4)).clamp_min(1)
        row_weight = (weight.to(mine.queries.dtype) / valid_positions[..., None]).flatten(0, 1)
        return sum_of_rows(mine, theirs, row_weight, Masking(causal=False, live=None), _squared_differences)

    def _softmax_loss(self, x: Tensor, target: Tensor, where: Tensor, weight: Tensor) -> Tensor:
        if self.center:
            x = x - mean_over_positions(x, where)
            target = target - mean_over_positions(target, where)
        return attention_divergence(x, x, target, target, weight, causal=False)


def _check_width(width: int, heads: int, owner: str) -> None:
    if width % heads:
        raise SpecError(f"loss 'relation': heads {heads} does not divide {owner}, all heads {width} wide")


def _squared_differences(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    """Sum the squared differences of rows, and write the derivatives in place, as a ``CompareRows``."""
    difference = mine.sub_(theirs)
    squared_sum = torch.mul(difference, difference, out=spare).sum(-1, keepdim=True)
    mine.mul_(2 * weight)
    if wanted:
        torch.neg(mine, out=theirs)
    return squared_sum


def split_heads(
    x: Float[Tensor, "batch layer head time dim"], heads: int
) -> Float[Tensor, "batch layer {heads} time _"]:
    """Put the heads side by side and cut the whole into ``heads`` of equal width."""
    merged = rearrange(x, "batch layer head time dim -> batch layer time (head dim)")
    split: Tensor = rearrange(merged, "batch layer time (head dim) -> batch layer head time dim", head=heads)
    return split


def mean_over_positions(
    x: Float[Tensor, "batch layer head time dim"], where: Bool[Tensor, "batch layer 1 time 1"]
) -> Float[Tensor, "batch layer head 1 dim"]:
    """Return the mean over the positions ``where``; ``x`` is zero elsewhere. 0 if there are none."""
    return x.sum(3, keepdim=True) / where.sum(3, keepdim=True).clamp_min(1)


def unit_directions(
    x: Float[Tensor, "batch layer head time dim"],
    where: Bool[Tensor, "batch layer 1 time 1"],
    *,
    center: bool,
) -> Float[Tensor, "batch layer head time dim"]:
    """Return the unit vectors of the positions; zero if they have no length.

    ``x`` is zero elsewhere than ``where``, and float32 at least. With ``center`` the mean is removed first; a
    vector that differs from it only by rounding has no length.
    """
    least_length = x.new_full((), TINY)
    if center:
        mean = mean_over_positions(x, where)
        rounding = 8 * torch.finfo(x.dtype).eps * vector_norm(mean.detach(), dim=-1, keepdim=True)
        least_length = least_length + rounding
        x = torch.where(where, x - mean, 0)
    length = vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > least_length, length, torch.inf)
