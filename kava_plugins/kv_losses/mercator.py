"""Compare by one minus the cosine, vector by vector: the direction counts, the length does not."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.linalg import vector_norm

from kava_core.kv.maths.masks import live, weighted_sum, widen
from kava_core.protocols.axes import Cache, Geometry
from kava_plugins.kv_losses import MercatorConfig

TINY = 1e-10
"""Shorter vectors have no direction: loss 0, gradient 0."""


class Mercator(nn.Module):
    """Mean over heads of 1 − cos, in float32 or better."""

    def __init__(self, config: MercatorConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.parts = config.parts

    def forward(
        self, student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"]
    ) -> Float[Tensor, ""]:
        """Sum weight × loss of the position over positions, layers and parts."""
        where = live(weight)
        terms = []
        for part, x in student.pick(self.parts).items():
            distance = one_minus_cosine(widen(x), widen(getattr(target, part)), where)
            terms.append(weighted_sum(distance, weight))
        return torch.stack(terms).sum()


def one_minus_cosine(
    x: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    where: Bool[Tensor, "batch layer 1 time 1"],
) -> Float[Tensor, "batch layer head time 1"]:
    """Return 1 − cos of each pair of vectors; 0 elsewhere than ``where`` and if one has no direction.

    Computed as ½‖x̂ − t̂‖², which keeps its precision near 0, with the gradient in closed form: only one number
    for each vector is kept for it, no normalised copies.
    """
    distance: Tensor = _OneMinusCosine.apply(x, target, where)  # type: ignore[no-untyped-call]
    return distance


class _OneMinusCosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, target: Tensor, where: Tensor) -> Tensor:
        length = vector_norm(x, dim=-1, keepdim=True)
        t_length = vector_norm(target, dim=-1, keepdim=True)
        used = where & (length > TINY) & (t_length > TINY)
        inverse = torch.where(used, 1 / length, 0)
        t_inverse = torch.where(used, 1 / t_length, 0)
        squared_distance = (x * inverse - target * t_inverse).square().sum(-1, keepdim=True)
        one_minus_cos = torch.where(used, squared_distance / 2, 0)
        ctx.save_for_backward(x, target, inverse, t_inverse, 1 - one_minus_cos, used)
        return one_minus_cos

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the gradient by ``cos · x / |x|² − t / (|x| |t|)`` for x, and alike for the target."""
        x, target, inverse, t_inverse, cosine, used = ctx.saved_tensors
        cross = -gradient * inverse * t_inverse
        d_x = d_target = None
        if ctx.needs_input_grad[0]:
            d_x = torch.where(used, torch.addcmul(target * cross, x, gradient * cosine * inverse**2), 0)
        if ctx.needs_input_grad[1]:
            d_target = torch.where(
                used, torch.addcmul(x * cross, target, gradient * cosine * t_inverse**2), 0
            )
        return d_x, d_target, None
