"""Compare two matrices of products row by row, without either matrix: blocks of rows, gradients on the way.

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

CompareRows = Callable[[Tensor, Tensor, Tensor, Tensor, bool], Tensor]
"""``(mine, theirs, spare, weight, wanted) → [row, 1]``, each row's number. Given are products ``[row, key]``,
memory of their shape to write to, and weight ``[row, 1]``. ``mine`` is overwritten by weight × the number's
derivative by it, and so is ``theirs`` if ``wanted``."""


class Side(NamedTuple):
    """Queries and keys of one side. ``qhead`` is a multiple of ``head``: neighbours share a key head."""

    queries: Float[Tensor, "batch qhead time dim"]
    keys: Float[Tensor, "batch head time dim"]
    scale: float = 1.0
    """Factor of the products."""
    softcap: float | None = None
    """Scaled products x become ``softcap · tanh(x / softcap)``; None: they stay."""


@dataclass(frozen=True)
class Masking:
    """Which products count."""

    causal: bool
    """Only keys up to the row's own position."""
    live: Bool[Tensor, "batch time"] | None
    """Only these keys; None: all."""


def to_common_dtype(mine: Side, theirs: Side) -> tuple[Side, Side]:
    """Cast both sides to the widest dtype of the four tensors."""
    dtype = mine.queries.dtype
    for x in (mine.keys, theirs.queries, theirs.keys):
        dtype = torch.promote_types(dtype, x.dtype)
    return _cast_side(mine, dtype), _cast_side(theirs, dtype)


def _cast_side(side: Side, dtype: torch.dtype) -> Side:
    return Side(side.queries.to(dtype), side.keys.to(dtype), side.scale, side.softcap)


def sum_of_rows(
    mine: Side, theirs: Side, weight: Float[Tensor, "batch time"], masking: Masking, compare: CompareRows
) -> Float[Tensor, ""]:
    """Sum weight × mean over query heads of what ``compare`` makes of each row.

    Both sides have the same query heads and dtype; key heads and widths are their own. Nothing may be NaN,
    not even where the weight is 0. Gradients reach the four tensors and the weight.
    """
    qhead = mine.queries.shape[1]
    # Heads are cut into the smallest groups that share no keys on either side; groups then count as batch.
    own_group, other_group = qhead // mine.keys.shape[1], theirs.queries.shape[1] // theirs.keys.shape[1]
    groups = qhead // lcm(own_group, other_group)
    weight = (weight / qhead).repeat_interleave(groups, 0)
    live = None if masking.live is None else masking.live.repeat_interleave(groups, 0)
    tensors = [_split_groups(x, groups) for x in (mine.queries, mine.keys, theirs.queries, theirs.keys)]
    wants_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    rules = (mine.scale, mine.softcap), (theirs.scale, theirs.softcap)
    options = (Masking(masking.causal, live), compare, rules, wants_gradient)
    total: Tensor = _SumOfRows.apply(*tensors, weight, *options)  # type: ignore[no-untyped-call]
    return total


def _split_groups(x: Tensor, groups: int) -> Tensor:
    """Cut the heads into groups and put these into the batch axis."""
    return x.unflatten(1, (groups, x.shape[1] // groups)).flatten(0, 1)


class _SumOfRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        q, k, t_q, t_k, weight, masking, compare, (rule, t_rule), wants_gradient = arguments
        own = _SideWorker(Side(q, k, *rule), wants_gradient and any(ctx.needs_input_grad[:2]))
        other = _SideWorker(Side(t_q, t_k, *t_rule), wants_gradient and any(ctx.needs_input_grad[2:4]))
        comparison = _RowComparison(own, other, weight, masking, compare)
        row_values = comparison.compare_blocks(row_blocks(q))
        ctx.save_for_backward(*own.gradients, *other.gradients, row_values)
        return (row_values * weight).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gradients = [None if x is None else x * gradient for x in ctx.saved_tensors]
        return *gradients, None, None, None, None


def row_blocks(queries: Float[Tensor, "batch qhead time dim"]) -> Iterator[tuple[slice, slice]]:
    """Yield slices of batch and time whose products are made at once."""
    batch, heads, time, _ = queries.shape
    budget = _limit_of_device(ELEMENTS, queries) // max(1, heads * time)
    rows = min(ROWS[-1], max(ROWS[0], budget))
    examples = max(1, budget // rows)
    for first_example in range(0, batch, examples):
        for first_row in range(0, time, rows):
            example_slice = slice(first_example, min(first_example + examples, batch))
            yield example_slice, slice(first_row, min(first_row + rows, time))


def _limit_of_device(limits: dict[str, int], x: Tensor) -> int:
    return limits.get(x.device.type, limits["cuda"])


class _RowComparison:
    """The comparison of both sides, one block after another."""

    def __init__(
        self, mine: _SideWorker, theirs: _SideWorker, weight: Tensor, masking: Masking, compare: CompareRows
    ) -> None:
        self.mine, self.theirs, self.compare = mine, theirs, compare
        self.weight, self.causal = weight, masking.causal
        self.dead = None if masking.live is None else _added_to_products(masking.live, weight)[:, None, None]
        self.later = _added_to_products(weight.new_ones(ROWS[-1], ROWS[-1], dtype=torch.bool).tril_(), weight)
        self._spare_memory = _ReusedMemory(weight, weight.shape[1])

    def compare_blocks(self, blocks: Iterable[tuple[slice, slice]]) -> Float[Tensor, "batch time"]:
        """Return every row's number, summed over query heads; 0 where the weight is."""
        row_values = torch.zeros_like(self.weight)
        for batch, rows in blocks:
            row_values[batch, rows] = self._compare_block(batch, rows)
        return torch.where(self.weight != 0, row_values, 0)

    def _compare_block(self, batch: slice, rows: slice) -> Float[Tensor, "batch time"]:
        """Return the numbers of a block's rows, and collect the gradients that are wanted."""
        keys = slice(rows.stop if self.causal else self.weight.shape[1])
        own = self.mine.multiply(batch, rows, keys)
        other = self.theirs.multiply(batch, rows, keys)
        self._mask_products(own, batch, rows)
        self._mask_products(other, batch, rows)
        weight = self.weight[batch, None, rows].expand(own.shape[:3]).reshape(-1, 1)
        values = self._compare_pieces(own.flatten(0, 2), other.flatten(0, 2), weight)
        # The products now hold their derivatives.
        if self.mine.wanted:
            self.mine.collect_gradients(own, batch, rows, keys)
        if self.theirs.wanted:
            self.theirs.collect_gradients(other, batch, rows, keys)
        return values.view(own.shape[:3]).sum(1)

    def _mask_products(self, products: Tensor, batch: slice, rows: slice) -> None:
        if self.dead is not None:
            products.add_(self.dead[batch, ..., : products.shape[3]])
        if self.causal:
            count = products.shape[2]
            products[..., rows].add_(self.later[:count, :count])

    def _compare_pieces(self, own: Tensor, other: Tensor, weight: Tensor) -> Tensor:
        count = max(1, _limit_of_device(PIECE, own) // own.shape[1])
        values = []
        for piece in zip(own.split(count), other.split(count), weight.split(count), strict=True):
            own_piece, other_piece, weight_piece = piece
            spare = self._spare_memory(*own_piece.shape)
            values.append(self.compare(own_piece, other_piece, spare, weight_piece, self.theirs.wanted))
        return torch.cat(values)


class _ReusedMemory:
    """Memory that is used again and again for products of some rows, of ever more keys."""

    def __init__(self, like: Tensor, time: int) -> None:
        self._flat, self._time = like.new_empty(0), time

    def __call__(self, *shape: int) -> Tensor:
        """Return a tensor of this shape that holds anything; that of the last call is overwritten."""
        needed = prod(shape)
        if self._flat.numel() < needed:
            self._flat = self._flat.new_empty(needed // shape[-1] * self._time)
        return self._flat[:needed].view(shape)


def _added_to_products(counts: Bool[Tensor, " ..."], like: Tensor) -> Tensor:
    """Return what is added to products: 0 where they count, ``MASKED`` elsewhere."""
    return torch.zeros_like(counts, dtype=like.dtype).masked_fill_(~counts, MASKED)


class _SideWorker:
    """One side, which makes products and collects gradients. Query heads of one key head are neighbours."""

    def __init__(self, side: Side, wanted: bool) -> None:
        self._shapes = side.queries.shape, side.keys.shape
        _, heads, time, width = side.queries.shape
        self.head, self.scale, self.wanted = side.keys.shape[1], side.scale, wanted
        self.softcap = side.softcap
        self._slopes: Tensor | None = None
        self.keys = side.keys.flatten(0, 1)
        self.queries = side.queries.reshape(len(self.keys), heads // self.head, time, width)
        self.keys_across = self.keys.mT.contiguous()
        self.d_queries = torch.empty_like(self.queries) if wanted else None
        self.d_keys_across = torch.zeros_like(self.keys_across) if wanted else None
        self._rows, self._memory = self.queries, _ReusedMemory(self.queries, time)

    @property
    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        if self.d_queries is None or self.d_keys_across is None:
            return None, None
        return self.d_queries.view(self._shapes[0]), self.d_keys_across.mT.reshape(self._shapes[1])

    def multiply(self, batch: slice, rows: slice, keys: slice) -> Tensor:
        """Return the products ``[batch, qhead, row, key]``, which last until the next call."""
        heads = self._heads_of_batch(batch)
        self._rows = (self.queries[heads, :, rows] * self.scale).flatten(1, 2)
        memory = self._memory(*self._rows.shape[:2], keys.stop)
        products = torch.bmm(self._rows, self.keys_across[heads, :, keys], out=memory)
        self._cap_products(products)
        return products.view(batch.stop - batch.start, -1, rows.stop - rows.start, keys.stop)

    def _cap_products(self, products: Tensor) -> None:
        """Cap products in place, and keep the derivative of the cap if gradients are wanted."""
        if self.softcap is None:
            return
        bounded = products.div_(self.softcap).tanh_()
        if self.wanted:
            self._slopes = 1 - bounded.square()
        products.mul_(self.softcap)

    def _heads_of_batch(self, batch: slice) -> slice:
        return slice(batch.start * self.head, batch.stop * self.head)

    def collect_gradients(self, derivative: Tensor, batch: slice, rows: slice, keys: slice) -> None:
        """Add the weighted derivatives of the last products to the gradients of queries and keys."""
        heads = self._heads_of_batch(batch)
        folded = derivative.view(*self._rows.shape[:2], keys.stop)
        if self._slopes is not None:
            folded = folded * self._slopes
        d_queries = self.d_queries[heads, :, rows]  # type: ignore[index]
        by_queries = torch.bmm(folded, self.keys[heads, keys]).view(d_queries.shape)
        torch.mul(by_queries, self.scale, out=d_queries)
        self.d_keys_across[heads, :, keys].baddbmm_(self._rows.mT, folded)  # type: ignore[index]
