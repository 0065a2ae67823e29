"""Define the words for axes, and two values that every component uses: Geometry and Cache.

``batch layer head time dim``, always in this order. ``head`` is a key/value head, ``qhead`` a query head,
``dim`` the width of one head; ``t_layer t_head t_time t_dim`` are the teacher's extents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.config import PARTS, Part
from kava_core.protocols.attention_logits import PRODUCTS, AttentionLogits

VOCABULARY = frozenset(
    {
        *("batch", "layer", "head", "qhead", "time", "dim"),
        *("teacher", "t_layer", "t_head", "t_qhead", "t_time", "t_dim"),
        *("tap", "hidden", "vocab"),
    }
)
"""Every axis name that an annotation or an einops pattern may use."""


@dataclass(frozen=True)
class Geometry:
    """Extents of a model's cache.

    They come from captured tensors, never from ``num_attention_heads``: grouped-query models have fewer
    key/value heads than query heads.
    """

    layer: int
    """Attention layers."""
    head: int
    """Key/value heads of a layer."""
    dim: int
    """Width of one head."""
    qhead: int
    """Query heads of a layer; components are built with 0 if no loss compares queries."""
    hidden: int
    """Width of the residual stream."""
    logits: AttentionLogits = PRODUCTS
    """How attention makes logits of queries and keys; components are built with products alone if no loss
    compares queries."""

    def heads(self, part: Part) -> int:
        """Return the number of heads of a part: query heads for queries, key/value heads otherwise."""
        return self.qhead if part == "queries" else self.head

    def with_(self, **extents: int) -> Geometry:
        """Return a copy with some extents changed."""
        fields: dict[str, Any] = {**extents}
        return replace(self, **fields)

    def attending_like(self, other: Geometry) -> Geometry:
        """Return a copy whose attention makes logits as that of another geometry."""
        return replace(self, logits=other.logits)

    def without_queries(self) -> Geometry:
        """Return a copy for components that meet keys and values alone."""
        return replace(self, qhead=0, logits=PRODUCTS)

    def __str__(self) -> str:
        extents = f"{self.layer} layers, {self.head} KV heads × {self.dim}"
        return f"{extents}, {self.logits}" if self.logits != PRODUCTS else extents


@dataclass(frozen=True)
class Cache:
    """Keys, values and queries of all chosen layers; a part that was not captured is None."""

    keys: Float[Tensor, "batch layer head time dim"] | None = None
    values: Float[Tensor, "batch layer head time dim"] | None = None
    queries: Float[Tensor, "batch layer qhead time dim"] | None = None
    """Scaled so that ``q · k / √dim`` is what the model's attention makes of a query and a key."""

    def items(self) -> Iterator[tuple[Part, Tensor]]:
        """Yield the captured parts with their names."""
        for part in PARTS:
            tensor = getattr(self, part)
            if tensor is not None:
                yield part, tensor

    def map(self, change: Callable[[Tensor, Part], Tensor]) -> Cache:
        """Return a cache with ``change(tensor, part)`` applied to every captured part."""
        return Cache(**{part: change(tensor, part) for part, tensor in self.items()})

    def pick(self, parts: tuple[Part, ...]) -> Cache:
        """Return a cache of these parts alone.

        Raises:
            KeyError: one of them was not captured.
        """
        captured = dict(self.items())
        return Cache(**{part: captured[part] for part in parts})

    @property
    def any(self) -> Tensor:
        """Return one of the parts, for its batch, layer and time extents, its device and dtype."""
        return next(tensor for _, tensor in self.items())


def meta_cache(geometry: Geometry, parts: tuple[Part, ...], *, batch: int, layer: int, time: int) -> Cache:
    """Return a cache of these extents on the meta device: shapes without values."""
    tensors = {}
    for part in parts:
        shape = (batch, layer, geometry.heads(part), time, geometry.dim)
        tensors[part] = torch.empty(shape, device="meta")
    return Cache(**tensors)
