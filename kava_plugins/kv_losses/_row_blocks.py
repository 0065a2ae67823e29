"""Comparing two matrices of products row by row, without either matrix: blocks of rows, gradients on the way.

Each side has a matrix ``queries · keysᵀ`` over time. A ``compare`` function turns a few rows of both into one
number a row and, in their place, its derivatives by every product. These are used at once, while the block
is there, so the backward pass needs no products and memory is linear in time. All blocks use the same memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import lcm, prod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

MASKED = -1e30
"""A product that does not count: finite, so that differences of two of them are 0, not NaN."""

ROWS = range(16, 65)
"""Query positions in a block: fewer multiply slowly, more waste products above the diagonal."""

ELEMENTS = {"cpu": 2**19, "cuda": 2**24}
"""Products of one side in a block, as far as ``ROWS`` leave the choice."""

PIECE = {"cpu": 2**17, "cuda": 2**24}
"""Products of one side that are compared at once, at least a row: on a CPU three such tensors stay in the
cache of a core (2 MiB)."""

Compare = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""``(mine, theirs, spare, weight, wanted) → [row, 1]``, each row's number. Given are products ``[row, key]``,
memory of their shape to write to, and weight ``[row, 1]``. ``mine`` is overwritten by weight × the number's
derivative by it, and so is ``theirs`` if ``wanted``."""


class Side(NamedTuple):
    """Queries and keys of one side. ``qhead`` is a multiple of ``head``: neighbours share a key head."""

    queries: Float[Tensor, "batch qhead time dim"]
    keys: Float[Tensor, "batch head time dim"]
    scale: float = 1.0
    """Factor of the products."""


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
    for x in (mine.keys, theirs.queries, theirs.keys):
        dtype = torch.promote_types(dtype, x.dtype)
    first, second = (Side(side.queries.to(dtype), side.keys.to(dtype), side.scale) for side in (mine, theirs))
    return first, second


def sum_of_rows(
    mine: Side, theirs: Side, weight: Float[Tensor, "batch time"], masking: Masking, compare: Compare
) -> Float[Tensor, ""]:
    """Σ weight × mean over query heads of what ``compare`` makes of each row.

    Both sides have the same query heads and dtype; key heads and widths are their own. Nothing may be NaN,
    not even where the weight is 0. Gradients reach the four tensors and the weight.
    """
    unit = lcm(*(side.queries.shape[1] // side.keys.shape[1] for side in (mine, theirs)))
    units = mine.queries.shape[1] // unit
    weight = (weight / mine.queries.shape[1]).repeat_interleave(units, 0)
    live = None if masking.live is None else masking.live.repeat_interleave(units, 0)
    tensors = [_split(x, units) for side in (mine, theirs) for x in (side.queries, side.keys)]
    wants = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    options = (Masking(masking.causal, live), compare, (mine.scale, theirs.scale), wants)
    total: Tensor = _SumOfRows.apply(*tensors, weight, *options)  # type: ignore[no-untyped-call]
    return total


def _split(x: Tensor, units: int) -> Tensor:
    """``units`` groups of heads that share no keys, on either side, as batch."""
    return x.unflatten(1, (units, x.shape[1] // units)).flatten(0, 1)


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, t_q, t_k, weight, masking, compare, scales, wants = arguments
        mine, theirs = (
            _Worker(Side(*pair, scale), wants and any(ctx.needs_input_grad[i : i + 2]))
            for i, pair, scale in zip((0, 2), ((q, k), (t_q, t_k)), scales, strict=True)
        )
        each = _Comparison(mine, theirs, weight, masking, compare).each(blocks(q))
        ctx.save_for_backward(*mine.gradients, *theirs.gradients, each)
        return (each * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        found = [None if x is None else x * gradient for x in ctx.saved_tensors]
        return *found, None, None, None, None


def blocks(queries: Float[Tensor, "batch qhead time dim"]) -> Iterator[tuple[slice, slice]]:
    """Places along batch and time whose products are made at once."""
    batch, heads, time, _ = queries.shape
    budget = _limit(ELEMENTS, queries) // max(1, heads * time)
    rows = min(ROWS[-1], max(ROWS[0], budget))
    several = max(1, budget // rows)
    for begin in range(0, batch, several):
        for first in range(0, time, rows):
            yield slice(begin, min(begin + several, batch)), slice(first, min(first + rows, time))


def _limit(limits: dict[str, int], x: Tensor) -> int:
    return limits.get(x.device.type, limits["cuda"])


class _Comparison:
    """Both sides at work, on one block after another."""

    def __init__(
        self, mine: _Worker, theirs: _Worker, weight: Tensor, masking: Masking, compare: Compare
    ) -> None:
        self.mine, self.theirs, self.compare = mine, theirs, compare
        self.weight, self.causal = weight, masking.causal
        self.dead = None if masking.live is None else _unless(masking.live, weight)[:, None, None]
        self.later = _unless(weight.new_ones(ROWS[-1], ROWS[-1], dtype=torch.bool).tril_(), weight)
        self._spare = _Memory(weight, weight.shape[1])

    def each(self, places: Iterable[tuple[slice, slice]]) -> Float[Tensor, "batch time"]:
        """Every row's number, summed over query heads; 0 where the weight is."""
        found = torch.zeros_like(self.weight)
        for batch, rows in places:
            found[batch, rows] = self._block(batch, rows)
        return torch.where(self.weight != 0, found, 0)

    def _block(self, batch: slice, rows: slice) -> Float[Tensor, "batch time"]:
        """The numbers of a block's rows."""
        keys = slice(rows.stop if self.causal else self.weight.shape[1])
        own, other = (side.products(batch, rows, keys) for side in (self.mine, self.theirs))
        for products in (own, other):
            self._mask(products, batch, rows)
        weight = self.weight[batch, None, rows].expand(own.shape[:3]).reshape(-1, 1)
        found = self._pieces(own.flatten(0, 2), other.flatten(0, 2), weight).view(own.shape[:3]).sum(1)
        for side, derivative in ((self.mine, own), (self.theirs, other)):
            if side.wanted:
                side.collect(derivative, batch, rows, keys)
        return found

    def _mask(self, products: Tensor, batch: slice, rows: slice) -> None:
        if self.dead is not None:
            products.add_(self.dead[batch, ..., : products.shape[3]])
        if self.causal:
            count = products.shape[2]
            products[..., rows].add_(self.later[:count, :count])

    def _pieces(self, own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        count = max(1, _limit(PIECE, own) // own.shape[1])
        pieces = zip(*(x.split(count) for x in (own, other, weight)), strict=True)
        return torch.cat([self._compare(*piece) for piece in pieces])

    def _compare(self, own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        return self.compare(own, other, self._spare(*own.shape), weight, self.theirs.wanted)


class _Memory:
    """Memory that is used again and again for products of some rows, of ever more keys."""

    def __init__(self, like: Tensor, time: int) -> None:
        self._flat, self._time = like.new_empty(0), time

    def __call__(self, *shape: int) -> Tensor:
        """``shape`` elements that hold anything; those of the last call are gone."""
        needed = prod(shape)
        if self._flat.numel() < needed:
            self._flat = self._flat.new_empty(needed // shape[-1] * self._time)
        return self._flat[:needed].view(shape)


def _unless(counts: Bool[Tensor, " ..."], like: Tensor) -> Tensor:
    """What is added to products: 0 where they count."""
    return torch.zeros_like(counts, dtype=like.dtype).masked_fill_(~counts, MASKED)


class _Worker:
    """One side: makes products and collects gradients. Query heads of one key head are rows beside rows."""

    def __init__(self, side: Side, wanted: bool) -> None:
        self._shapes = side.queries.shape, side.keys.shape
        _, heads, time, width = side.queries.shape
        self.head, self.scale, self.wanted = side.keys.shape[1], side.scale, wanted
        self.keys = side.keys.flatten(0, 1)
        self.queries = side.queries.reshape(len(self.keys), heads // self.head, time, width)
        self.keys_across = self.keys.mT.contiguous()
        self.d_queries = torch.empty_like(self.queries) if wanted else None
        self.d_keys_across = torch.zeros_like(self.keys_across) if wanted else None
        self._rows, self._memory = self.queries, _Memory(self.queries, time)

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        if self.d_queries is None or self.d_keys_across is None:
            return None, None
        return self.d_queries.view(self._shapes[0]), self.d_keys_across.mT.reshape(self._shapes[1])

    def products(self, batch: slice, rows: slice, keys: slice) -> Tensor:
        """``[batch, qhead, row, key]``, until the next call."""
        heads = self._heads(batch)
        self._rows = (self.queries[heads, :, rows] * self.scale).flatten(1, 2)
        shape = (*self._rows.shape[:2], keys.stop)
        found = torch.bmm(self._rows, self.keys_across[heads, :, keys], out=self._memory(*shape))
        return found.view(batch.stop - batch.start, -1, rows.stop - rows.start, keys.stop)

    def _heads(self, batch: slice) -> slice:
        return slice(batch.start * self.head, batch.stop * self.head)

    def collect(self, derivative: Tensor, batch: slice, rows: slice, keys: slice) -> None:
        """What the weighted derivatives of these products say of queries and keys."""
        heads = self._heads(batch)
        folded = derivative.view(*self._rows.shape[:2], keys.stop)
        to = self.d_queries[heads, :, rows]  # type: ignore[index]
        torch.mul(torch.bmm(folded, self.keys[heads, keys]).view(to.shape), self.scale, out=to)
        self.d_keys_across[heads, :, keys].baddbmm_(self._rows.mT, folded)  # type: ignore[index]
