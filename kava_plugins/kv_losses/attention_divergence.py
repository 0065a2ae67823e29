"""Kullback–Leibler divergence of attention rows, student against target, without their maps.

The same divergence as MiniLM's (arXiv 2002.10957), of softmaxed products of queries and keys, with memory
linear in time.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.kv.axes import Cache
from kava_core.kv.masks import live, select, widen, without_autocast
from kava_plugins.kv_losses import AttentionKL, Divergence, Structural
from kava_plugins.kv_losses.compiled import Compiled
from kava_plugins.kv_losses.row_blocks import Compared, Masking, Side, of_one_dtype, sum_of_rows


def attention_divergence(
    queries: Float[Tensor, "batch layer qhead time dim"],
    keys: Float[Tensor, "batch layer head time dim"],
    target_queries: Float[Tensor, "batch layer qhead time t_dim"],
    target_keys: Float[Tensor, "batch layer t_head time t_dim"],
    weight: Float[Tensor, "batch layer time"],
    *,
    causal: bool = True,
    temperature: float = 1.0,
    kind: Divergence = "forward",
) -> Float[Tensor, ""]:
    """Σ weight × mean over query heads of the divergence of the two attention rows of a position.

    Rows are softmax(q·k / (√dim · temperature)) over the positions whose weight is not 0, each side with its
    own width and its own groups of query heads; ``kind`` is explained at its declaration. Positions of weight
    0 are neither rows nor keys, whatever they hold. Products and sums are float32 (float64 for float64
    inputs). Gradients reach all four tensors; the target's are formed only if one of its tensors requires
    them. No factor temperature².
    """
    where = _holes(live(weight))
    with without_autocast(weight.device):
        sides = [
            _side(_clean(q, where), _clean(k, where), temperature)
            for q, k in ((queries, keys), (target_queries, target_keys))
        ]
        mine, theirs = of_one_dtype(*sides)
        dtype = mine.queries.dtype
        masking = Masking(causal, None if where is None else where.flatten(0, 1).flatten(1))
        return _backend(mine)(mine, theirs, weight.to(dtype).flatten(0, 1), masking, kind)


def between_caches(
    student: Cache, target: Cache, weight: Float[Tensor, "batch layer time"], config: AttentionKL | Structural
) -> Float[Tensor, ""]:
    """``attention_divergence`` of two caches, as a declaration says."""
    mine, theirs = (dict(cache.items()) for cache in (student, target))
    return attention_divergence(
        *(mine["queries"], mine["keys"], theirs["queries"], theirs["keys"], weight),
        causal=config.causal,
        temperature=config.temperature,
        kind=config.kind,
    )


def _side(queries: Tensor, keys: Tensor, temperature: float) -> Side:
    scale = 1 / (queries.shape[-1] ** 0.5 * temperature)
    return Side((queries * scale).flatten(0, 1), keys.flatten(0, 1))


def _clean(x: Tensor, where: Tensor | None) -> Tensor:
    return widen(x) if where is None else select(widen(x), where)


def _holes(where: Tensor) -> Tensor | None:
    """None if every position counts; looked at only where looking is free."""
    return None if where.device.type == "cpu" and bool(where.all()) else where


Backend = Callable[[Side, Side, Tensor, Masking, Divergence], Tensor]


def _backend(mine: Side) -> Backend:
    if mine.queries.device.type == "cuda" and mine.queries.dtype == torch.float32:
        try:
            from kava_plugins.kv_losses.attention_divergence_triton import fused
        except ImportError:
            return portable
        return fused
    return portable


def portable(mine: Side, theirs: Side, weight: Tensor, masking: Masking, kind: Divergence) -> Tensor:
    """By blocks of rows, on any device."""
    return sum_of_rows(mine, theirs, weight, masking, COMPARE[kind])


def _forward(mine: Tensor, theirs: Tensor, wanted: bool) -> Compared:
    q, p = mine.log_softmax(-1), theirs.log_softmax(-1)
    ratio = p - q
    p = p.exp_()
    derivative = q.exp_().sub_(p)
    if not wanted:
        return torch.addcmul(derivative, ratio, p, out=ratio).sum(-1), derivative, None
    each = torch.addcmul(derivative, ratio, p).sum(-1)
    return each, derivative, p * (ratio - each[..., None])


def _reverse(mine: Tensor, theirs: Tensor, wanted: bool) -> Compared:
    each, for_theirs, for_mine = _forward(theirs, mine, True)
    return each, for_mine, for_theirs if wanted else None


def _jeffreys(mine: Tensor, theirs: Tensor, wanted: bool) -> Compared:
    q, p = mine.log_softmax(-1), theirs.log_softmax(-1)
    ratio = p - q
    q, p = q.exp_(), p.exp_()
    gap = q - p
    forward = torch.addcmul(gap, ratio, p).sum(-1, keepdim=True)
    backward = torch.addcmul(gap, ratio, q).sum(-1, keepdim=True).neg_()
    for_mine = torch.addcmul(gap, q, ratio + backward, value=-1)
    for_theirs = torch.addcmul(-gap, p, ratio - forward) if wanted else None
    return (forward + backward)[..., 0], for_mine, for_theirs


COMPARE = {
    "forward": Compiled(_forward),
    "reverse": Compiled(_reverse),
    "jeffreys": Compiled(_jeffreys),
}
