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
from kava_core.kv.axes import Cache, Geometry
from kava_core.kv.masks import live, select, widen, without_autocast
from kava_core.kv.moments import Moments, rows_of
from kava_plugins.kv_losses import SharedSpace as Config

SIDES = ("student", "target")


class Seen(NamedTuple):
    """Moments of both sides; each is the other's ``like``."""

    student: Moments
    target: Moments


class SharedSpace(nn.Module):
    """Mean squared distance in the shared space, whose directions count by their correlation.

    Both sides are whitened by their covariances before training, then turned to ``dim`` orthonormal
    directions. Training these (``trainable``) cannot shrink the space to a point, as the whitening is fixed.
    """

    ready: Bool[Tensor, ""]

    def __init__(self, config: Config, *, teacher: Geometry, student: Geometry) -> None:
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
        self._seen: dict[Part, Seen] = {}
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
        positions = int(valid.sum())
        if not positions:
            return
        for part in self.parts:
            own, other = (
                rows_of(merged(getattr(cache, part))[:, :, None], valid, per_head=True)
                for cache in (student, target)
            )
            seen = self._seen.get(part) or Seen(Moments.empty(own, other), Moments.empty(other, own))
            self._seen[part] = Seen(
                seen.student.plus(own, other, positions), seen.target.plus(other, own, positions)
            )

    @torch.no_grad()
    def finish(self) -> None:
        """Compute the space from everything observed, and forget the sums.

        KavaError with fewer than 2 valid positions.
        """
        fewest = min((seen.student.positions for seen in self._seen.values()), default=0)
        if fewest < 2:
            raise KavaError(
                f"kv_loss shared_space: {fewest} valid positions were observed, at least 2 are needed; "
                "check train.calibration_examples and the time warper"
            )
        for part, seen in self._seen.items():
            self._set(part, seen)
        self.ready.fill_(True)
        self._seen = {}

    def _set(self, part: Part, seen: Seen) -> None:
        correlation: Tensor = getattr(self, f"{part}_correlation")
        dim = correlation.shape[-1]
        whitening = [whiten(one.covariance[:, 0], self.config.ridge) for one in seen]
        crossed = whitening[0] @ seen.target.cross_covariance[:, 0] @ whitening[1]
        left, singular, right = torch.linalg.svd(crossed, full_matrices=False)
        correlation.copy_(singular[:, :dim])
        directions = (left[..., :dim], right.mT[..., :dim])
        for side, one, white, turned in zip(SIDES, seen, whitening, directions, strict=True):
            name = f"{part}_{side}"
            getattr(self, f"{name}_mean").copy_(one.mean[:, 0])
            if self.config.trainable:
                getattr(self, f"{name}_whitening").copy_(white)
                getattr(self, f"{name}_directions").copy_(turned)
            else:
                getattr(self, f"{name}_map").copy_(turned.mT @ white)

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
        correlation = getattr(self, f"{part}_correlation").to(mine.dtype)
        share = correlation / correlation.sum(-1, keepdim=True).clamp_min(torch.finfo(mine.dtype).tiny)
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
