"""Choose in which order the axes of a cache are aligned: the order with the fewest multiplications.

Maps on different axes commute when they are affine, so the pipeline, not the component, chooses. Layers
always come first: they are selected before anything is computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import Literal

Stage = Literal["heads", "time", "width"]
CANONICAL: tuple[Stage, ...] = ("heads", "time", "width")


@dataclass(frozen=True)
class StageExtents:
    """Extents before and after alignment of one layer of one part."""

    t_head: int
    head: int
    t_time: int
    time: int
    t_dim: int
    dim: int
    taps: int = 2
    """Teacher positions read for one student position; 0 where time is not changed."""


@dataclass(frozen=True)
class Commuting:
    """Which stages may be exchanged without changing the result."""

    linear_heads: bool = False
    """The head adapter is affine."""
    linear_width: bool = False
    """The projector is affine."""
    shared_width: bool = False
    """The projector treats every head alike, so it may come before the heads are mixed."""

    def allows(self, order: tuple[Stage, ...]) -> bool:
        """Return whether this order gives the same result as the canonical one."""
        heads, time, width = (order.index(stage) for stage in CANONICAL)
        return (
            (heads < time or self.linear_heads)
            and (time < width or self.linear_width)
            and (heads < width or (self.shared_width and self.linear_width and self.linear_heads))
        )


def multiplications(order: tuple[Stage, ...], extents: StageExtents) -> int:
    """Count the multiplications that an order takes, for one layer of one example."""
    head, time, dim = extents.t_head, extents.t_time, extents.t_dim
    total = 0
    for stage in order:
        if stage == "heads":
            total += 0 if head == extents.head else head * extents.head * time * dim
            head = extents.head
        elif stage == "time":
            total += extents.taps * head * extents.time * dim
            time = extents.time
        else:
            total += 0 if dim == extents.dim else head * time * dim * extents.dim
            dim = extents.dim
    return total


@lru_cache(maxsize=4096)
def cheapest_order(extents: StageExtents, freedom: Commuting) -> tuple[Stage, ...]:
    """Return the allowed order with the fewest multiplications; the canonical one among equals."""
    allowed = [order for order in permutations(CANONICAL) if freedom.allows(order)]
    return min(allowed, key=lambda order: (multiplications(order, extents), order != CANONICAL))
