"""Undo and redo a model's own rotation of keys and queries (rotary position embeddings).

A rotation multiplies each pair of channels by ``a · (cos θ, sin θ)``. The attention scaling ``a`` differs
from 1 in some frequency schemes (YaRN, longrope) and by the rounding of low-precision angles. With ``a² =
cos² + sin²`` the inverse is the same function at ``(cos / a², −sin / a²)``, so the model's own
``apply_rotary_pos_emb`` undoes itself, whichever channels it pairs.

Source: RoFormer (RoPE), https://arxiv.org/abs/2104.09864
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from kava_core.errors import KavaError

Apply = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""A model's ``apply_rotary_pos_emb(q, k, cos, sin)`` for tensors ``batch head time dim``."""


class Angles(NamedTuple):
    """What one forward pass rotated a layer with."""

    cos: Float[Tensor, "_ time _"]
    sin: Float[Tensor, "_ time _"]
    width: int
    """Leading channels of a head that were given to the rotation; the others were passed by."""


class PairedTurn(NamedTuple):
    """Layers that were rotated alike."""

    layers: tuple[int, ...]
    """Their places along the axis ``layer``."""
    angles: Angles | None
    """None: they were not rotated."""
    function: Apply | None
    """The model's own function; None: they were not rotated."""


@dataclass(frozen=True)
class Rotation:
    """How a forward pass rotated the layers that were captured; it can be undone, or done to other tensors.

    Layers keep their own angles and width: local and global ones, and those without rotation.
    """

    turns: tuple[PairedTurn, ...]
    """Every layer is in exactly one of them."""
    dim: int
    """Width of a head."""

    def apply(
        self, x: Float[Tensor, "batch layer head time dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Rotate as the forward pass did, its scaling included.

        Any number of heads, but the same layers, positions and width. Computed in float32 at least; the dtype
        of ``x`` is kept.

        Raises:
            KavaError: ``x`` has another number of layers or another width.
        """
        return self._each(x, rerotate)

    def undo(
        self, x: Float[Tensor, "batch layer head time dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Undo what ``apply`` does; raises as it does."""
        return self._each(x, unrotate)

    def at(self, layer: int) -> Rotation:
        """Return the rotation of a single layer, by its index along the axis ``layer``."""
        paired_turn = next(turn for turn in self.turns if layer in turn.layers)
        return Rotation((paired_turn._replace(layers=(0,)),), self.dim)

    def _each(self, x: Tensor, turn: Callable[..., Tensor]) -> Tensor:
        self._check(x)
        if len(self.turns) == 1:
            return _turned(x, self.turns[0], turn)
        layers = [torch.tensor(paired_turn.layers, device=x.device) for paired_turn in self.turns]
        parts = []
        for layers_of_turn, paired_turn in zip(layers, self.turns, strict=True):
            parts.append(_turned(x.index_select(1, layers_of_turn), paired_turn, turn))
        return torch.cat(parts, dim=1).index_select(1, torch.cat(layers).argsort())

    def _check(self, x: Tensor) -> None:
        layers = sum(len(paired_turn.layers) for paired_turn in self.turns)
        if (x.shape[1], x.shape[-1]) != (layers, self.dim):
            raise KavaError(
                f"this rotation is of {layers} layers and heads {self.dim} wide, "
                f"not of {x.shape[1]} layers and heads {x.shape[-1]} wide"
            )


def unrotate(
    x: Float[Tensor, "batch layer head time dim"],
    cos: Float[Tensor, "_ time _"],
    sin: Float[Tensor, "_ time _"],
    apply: Apply,
    width: int | None = None,
) -> Float[Tensor, "batch layer head time dim"]:
    """Undo the rotation that ``apply`` did; all layers must share the angles.

    Computed in float32 at least; the dtype of ``x`` is kept.

    Args:
        x: rotated keys or queries.
        cos: cosines of the angles, times the attention scaling.
        sin: sines, likewise.
        apply: the model's own function.
        width: how many leading channels were rotated; None: all.
    """
    cos, sin = cos.to(_in_wide_precision(x)), sin.to(_in_wide_precision(x))
    square = cos.square() + sin.square()
    return rerotate(x, cos / square, -sin / square, apply, width)


def rerotate(
    x: Float[Tensor, "batch layer head time dim"],
    cos: Float[Tensor, "_ time _"],
    sin: Float[Tensor, "_ time _"],
    apply: Apply,
    width: int | None = None,
) -> Float[Tensor, "batch layer head time dim"]:
    """Rotate by a model's own function and (any model's) angles.

    Computed in float32 at least; the dtype of ``x`` is kept.

    Args:
        x: keys or queries that are not rotated.
        cos: cosines of the angles, times the attention scaling.
        sin: sines, likewise.
        apply: the model's own function.
        width: how many leading channels to rotate; None: all.
    """
    folded = rearrange(x, "batch layer head time dim -> batch (layer head) time dim").to(
        _in_wide_precision(x)
    )
    turned, passed = folded[..., :width], folded[..., x.shape[-1] if width is None else width :]
    turned, _ = apply(turned, turned[:, :0], cos.to(_in_wide_precision(x)), sin.to(_in_wide_precision(x)))
    whole = torch.cat([turned, passed], dim=-1).to(x.dtype)
    return rearrange(whole, "batch (layer head) time dim -> batch layer head time dim", layer=x.shape[1])


def _turned(x: Tensor, paired_turn: PairedTurn, turn: Callable[..., Tensor]) -> Tensor:
    angles, function = paired_turn.angles, paired_turn.function
    if angles is None or function is None:
        return x
    return turn(x, angles.cos.to(x.device), angles.sin.to(x.device), function, angles.width)


def _in_wide_precision(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
