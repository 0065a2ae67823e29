"""Compute the Kullback–Leibler divergence of attention rows, student against target, without their maps.

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
from kava_plugins.kv_losses._model_attention import Softcaps
from kava_plugins.kv_losses._row_blocks import CompareRows, Masking, Side, sum_of_rows, to_common_dtype

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
    softcap: float | None = None,
    target_softcap: float | None = None,
) -> Float[Tensor, ""]:
    """Sum weight × mean over query heads of the divergence of the two attention rows of a position.

    Rows are softmax(q·k / (√dim · temperature)) over the positions whose weight is not 0, each side with its
    own width and its own groups of query heads; ``kind`` is explained at its declaration. With a soft cap c a
    product x over √dim becomes c · tanh(x / c) before it is divided by the temperature. Positions of weight 0
    are neither rows nor keys, whatever they hold. Products and sums are float32 (float64 for float64
    inputs). Gradients reach all four tensors; the target's are formed only if one of its tensors requires
    them. No factor temperature².
    """
    where = _live_unless_all(live(weight))
    with without_autocast(weight.device):
        own_side = _scaled_side(
            _zero_elsewhere(queries, where), _zero_elsewhere(keys, where), temperature, softcap
        )
        target_side = _scaled_side(
            _zero_elsewhere(target_queries, where),
            _zero_elsewhere(target_keys, where),
            temperature,
            target_softcap,
        )
        mine, theirs = to_common_dtype(own_side, target_side)
        row_weight = weight.to(mine.queries.dtype).flatten(0, 1)
        masking = Masking(causal, None if where is None else where.flatten(0, 1).flatten(1))
        divergence = _choose_backend(mine, theirs)
        return divergence(mine, theirs, row_weight, masking, kind)


def divergence_of_caches(
    student: Cache,
    target: Cache,
    weight: Float[Tensor, "batch layer time"],
    config: AttentionKLConfig | StructuralConfig,
    softcaps: Softcaps,
) -> Float[Tensor, ""]:
    """Compute the ``attention_divergence`` of two caches with the parameters of a declaration."""
    parts, t_parts = dict(student.items()), dict(target.items())
    return attention_divergence(
        queries=parts["queries"],
        keys=parts["keys"],
        target_queries=t_parts["queries"],
        target_keys=t_parts["keys"],
        weight=weight,
        causal=config.causal,
        temperature=config.temperature,
        kind=config.kind,
        softcap=softcaps.student,
        target_softcap=softcaps.target,
    )


def _scaled_side(queries: Tensor, keys: Tensor, temperature: float, softcap: float | None) -> Side:
    scale = 1 / (queries.shape[-1] ** 0.5 * temperature)
    cap = None if softcap is None else softcap / temperature
    return Side(queries.flatten(0, 1), keys.flatten(0, 1), scale, cap)


def _zero_elsewhere(x: Tensor, where: Tensor | None) -> Tensor:
    return widen(x) if where is None else select(widen(x), where)


def _live_unless_all(where: Tensor) -> Tensor | None:
    """Return None if every position counts; on a GPU, where looking would wait, always ``where``."""
    return None if where.device.type == "cpu" and bool(where.all()) else where


Backend = Callable[[Side, Side, Tensor, Masking, Divergence], Tensor]


def _choose_backend(mine: Side, theirs: Side) -> Backend:
    capped = mine.softcap is not None or theirs.softcap is not None
    if mine.queries.device.type == "cuda" and mine.queries.dtype == torch.float32 and not capped:
        try:
            from kava_plugins.kv_losses._attention_divergence_triton import fused_divergence
        except ImportError:
            return portable_divergence
        return fused_divergence
    return portable_divergence


def portable_divergence(
    mine: Side, theirs: Side, weight: Tensor, masking: Masking, kind: Divergence
) -> Tensor:
    """Compute the divergence by blocks of rows, on any device.

    It is counted in bits: on a CPU ``exp`` is many times slower where it underflows, ``exp2`` is not.
    """
    mine, theirs = _in_bits(mine), _in_bits(theirs)
    return sum_of_rows(mine, theirs, LN2 * weight, masking, COMPARE_ROWS[kind])


def _in_bits(side: Side) -> Side:
    cap = None if side.softcap is None else side.softcap / LN2
    return side._replace(scale=side.scale / LN2, softcap=cap)


def _powers_of_two(mine: Tensor, theirs: Tensor, spare: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Replace the products by 2 to the power of the products less their row's greatest.

    Returns ``theirs − mine`` of the exponents, and the row sums of both.
    """
    for products in (mine, theirs):
        products.sub_(products.amax(-1, keepdim=True))
    gap = torch.sub(theirs, mine, out=spare)
    q_sum = mine.exp2_().sum(-1, keepdim=True)
    p_sum = theirs.exp2_().sum(-1, keepdim=True)
    return gap, q_sum, p_sum


def _one_direction(
    q: Tensor, p: Tensor, spare: Tensor, weight: Tensor, *, want_q: bool, want_p: bool
) -> Float[Tensor, "_ 1"]:
    """Return KL(p ‖ q) = Σ p/p_sum · gap − log₂(p_sum/q_sum); derivatives replace the products wanted."""
    gap, q_sum, p_sum = _powers_of_two(q, p, spare)
    ratio = q_sum / p_sum
    mean = gap.mul_(p).sum(-1, keepdim=True).div_(p_sum)
    if want_q:
        q.addcmul_(p, ratio, value=-1).mul_(weight / q_sum)
    if want_p:
        share = LN2 * weight / p_sum
        p.mul_(-share * mean).addcmul_(gap, share)
    return mean.add_(ratio.log2_())


def _forward_rows(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return _one_direction(mine, theirs, spare, weight, want_q=True, want_p=wanted)


def _reverse_rows(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    return _one_direction(theirs, mine, spare, weight, want_q=wanted, want_p=True)


def _jeffreys_rows(mine: Tensor, theirs: Tensor, spare: Tensor, weight: Tensor, wanted: bool) -> Tensor:
    gap, q_sum, p_sum = _powers_of_two(mine, theirs, spare)
    q, p = mine.div_(q_sum), theirs.div_(p_sum)
    difference = q - p
    q_gap, p_gap = q * gap, gap.mul_(p)
    q_mean, p_mean = q_gap.sum(-1, keepdim=True), p_gap.sum(-1, keepdim=True)
    mine.mul_(q_mean).sub_(q_gap).mul_(LN2).add_(difference).mul_(weight)
    if wanted:
        theirs.mul_(-p_mean).add_(p_gap).mul_(LN2).sub_(difference).mul_(weight)
    return p_mean - q_mean


COMPARE_ROWS: dict[Divergence, CompareRows] = {
    "forward": _forward_rows,
    "reverse": _reverse_rows,
    "jeffreys": _jeffreys_rows,
}
