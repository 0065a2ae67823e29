"""Rotary position embeddings: undo and redo a model's own rotation of keys and queries.

A rotation multiplies each pair of channels by ``a · (cos θ, sin θ)``, where ``a`` is the attention scaling of
some frequency schemes (YaRN, longrope) and carries the rounding of low-precision angles. With
``a² = cos² + sin²`` the inverse is the same function at ``(cos / a², −sin / a²)``, so the model's own
``apply_rotary_pos_emb`` undoes itself, whichever channels it pairs. RoFormer: https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

Apply = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A model's ``apply_rotary_pos_emb(q, k, cos, sin)`` for tensors ``batch head time dim``."""


class Angles(NamedTuple):
    """What one forward pass rotated a layer with."""

    cos: Float[Tensor, "_ time _"]
    sin: Float[Tensor, "_ time _"]
    width: int
    """Leading channels of a head that were given to the rotation; the others were passed by."""


def unrotate(
    x: Float[Tensor, "batch layer head time dim"],
    cos: Float[Tensor, "_ time _"],
    sin: Float[Tensor, "_ time _"],
    apply: Apply,
    width: int | None = None,
) -> Float[Tensor, "batch layer head time dim"]:
    """The tensor before ``apply`` rotated its first ``width`` channels (default: it saw them all).

    All layers must share the angles. Computed in float32 at least; the dtype of ``x`` is kept.
    """
    cos, sin = cos.to(_wide(x)), sin.to(_wide(x))
    square = cos.square() + sin.square()
    return rerotate(x, cos / square, -sin / square, apply, width)


def rerotate(
    x: Float[Tensor, "batch layer head time dim"],
    cos: Float[Tensor, "_ time _"],
    sin: Float[Tensor, "_ time _"],
    apply: Apply,
    width: int | None = None,
) -> Float[Tensor, "batch layer head time dim"]:
    """Rotate the first ``width`` channels by a model's own function and (any model's) angles."""
    folded = rearrange(x, "batch layer head time dim -> batch (layer head) time dim").to(_wide(x))
    turned, passed = folded[..., :width], folded[..., x.shape[-1] if width is None else width :]
    turned, _ = apply(turned, turned[:, :0], cos.to(_wide(x)), sin.to(_wide(x)))
    whole = torch.cat([turned, passed], dim=-1).to(x.dtype)
    return rearrange(whole, "batch (layer head) time dim -> batch layer head time dim", layer=x.shape[1])


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
