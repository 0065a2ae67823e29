"""A space that both sides are mapped to, for models that share neither widths nor architecture.

Canonical correlations (Hotelling 1936) of the two caches, each layer's heads side by side.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.errors import KavaError
from kava_core.kv.maths.masks import live, select, widen, without_autocast
from kava_core.kv.maths.moments import Moments, rows_of
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import SharedSpaceConfig

SIDES = ("student", "target")


FEWEST = 0.01
"""Correlation that every direction counts with at least."""


class Seen(NamedTuple):
    """Moments of both sides; each is the other's ``like``."""

    student: Moments
    target: Moments

    @classmethod
    def empty(cls, own: Tensor, other: Tensor) -> Seen:
        """Nothing seen yet."""
        return cls(Moments.empty(own, other), Moments.empty(other, own))

    def plus(self, own: Tensor, other: Tensor, positions: int) -> Seen:
        """These rows as well."""
        return Seen(self.student.plus(own, other, positions), self.target.plus(other, own, positions))


class SharedSpace(nn.Module):
    """Mean squared distance in the shared space, whose directions count by their correlation.

    Directions are computed from every second example and their correlation is measured on the others: among
    few positions, directions that correlate can always be found.
    Both sides are whitened by their covariances before training, then turned to ``dim`` orthonormal
    directions. Training these (``trainable``) cannot shrink the space to a point, as the whitening is fixed.
    """

    ready: Bool[Tensor, ""]

    def __init__(self, config: SharedSpaceConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.config, self.parts, self.learning_rate = config, config.parts, config.learning_rate
        for part in self.parts:
            widths = [one.heads(part) * one.dim for one in (student, teacher)]
            dim = min(config.dim, *widths)
            self.register_buffer(f"{part}_correlation", torch.zeros(student.layer, dim))
            for side, width in zip(SIDES, widths, strict=True):
                self._attach(f"{part}_{side}", student.layer, width, dim)
        self.layered: tuple[str, ...] = tuple(name for name in self.state_dict())
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self._seen: dict[tuple[Part, bool], Seen] = {}
        self._examples = 0
        self._checked = False

    def _attach(self, name: str, layer: int, width: int, dim: int) -> None:
        self.register_buffer(f"{name}_mean", torch.zeros(layer, width))
        if self.config.trainable:
            self.register_buffer(f"{name}_whitening", torch.zeros(layer, width, width))
            self.register_parameter(f"{name}_directions", nn.Parameter(torch.zeros(layer, width, dim)))
        else:
            self.register_buffer(f"{name}_map", torch.zeros(layer, dim, width))

    def observe(self, student: Cache, target: Cache, valid: Bool[Tensor, "batch time"]) -> None:
        """Add the valid positions of a batch to the sums of every part."""
        number = torch.arange(len(valid), device=valid.device)[:, None] + self._examples
        self._examples += len(valid)
        for held in (False, True):
            where = valid & (number % 2 == held)
            if where.any():
                self._add(student, target, where, held)

    def _add(self, student: Cache, target: Cache, where: Tensor, held: bool) -> None:
        for part in self.parts:
            own, other = (
                rows_of(merged(getattr(cache, part))[:, :, None], where, per_head=True)
                for cache in (student, target)
            )
            seen = self._seen.get((part, held)) or Seen.empty(own, other)
            self._seen[part, held] = seen.plus(own, other, int(where.sum()))

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the space from everything observed, and forget the sums.

        KavaError with fewer than 2 valid positions in either half of the examples.
        """
        halves = [self._seen.get((part, held)) for part in self.parts for held in (False, True)]
        fewest = min(0 if one is None else one.student.positions for one in halves)
        if fewest < 2:
            raise KavaError(
                f"kv_loss shared_space: {fewest} valid positions in a half of the observed examples, at "
                "least 2 are needed; check train.calibration_examples and the time warper"
            )
        for part in self.parts:
            self._set(part, self._seen[part, False], self._seen[part, True])
        self.ready.fill_(True)
        self._seen = {}

    def _set(self, part: Part, seen: Seen, held: Seen) -> None:
        kept: Tensor = getattr(self, f"{part}_correlation")
        dim = kept.shape[-1]
        whitening = [whiten(one.covariance[:, 0], self.config.ridge) for one in seen]
        crossed = whitening[0] @ seen.target.cross_covariance[:, 0] @ whitening[1]
        left, _, right = torch.linalg.svd(crossed, full_matrices=False)
        directions = (left[..., :dim], right.mT[..., :dim])
        maps = [turned.mT @ white for turned, white in zip(directions, whitening, strict=True)]
        kept.copy_(correlation(maps[0], maps[1], held).clamp_min(FEWEST))
        for side, one, white, turned, whole in zip(SIDES, seen, whitening, directions, maps, strict=True):
            name = f"{part}_{side}"
            getattr(self, f"{name}_mean").copy_(one.mean[:, 0])
            if self.config.trainable:
                getattr(self, f"{name}_whitening").copy_(white)
                getattr(self, f"{name}_directions").copy_(turned)
            else:
                getattr(self, f"{name}_map").copy_(whole)

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Σ weight × loss of the position, over positions, layers and parts; KavaError before ``finish``."""
        if not weight.is_meta:
            self._require_ready()
        where = live(weight)
        with without_autocast(weight.device):
            terms = [self._part(part, student, target, where, weight) for part in self.parts]
            return torch.stack(terms).sum()

    def _part(self, part: Part, student: Cache, target: Cache, where: Tensor, weight: Tensor) -> Tensor:
        mine, theirs = (
            self._mapped(select(widen(getattr(cache, part)), where), f"{part}_{side}")
            for cache, side in ((student, SIDES[0]), (target, SIDES[1]))
        )
        counts = getattr(self, f"{part}_correlation").to(mine.dtype)
        share = counts / counts.sum(-1, keepdim=True).clamp_min(torch.finfo(mine.dtype).tiny)
        each = ((mine - theirs).square() * share[:, None]).sum(-1)
        return torch.where(where[:, :, 0, :, 0], each * weight.to(each.dtype), 0).sum()

    def _mapped(self, x: Tensor, name: str) -> Float[Tensor, "batch layer time _"]:
        # Subtracted before rounding: the mean of a channel can be much larger than its spread.
        centred = (merged(x) - getattr(self, f"{name}_mean")[:, None]).to(x.dtype)
        return centred @ self._map(name).to(x.dtype).mT

    def _map(self, name: str) -> Float[Tensor, "layer _ _"]:
        if not self.config.trainable:
            found: Tensor = getattr(self, f"{name}_map")
            return found
        turned = orthonormal(getattr(self, f"{name}_directions"))
        return turned.mT @ getattr(self, f"{name}_whitening")

    def _require_ready(self) -> None:
        # Remembered, because reading the flag waits for the device.
        if not self._checked and not self.ready:
            raise KavaError("kv_loss shared_space: used before it has seen data; call observe() and finish()")
        self._checked = True


def correlation(
    mine: Float[Tensor, "layer tap dim"], theirs: Float[Tensor, "layer tap t_dim"], seen: Seen
) -> Float[Tensor, "layer tap"]:
    """Of what two maps make of the rows that were seen, direction by direction; 0 where one does not vary."""
    own, other = (
        (one @ moments.covariance[:, 0] * one).sum(-1)
        for one, moments in ((mine, seen.student), (theirs, seen.target))
    )
    crossed = (mine @ seen.target.cross_covariance[:, 0] * theirs).sum(-1)
    spread = (own * other).clamp_min(0).sqrt()
    return torch.where(spread > 0, crossed / spread, 0)


def merged(x: Float[Tensor, "batch layer head time dim"]) -> Float[Tensor, "batch layer time _"]:
    """All heads side by side."""
    flat: Tensor = rearrange(x, "batch layer head time dim -> batch layer time (head dim)")
    return flat


def whiten(covariance: Float[Tensor, "layer dim dim"], ridge: float) -> Float[Tensor, "layer dim dim"]:
    """The symmetric inverse root of the covariance, to whose diagonal ``ridge`` times its mean is added.

    0 where nothing varies.
    """
    variance, directions = torch.linalg.eigh(covariance)
    variance = variance.clamp_min(0)
    raised = variance + ridge * variance.mean(-1, keepdim=True)
    inverse = torch.where(raised > 0, raised.rsqrt(), 0)
    return directions * inverse[..., None, :] @ directions.mT


def orthonormal(x: Float[Tensor, "layer dim _"]) -> Float[Tensor, "layer dim _"]:
    """The orthonormal columns that ``x`` becomes by Gram and Schmidt's procedure, signs kept."""
    q, r = torch.linalg.qr(x)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
