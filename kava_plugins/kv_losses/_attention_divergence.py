"""Kullback–Leibler divergence of attention rows, student against target, without their maps.

The same divergence as MiniLM's (arXiv 2002.10957), of softmaxed products of queries and keys, with memory
linear in time.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from jaxtyping import Float
from torch import Tensor

from kava_core.kv.maths.masks import live, select, widen, without_autocast
from kava_core.protocols.axes import Cache
from kava_plugins.kv_losses import AttentionKLConfig, Divergence, StructuralConfig
from kava_plugins.kv_losses._row_blocks import Compare, Masking, Side, of_one_dtype, sum_of_rows

LN2 = log(2)


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
    student: Cache,
    target: Cache,
    weight: Float[Tensor, "batch layer time"],
    config: AttentionKLConfig | StructuralConfig,
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
    return Side(queries.flatten(0, 1), keys.flatten(0, 1), scale)


def _clean(x: Tensor, where: Tensor | None) -> Tensor:
    return widen(x) if where is None else select(widen(x), where)


def _holes(where: Tensor) -> Tensor | None:
    """None if every position counts; looked at only where looking is free."""
    return None if where.device.type == "cpu" and bool(where.all()) else where


Backend = Callable[[Side, Side, Tensor, Masking, Divergence], Tensor]


def _backend(mine: Side) -> Backend:
    if mine.queries.device.type == "cuda" and mine.queries.dtype == torch.float32:
        try:
            from kava_plugins.kv_losses._attention_divergence_triton import fused
        except ImportError:
            return portable
        return fused
    return portable


def portable(mine: Side, theirs: Side, weight: Tensor, masking: Masking, kind: Divergence) -> Tensor:
    """By blocks of rows, on any device.

    Counted in bits: on a CPU ``exp`` is many times slower where it underflows, ``exp2`` is not.
    """
    mine, theirs = (side._replace(scale=side.scale / LN2) for side in (mine, theirs))
    return sum_of_rows(mine, theirs, LN2 * weight, masking, COMPARE[kind])


def _powers(mine: Tensor, theirs: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2 to the products less their row's greatest, in their place.

    Returns ``theirs − mine`` of the exponents, and the row sums of both.
    """
    for products in (mine, theirs):
        products.sub_(products.amax(-1, keepdim=True))
    gap = torch.sub(theirs, mine, out=spare)
    q_sum, p_sum = (products.exp2_().sum(-1, keepdim=True) for products in (mine, theirs))
    return gap, q_sum, p_sum


def _one_way(
    q: Tensor, p: Tensor, spare: Tensor, weight: Tensor, *, want_q: bool, want_p: bool
) -> Float[Tensor, "_ 1"]:
    """KL(p ‖ q) = Σ p/p_sum · gap − log₂(p_sum/q_sum); its derivatives in place of the products wanted."""
    gap, q_sum, p_sum = _powers(q, p, spare)
    ratio = q_sum / p_sum
    mean = gap.mul_(p).sum(-1, keepdim=True).div_(p_sum)
    if want_q:
        q.addcmul_(p, ratio, value=-1).mul_(weight / q_sum)
    if want_p:
        share = LN2 * weight / p_sum
        p.mul_(-share * mean).addcmul_(gap, share)
    return mean.add_(ratio.log2_())


def _forward(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return _one_way(mine, theirs, spare, weight, want_q=True, want_p=wanted)


def _reverse(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return _one_way(theirs, mine, spare, weight, want_q=wanted, want_p=True)


def _jeffreys(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    gap, q_sum, p_sum = _powers(mine, theirs, spare)
    q, p = mine.div_(q_sum), theirs.div_(p_sum)
    less = q - p
    q_gap, p_gap = q * gap, gap.mul_(p)
    q_mean, p_mean = (x.sum(-1, keepdim=True) for x in (q_gap, p_gap))
    mine.mul_(q_mean).sub_(q_gap).mul_(LN2).add_(less).mul_(weight)
    if wanted:
        theirs.mul_(-p_mean).add_(p_gap).mul_(LN2).sub_(less).mul_(weight)
    return p_mean - q_mean


COMPARE: dict[Divergence, Compare] = {"forward": _forward, "reverse": _reverse, "jeffreys": _jeffreys}
