"""Comparing two matrices of products row by row, without either matrix: blocks of rows, gradients on the way.

Each side has a matrix ``queries · keysᵀ`` over time. A ``compare`` function turns a block of rows of both
into one number a row and its derivative by every product. These derivatives are used at once, while the block
is there, so the backward pass needs no products and memory is linear in time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import lcm
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MASKED = -1e30
"""A product that does not count: finite, so that differences of two of them are 0, not NaN."""

ROWS = 64
"""Most query positions in a block."""

ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
"""Most products of one side in a block: on a CPU all of a block's tensors stay in its cache."""

Compared = tuple[Tensor, Tensor | None, Tensor | None]
Compare = Callable[[Tensor, Tensor, bool], Compared]
"""``(mine, theirs, wanted) → (each row's number, its derivative by mine, by theirs if wanted)``."""


class Side(NamedTuple):
    """Queries and keys of one side. ``qhead`` is a multiple of ``head``: neighbours share a key head."""

    queries: Float[Tensor, "batch qhead time dim"]
    keys: Float[Tensor, "batch head time dim"]


@dataclass(frozen=True)
class Masking:
    """Which products count."""

    causal: bool
    """Only keys up to the row's own position."""
    live: Bool[Tensor, "batch time"] | None
    """Only these keys; None: all."""


def of_one_dtype(mine: Side, theirs: Side) -> tuple[Side, Side]:
    """Both sides in the wider dtype of all four."""
    dtype = mine.queries.dtype
    for x in (mine.keys, *theirs):
        dtype = torch.promote_types(dtype, x.dtype)
    first, second = (Side(side.queries.to(dtype), side.keys.to(dtype)) for side in (mine, theirs))
    return first, second


def sum_of_rows(
    mine: Side, theirs: Side, weight: Float[Tensor, "batch time"], masking: Masking, compare: Compare
) -> Float[Tensor, ""]:
    """Σ weight × mean over query heads of what ``compare`` makes of each row.

    Both sides have the same query heads and dtype; key heads and widths are their own. Nothing may be NaN,
    not even where the weight is 0. Gradients reach the four tensors, not the weight.
    """
    unit = lcm(*(side.queries.shape[1] // side.keys.shape[1] for side in (mine, theirs)))
    units = mine.queries.shape[1] // unit
    weight = (weight / mine.queries.shape[1]).repeat_interleave(units, 0)
    live = None if masking.live is None else masking.live.repeat_interleave(units, 0)
    tensors = [_split(x, units) for side in (mine, theirs) for x in side]
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    total: Tensor = _SumOfRows.apply(*tensors, weight, Masking(masking.causal, live), compare, wants)  # type: ignore[no-untyped-call]
    return total


def _split(x: Tensor, units: int) -> Tensor:
    """``units`` groups of heads that share no keys, on either side, as batch."""
    return x.unflatten(1, (units, x.shape[1] // units)).flatten(0, 1)


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, t_q, t_k, weight, masking, compare, wants = arguments
        mine, theirs = (
            _Worker(*pair, wants and any(ctx.needs_input_grad[i : i + 2]))
            for i, pair in ((0, (q, k)), (2, (t_q, t_k)))
        )
        total = weight.new_zeros(())
        for block in blocks(q):
            total = total + _compare_block(mine, theirs, weight, masking, compare, block)
        ctx.save_for_backward(*mine.gradients, *theirs.gradients)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if x is None else x * gradient for x in ctx.saved_tensors]
        return *found, None, None, None, None


def blocks(queries: Float[Tensor, "batch qhead time dim"]) -> Iterator[tuple[slice, slice]]:
    """Places along batch and time that are compared at once."""
    batch, heads, time, _ = queries.shape
    budget = ELEMENTS.get(queries.device.type, ELEMENTS["cuda"]) // max(1, heads * time)
    rows = min(ROWS, max(8, budget))
    several = max(1, budget // rows)
    for begin in range(0, batch, several):
        for first in range(0, time, rows):
            yield slice(begin, begin + several), slice(first, min(first + rows, time))


def _compare_block(
    mine: _Worker, theirs: _Worker, weight: Tensor, masking: Masking, compare: Compare, block: Any
) -> Tensor:
    batch, rows = block
    keys = slice(rows.stop if masking.causal else weight.shape[1])
    own, other = (side.products(batch, rows, keys) for side in (mine, theirs))
    for products in (own, other):
        _mask(products, masking, batch, rows)
    each, *derivatives = compare(own, other, theirs.wanted)
    row_weight = weight[batch, None, rows]
    for side, derivative in zip((mine, theirs), derivatives, strict=True):
        if side.wanted and derivative is not None:
            side.collect(derivative, row_weight[..., None], block, keys)
    return torch.where(row_weight != 0, each * row_weight, 0).sum()


def _mask(products: Tensor, masking: Masking, batch: slice, rows: slice) -> None:
    if masking.live is not None:
        products.masked_fill_(~masking.live[batch, None, None, : products.shape[-1]], MASKED)
    if masking.causal:
        count = rows.stop - rows.start
        later = torch.ones(count, count, dtype=torch.bool, device=products.device).triu_(1)
        products[..., rows].masked_fill_(later, MASKED)


class _Worker:
    """One side: makes products and collects gradients. Query heads of one key head are rows beside rows."""

    def __init__(self, queries: Tensor, keys: Tensor, wanted: bool) -> None:
        self.queries = queries.unflatten(1, (keys.shape[1], queries.shape[1] // keys.shape[1]))
        self.keys, self.wanted = keys, wanted
        self.d_queries = torch.zeros_like(self.queries) if wanted else None
        self.d_keys = torch.zeros_like(keys) if wanted else None

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        if self.d_queries is None:
            return None, None
        return self.d_queries.flatten(1, 2), self.d_keys

    def products(self, batch: slice, rows: slice, keys: slice) -> Tensor:
        queries = self.queries[batch, :, :, rows]
        found = queries.flatten(2, 3) @ self.keys[batch, :, keys].mT
        return found.unflatten(2, queries.shape[2:4]).flatten(1, 2)

    def collect(self, derivative: Tensor, weight: Tensor, block: tuple[slice, slice], keys: slice) -> None:
        """``weight``: of each row; it meets the narrow tensors, not the derivatives."""
        batch, rows = block
        queries, weight = self.queries[batch, :, :, rows], weight[:, None]
        folded = derivative.unflatten(1, queries.shape[1:3]).flatten(2, 3)
        moved = (folded @ self.keys[batch, :, keys]).view(queries.shape)
        self.d_queries[batch, :, :, rows] = moved * weight  # type: ignore[index]
        self.d_keys[batch, :, keys] += folded.mT @ (queries * weight).flatten(2, 3)  # type: ignore[index]
