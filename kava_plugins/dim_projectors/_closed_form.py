"""Compute projections in closed form from the moments of paired rows, one for each layer and head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.kv.maths.moments import Moments

Projection = Float[Tensor, "layer head dim t_dim"]


def principal_components(moments: Moments) -> Projection:
    """Return the ``dim`` directions of largest variance of ``x``; the largest entry of each is positive.

    Rows beyond the width of ``x`` are zero.

    Source: Pearson 1901.
    """
    dim = moments.cross.shape[-2]
    directions = torch.linalg.eigh(moments.covariance).eigenvectors.mT.flip(-2)[..., :dim, :]
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    basis = torch.zeros_like(moments.cross)
    basis[..., : directions.shape[-2], :] = directions * largest.sign()
    return basis


def procrustes_map(moments: Moments) -> Projection:
    """Return a rotation from ``x`` to ``like`` times one scale.

    The rotation has orthonormal columns (rows, if ``dim`` is the smaller) and the largest covariance with
    ``like``; for ``dim`` at least the width of ``x`` it is the best in the sense of least squares. The scale
    is then the best one; 0 if ``x`` or ``like`` does not vary.

    Source: Schönemann 1966; the scale: Gower 1975.
    """
    left, singular, right = torch.linalg.svd(moments.cross_covariance, full_matrices=False)
    rotation = left @ right
    spread = ((rotation @ moments.covariance) * rotation).sum((-2, -1))
    scale = torch.where(spread > 0, singular.sum(-1) / spread, 0)
    return scale[..., None, None] * rotation


def ridge_map(moments: Moments, strength: float) -> Projection:
    """Return the ridge regression from ``x`` to ``like``, its intercept not penalised.

    The penalty is ``strength`` times the mean variance of the channels of ``x``. 0 if ``x`` does not vary.

    Source: Hoerl and Kennard 1970.
    """
    variance, directions = torch.linalg.eigh(moments.covariance)
    variance = variance.clamp_min(0)
    penalised = variance + strength * variance.mean(-1, keepdim=True)
    inverse = torch.where(penalised > 0, 1 / penalised, 0)
    return (moments.cross_covariance @ directions * inverse[..., None, :]) @ directions.mT
