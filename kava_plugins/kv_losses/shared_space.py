"""Compare in a space that both sides are mapped to, for models that share neither widths nor architecture.

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

LEAST_CORRELATION = 0.01
"""Correlation that every direction counts with at least."""


class PairedMoments(NamedTuple):
    """Moments of both sides; each is the other's ``like``."""

    student: Moments
    target: Moments

    @classmethod
    def empty(cls, own: Tensor, other: Tensor) -> PairedMoments:
        """Return moments of no rows; the origins are the means of these."""
        return cls(Moments.empty(own, other), Moments.empty(other, own))

    def plus(self, own: Tensor, other: Tensor, positions: int) -> PairedMoments:
        """Return the moments with these rows added."""
        student = self.student.plus(own, other, positions)
        target = self.target.plus(other, own, positions)
        return PairedMoments(student, target)


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
            widths = [side.heads(part) * side.dim for side in (student, teacher)]
            dim = min(config.dim, *widths)
            self.register_buffer(f"{part}_correlation", torch.zeros(student.layer, dim))
            for side, width in zip(SIDES, widths, strict=True):
                self._add_tensors(f"{part}_{side}", student.layer, width, dim)
        self.layered: tuple[str, ...] = tuple(name for name in self.state_dict())
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))
        self._seen: dict[tuple[Part, bool], PairedMoments] = {}
        self._examples = 0
        self._checked = False

    def _add_tensors(self, name: str, layer: int, width: int, dim: int) -> None:
        self.register_buffer(f"{name}_mean", torch.zeros(layer, width))
        if self.config.trainable:
            self.register_buffer(f"{name}_whitening", torch.zeros(layer, width, width))
            self.register_parameter(f"{name}_directions", nn.Parameter(torch.zeros(layer, width, dim)))
        else:
            self.register_buffer(f"{name}_map", torch.zeros(layer, dim, width))

    def observe(self, student: Cache, target: Cache, valid: Bool[Tensor, "batch time"]) -> None:
        """Add the valid positions of a batch to the sums of every part."""
        example_number = torch.arange(len(valid), device=valid.device)[:, None] + self._examples
        self._examples += len(valid)
        for held_out in (False, True):
            where = valid & (example_number % 2 == held_out)
            if where.any():
                self._add_rows(student, target, where, held_out)

    def _add_rows(self, student: Cache, target: Cache, where: Tensor, held_out: bool) -> None:
        for part in self.parts:
            own, other = _merged_rows(student, part, where), _merged_rows(target, part, where)
            moments = self._seen.get((part, held_out)) or PairedMoments.empty(own, other)
            self._seen[part, held_out] = moments.plus(own, other, int(where.sum()))

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the space from everything observed, and forget the sums.

        Raises:
            KavaError: either half of the examples has fewer than 2 valid positions.
        """
        halves = [self._seen.get((part, held_out)) for part in self.parts for held_out in (False, True)]
        fewest = min(0 if moments is None else moments.student.positions for moments in halves)
        if fewest < 2:
            raise KavaError(
                f"kv_loss shared_space: {fewest} valid positions in a half of the observed examples, at "
                "least 2 are needed; check train.calibration_examples and the time warper"
            )
        for part in self.parts:
            self._set_space(part, self._seen[part, False], self._seen[part, True])
        self.ready.fill_(True)
        self._seen = {}

    def _set_space(self, part: Part, seen: PairedMoments, held_out: PairedMoments) -> None:
        """Compute a part's directions from the moments seen, and their correlations from those held out.

        Source: Hotelling 1936, by the singular value decomposition of the whitened cross-covariance.
        """
        correlations: Tensor = getattr(self, f"{part}_correlation")
        dim = correlations.shape[-1]
        whitening = whitening_matrix(seen.student.covariance[:, 0], self.config.ridge)
        t_whitening = whitening_matrix(seen.target.covariance[:, 0], self.config.ridge)
        whitened_cross = whitening @ seen.target.cross_covariance[:, 0] @ t_whitening
        left, _, right = torch.linalg.svd(whitened_cross, full_matrices=False)
        directions, t_directions = left[..., :dim], right.mT[..., :dim]
        whole_map, t_whole_map = directions.mT @ whitening, t_directions.mT @ t_whitening
        measured = direction_correlations(whole_map, t_whole_map, held_out)
        correlations.copy_(measured.clamp_min(LEAST_CORRELATION))
        self._set_side(f"{part}_student", seen.student, whitening, directions, whole_map)
        self._set_side(f"{part}_target", seen.target, t_whitening, t_directions, t_whole_map)

    def _set_side(
        self, name: str, moments: Moments, whitening: Tensor, directions: Tensor, whole_map: Tensor
    ) -> None:
        getattr(self, f"{name}_mean").copy_(moments.mean[:, 0])
        if self.config.trainable:
            getattr(self, f"{name}_whitening").copy_(whitening)
            getattr(self, f"{name}_directions").copy_(directions)
        else:
            getattr(self, f"{name}_map").copy_(whole_map)

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions, layers and parts.

        Raises:
            KavaError: used before ``finish``.
        """
        if not weight.is_meta:
            self._require_ready()
        where = live(weight)
        with without_autocast(weight.device):
            terms = [self._part_loss(part, student, target, where, weight) for part in self.parts]
            return torch.stack(terms).sum()

    def _part_loss(self, part: Part, student: Cache, target: Cache, where: Tensor, weight: Tensor) -> Tensor:
        own = self._map_to_space(select(widen(getattr(student, part)), where), f"{part}_student")
        other = self._map_to_space(select(widen(getattr(target, part)), where), f"{part}_target")
        correlations = getattr(self, f"{part}_correlation").to(own.dtype)
        total = correlations.sum(-1, keepdim=True).clamp_min(torch.finfo(own.dtype).tiny)
        direction_weight = correlations / total
        loss = ((own - other).square() * direction_weight[:, None]).sum(-1)
        return torch.where(where[:, :, 0, :, 0], loss * weight.to(loss.dtype), 0).sum()

    def _map_to_space(self, x: Tensor, name: str) -> Float[Tensor, "batch layer time _"]:
        # Subtracted before rounding: the mean of a channel can be much larger than its spread.
        centred = (merge_heads(x) - getattr(self, f"{name}_mean")[:, None]).to(x.dtype)
        return centred @ self._whole_map(name).to(x.dtype).mT

    def _whole_map(self, name: str) -> Float[Tensor, "layer _ _"]:
        if not self.config.trainable:
            frozen_map: Tensor = getattr(self, f"{name}_map")
            return frozen_map
        directions = orthonormal_columns(getattr(self, f"{name}_directions"))
        return directions.mT @ getattr(self, f"{name}_whitening")

    def _require_ready(self) -> None:
        # Remembered, because reading the flag waits for the device.
        if not self._checked and not self.ready:
            raise KavaError("kv_loss shared_space: used before it has seen data; call observe() and finish()")
        self._checked = True


def direction_correlations(
    own_map: Float[Tensor, "layer tap dim"],
    target_map: Float[Tensor, "layer tap t_dim"],
    moments: PairedMoments,
) -> Float[Tensor, "layer tap"]:
    """Return the correlations of two maps' outputs, direction by direction; 0 if one is constant."""
    variance = (own_map @ moments.student.covariance[:, 0] * own_map).sum(-1)
    t_variance = (target_map @ moments.target.covariance[:, 0] * target_map).sum(-1)
    covariance = (own_map @ moments.target.cross_covariance[:, 0] * target_map).sum(-1)
    deviations = (variance * t_variance).clamp_min(0).sqrt()
    return torch.where(deviations > 0, covariance / deviations, 0)


def _merged_rows(cache: Cache, part: Part, where: Tensor) -> Float[Tensor, "layer 1 _ dim"]:
    return rows_of(merge_heads(getattr(cache, part))[:, :, None], where, per_head=True)


def merge_heads(x: Float[Tensor, "batch layer head time dim"]) -> Float[Tensor, "batch layer time _"]:
    """Put all heads side by side."""
    side_by_side: Tensor = rearrange(x, "batch layer head time dim -> batch layer time (head dim)")
    return side_by_side


def whitening_matrix(
    covariance: Float[Tensor, "layer dim dim"], ridge: float
) -> Float[Tensor, "layer dim dim"]:
    """Return the symmetric inverse root of the covariance, to whose diagonal ``ridge`` × its mean is added.

    0 if nothing varies.
    """
    variance, directions = torch.linalg.eigh(covariance)
    variance = variance.clamp_min(0)
    raised = variance + ridge * variance.mean(-1, keepdim=True)
    inverse_root = torch.where(raised > 0, raised.rsqrt(), 0)
    return directions * inverse_root[..., None, :] @ directions.mT


def orthonormal_columns(x: Float[Tensor, "layer dim _"]) -> Float[Tensor, "layer dim _"]:
    """Return the orthonormal columns that ``x`` becomes by Gram and Schmidt's procedure, signs kept."""
    q, r = torch.linalg.qr(x)
    return q * r.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
