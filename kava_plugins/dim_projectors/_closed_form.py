"""Matrices in closed form from the moments of paired rows, one for each layer and head."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.kv.maths.moments import Moments

Matrix = Float[Tensor, "layer head dim t_dim"]


def principal_components(moments: Moments) -> Matrix:
    """The ``dim`` directions of largest variance of ``x``; the largest entry of each is positive.

    Rows beyond the width of ``x`` are zero.
    """
    dim = moments.cross.shape[-2]
    directions = torch.linalg.eigh(moments.covariance).eigenvectors.mT.flip(-2)[..., :dim, :]
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    basis = torch.zeros_like(moments.cross)
    basis[..., : directions.shape[-2], :] = directions * largest.sign()
    return basis


def procrustes(moments: Moments) -> Matrix:
    """A rotation from ``x`` to ``like`` times one scale (Schönemann 1966; scale: Gower 1975).

    The rotation has orthonormal columns (rows, where ``dim`` is the smaller) and the largest covariance with
    ``like``; for ``dim`` at least the width of ``x`` it is the best in the sense of least squares. The scale
    is then the best one; 0 where ``x`` or ``like`` does not vary.
    """
    left, singular, right = torch.linalg.svd(moments.cross_covariance, full_matrices=False)
    rotation = left @ right
    spread = ((rotation @ moments.covariance) * rotation).sum((-2, -1))
    scale = torch.where(spread > 0, singular.sum(-1) / spread, 0)
    return scale[..., None, None] * rotation


def ridge(moments: Moments, strength: float) -> Matrix:
    """Least squares from ``x`` to ``like`` with an unpenalised intercept (Hoerl and Kennard 1970).

    The penalty is ``strength`` times the mean variance of the channels of ``x``. 0 where ``x`` does not vary.
    """
    variance, directions = torch.linalg.eigh(moments.covariance)
    variance = variance.clamp_min(0)
    penalised = variance + strength * variance.mean(-1, keepdim=True)
    inverse = torch.where(penalised > 0, 1 / penalised, 0)
    return (moments.cross_covariance @ directions * inverse[..., None, :]) @ directions.mT
