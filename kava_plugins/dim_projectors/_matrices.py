"""Apply the matrices of projectors, draw their first values, and decide which parts share them."""

from __future__ import annotations

import math

import torch
from einops import einsum, rearrange
from jaxtyping import Float
from torch import Tensor

from kava_core.config import Part


def apply_matrices(
    x: Float[Tensor, "batch layer head time t_dim"], matrix: Float[Tensor, "layer _ dim t_dim"]
) -> Float[Tensor, "batch layer head time dim"]:
    """Multiply every vector of ``x`` by the matrix of its layer and head, in the dtype of ``x``.

    The head axis of ``matrix`` is that of ``x``, or 1 if all heads share one.
    """
    head, time = x.shape[2:4]
    if matrix.shape[1] == 1:
        x = rearrange(x, "batch layer head time t_dim -> batch layer 1 (head time) t_dim")
    projected = _batched_product(x, matrix.to(x.dtype))
    return projected.reshape(*x.shape[:2], head, time, matrix.shape[2])


def _batched_product(
    x: Float[Tensor, "batch layer head time t_dim"], matrix: Float[Tensor, "layer head dim t_dim"]
) -> Float[Tensor, "batch layer head time dim"]:
    # Matmul copies the matrix for every example, and again its gradient; einsum copies the vectors.
    if x.shape[3] >= 2 * matrix.shape[2]:
        return x @ matrix.mT
    pattern = "batch layer head time t_dim, layer head dim t_dim -> batch layer head time dim"
    projected: Tensor = einsum(x, matrix, pattern)
    return projected


def matrix_owners(*, share_heads: bool, share_kv: bool) -> dict[Part, Part]:
    """Return for each part the part whose matrices it goes through.

    Queries take the keys' if heads share one, so that scores stay comparable; otherwise they have their own,
    because query heads are counted differently.
    """
    return {
        "keys": "keys",
        "values": "keys" if share_kv else "values",
        "queries": "keys" if share_heads else "queries",
    }


def normal_matrices(shape: tuple[int, int, int, int], *, seed: int) -> Float[Tensor, "layer head dim t_dim"]:
    """Draw normal numbers of variance 1 / t_dim, so that lengths stay alike; the seed alone decides."""
    return (_draw_normal(shape, seed) / math.sqrt(shape[-1])).to(torch.get_default_device())


def orthogonal_matrices(
    shape: tuple[int, int, int, int], *, seed: int
) -> Float[Tensor, "layer head dim t_dim"]:
    """Draw matrices of orthonormal rows, or columns if ``dim`` is the larger; the seed alone decides."""
    device = torch.get_default_device()
    if device.type == "meta":
        return torch.empty(shape)
    drawn = _draw_normal(shape, seed)
    wide = shape[2] < shape[3]
    columns, triangle = torch.linalg.qr(drawn.mT if wide else drawn)
    # QR leaves the signs open; with a positive diagonal the result is unique.
    signs = triangle.diagonal(dim1=-2, dim2=-1).sign()
    basis: Tensor = columns * signs[..., None, :]
    return (basis.mT if wide else basis).contiguous().to(device)


def _draw_normal(shape: tuple[int, int, int, int], seed: int) -> Tensor:
    if torch.get_default_device().type == "meta":
        return torch.empty(shape)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, device="cpu")
