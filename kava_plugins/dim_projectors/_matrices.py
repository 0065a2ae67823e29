"""The matrices of projectors: how they are applied, how they start, and which parts share them."""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from kava_core.config import Part


def project(
    x: Float[Tensor, "batch layer head time t_dim"], matrix: Float[Tensor, "layer _ dim t_dim"]
) -> Float[Tensor, "batch layer head time dim"]:
    """``matrix`` (its head axis 1, or that of ``x``) times the width of ``x``, in the dtype of ``x``."""
    head, time = x.shape[2:4]
    if matrix.shape[1] == 1:
        x = rearrange(x, "batch layer head time t_dim -> batch layer 1 (head time) t_dim")
    projected = _batched(x, matrix.to(x.dtype))
    return projected.reshape(*x.shape[:2], head, time, matrix.shape[2])


def _batched(
    x: Float[Tensor, "batch layer head time t_dim"], matrix: Float[Tensor, "layer head dim t_dim"]
) -> Float[Tensor, "batch layer head time dim"]:
    # Matmul copies the matrix for every example, and again its gradient; einsum copies the vectors.
    if x.shape[3] >= 2 * matrix.shape[2]:
        return x @ matrix.mT
    pattern = "batch layer head time t_dim, layer head dim t_dim -> batch layer head time dim"
    projected: Tensor = einsum(x, matrix, pattern)
    return projected


def owners(*, share_heads: bool, share_kv: bool) -> dict[Part, Part]:
    """Whose matrices each part goes through.

    Queries take the keys' where heads share one, so that scores stay comparable; otherwise they have their
    own, because query heads are counted differently.
    """
    return {
        "keys": "keys",
        "values": "keys" if share_kv else "values",
        "queries": "keys" if share_heads else "queries",
    }


def normal(shape: tuple[int, int, int, int], *, seed: int) -> Float[Tensor, "layer head dim t_dim"]:
    """Normal with variance 1 / t_dim, so that lengths stay alike; the seed alone decides."""
    return (_drawn(shape, seed) / math.sqrt(shape[-1])).to(torch.get_default_device())


def orthogonal(shape: tuple[int, int, int, int], *, seed: int) -> Float[Tensor, "layer head dim t_dim"]:
    """Orthonormal rows, or columns where ``dim`` is the larger; the seed alone decides."""
    device = torch.get_default_device()
    if device.type == "meta":
        return torch.empty(shape)
    drawn = _drawn(shape, seed)
    wide = shape[2] < shape[3]
    columns, triangle = torch.linalg.qr(drawn.mT if wide else drawn)
    basis: Tensor = columns * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return (basis.mT if wide else basis).contiguous().to(device)


def _drawn(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    return torch.randn(shape, generator=torch.Generator(device="cpu").manual_seed(seed), device="cpu")
