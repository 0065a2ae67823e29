"""One matrix for each layer, without bias: from the teacher's width of a head to the student's."""

from __future__ import annotations

import math

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.axes import PARTS, Geometry
from kava_plugins.dim_projectors import Linear as Config


class Linear(nn.Module):
    """Each layer's matrix serves all its heads or one of them, keys and values together or one of them.

    Queries go through the keys' matrix where heads share one, so that scores stay comparable; otherwise they
    have their own, because query heads are counted differently.
    """

    linear = True

    def __init__(self, config: Config, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.shared_width = config.share_heads
        self.owner: dict[Part, Part] = {
            "keys": "keys",
            "values": "keys" if config.share_kv else "values",
            "queries": "keys" if config.share_heads else "queries",
        }
        for order, part in enumerate(PARTS):
            if self.owner[part] == part and teacher.heads(part):
                head = 1 if config.share_heads else teacher.heads(part)
                matrix = _initial(config, teacher.layer, head, student.dim, teacher.dim, config.seed + order)
                self.register_parameter(part, nn.Parameter(matrix, requires_grad=config.trainable))

    def forward(
        self, x: Float[Tensor, "batch layer head time t_dim"], part: Part
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Every head's vectors times its matrix."""
        return project(x, getattr(self, self.owner[part]))


def project(
    x: Float[Tensor, "batch layer head time t_dim"], matrix: Float[Tensor, "layer _ dim t_dim"]
) -> Float[Tensor, "batch layer head time dim"]:
    """``matrix`` (its head axis 1, or that of ``x``) times the width of ``x``."""
    pattern = "batch layer head time t_dim, layer head dim t_dim -> batch layer head time dim"
    if matrix.shape[1] == 1:
        matrix, pattern = matrix[:, 0], pattern.replace("layer head dim t_dim", "layer dim t_dim")
    projected: Tensor = einsum(x, matrix.to(x.dtype), pattern)
    return projected


def _initial(
    config: Config, layer: int, head: int, dim: int, t_dim: int, seed: int
) -> Float[Tensor, "layer head dim t_dim"]:
    """Orthonormal rows (columns, where ``dim`` is the larger), or normal with variance 1/t_dim."""
    device = torch.get_default_device()
    if device.type == "meta":
        return torch.empty(layer, head, dim, t_dim)
    generator = torch.Generator(device="cpu").manual_seed(seed)
    drawn = torch.randn(layer, head, dim, t_dim, generator=generator, device="cpu")
    if config.init == "random":
        return (drawn / math.sqrt(t_dim)).to(device)
    tall = drawn if dim >= t_dim else drawn.mT
    columns, triangle = torch.linalg.qr(tall)
    basis: Tensor = columns * triangle.diagonal(dim1=-2, dim2=-1).sign()[..., None, :]
    return (basis if dim >= t_dim else basis.mT).contiguous().to(device)
