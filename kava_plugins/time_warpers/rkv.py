"""Evict reasoning tokens by importance and redundancy (R-KV, arXiv 2505.24133; KaVa, arXiv 2510.02312)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.maths.masks import widen
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import ANSWER, REASONING, Timeline
from kava_plugins.time_warpers import RkvConfig
from kava_plugins.time_warpers._reasoning import highest_positions, slot_map


class Rkv(nn.Module):
    """Keeps the reasoning tokens with the highest ``weight`` · importance + (1 − ``weight``) · redundancy.

    Both scores are distributions over an example's reasoning tokens, for each layer and KV head, on keys and
    queries as attention saw them; see ``importance_scores`` and ``redundancy_scores``. The answer's queries
    are the observers; an example without an answer is judged by redundancy alone.

    Raises:
        SpecError: attention of the teacher cannot be computed from queries and keys.
    """

    reads: tuple[Part, ...] = ("keys", "queries")

    def __init__(self, config: RkvConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        teacher.logits.require_followed("time_warper 'rkv', the teacher's queries", softcap=True)
        self.weight, self.softcap = config.weight, teacher.logits.softcap

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map slots to the student's reasoning tokens."""
        return slot_map(teacher, student)

    @torch.no_grad()
    def choose(self, cache: Cache, timeline: Timeline, count: int) -> Int[Tensor, "batch t_layer t_head _"]:
        """Choose the ``count`` tokens with the highest scores; their positions come in time order."""
        reasoning = _tokens_of_segment(timeline, REASONING)
        importance, redundancy = _both_scores(cache, timeline, reasoning, self.softcap)
        score = self.weight * importance + (1 - self.weight) * redundancy
        return highest_positions(_scores_in_time(score, reasoning, timeline.mask.shape[1]), count)

    @torch.no_grad()
    def scores(
        self, cache: Cache, timeline: Timeline
    ) -> dict[str, Float[Tensor, "batch t_layer t_head t_time"]]:
        """Return ``importance`` and ``redundancy`` of every reasoning token; −inf elsewhere."""
        reasoning, time = _tokens_of_segment(timeline, REASONING), timeline.mask.shape[1]
        importance, redundancy = _both_scores(cache, timeline, reasoning, self.softcap)
        return {
            "importance": _scores_in_time(importance, reasoning, time),
            "redundancy": _scores_in_time(redundancy, reasoning, time),
        }


class _SegmentTokens(NamedTuple):
    """The tokens of one segment, moved to the front and cut to the longest of the batch."""

    position: Int[Tensor, "batch time"]
    """Position of each in the whole sequence."""
    real: Bool[Tensor, "batch time"]
    """False beyond the last token of an example."""

    def gather(
        self, x: Float[Tensor, "batch layer head _ dim"]
    ) -> Float[Tensor, "batch layer head time dim"]:
        """Gather the tokens of ``x``, in float32 at least, with zeros after the last."""
        index = self.position[:, None, None, :, None].expand(-1, *x.shape[1:3], -1, x.shape[4])
        return torch.where(self.real[:, None, None, :, None], widen(x.gather(3, index)), 0)


def _tokens_of_segment(timeline: Timeline, segment: int) -> _SegmentTokens:
    inside = (timeline.mask & (timeline.segments == segment)).long()
    longest = int(inside.sum(1).max()) if inside.numel() else 0  # the one number a GPU is waited for
    order = inside.argsort(dim=1, descending=True, stable=True)[:, :longest]
    return _SegmentTokens(order, inside.gather(1, order).bool())


def _both_scores(
    cache: Cache, timeline: Timeline, reasoning: _SegmentTokens, softcap: float | None
) -> tuple[Tensor, Tensor]:
    assert cache.keys is not None
    assert cache.queries is not None
    answer = _tokens_of_segment(timeline, ANSWER)
    keys = reasoning.gather(cache.keys)
    queries = answer.gather(cache.queries)
    importance = importance_scores(queries, keys, observed=answer.real, real=reasoning.real, softcap=softcap)
    return importance, redundancy_scores(keys, reasoning.real)


def importance_scores(
    queries: Float[Tensor, "batch t_layer t_qhead time dim"],
    keys: Float[Tensor, "batch t_layer t_head t_time dim"],
    *,
    observed: Bool[Tensor, "batch time"],
    real: Bool[Tensor, "batch t_time"],
    softcap: float | None = None,
) -> Float[Tensor, "batch t_layer t_head t_time"]:
    """Return the attention of the observing queries to the keys: mean over queries, highest of a group.

    Products are divided by √dim, as captured queries have the model's own scale in them, and capped softly if
    the model does so. Attention is 0 if nothing observes; what is not ``real`` gets none. Memory: ``time`` ×
    ``t_time`` for every query head.

    Source: KaVa, arXiv 2510.02312.
    """
    head, time = keys.shape[2], queries.shape[3]
    grouped = queries.unflatten(2, (head, -1)).flatten(3, 4)
    logits = grouped @ (keys * keys.shape[4] ** -0.5).mT
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    attention = _softmax_over_real(logits, real[:, None, None, None]).unflatten(
        3, (queries.shape[2] // head, time)
    )
    query_weights = observed.to(attention.dtype) / observed.sum(1, keepdim=True).clamp_min(1)
    mean_attention = (query_weights[:, None, None, None, None] @ attention).squeeze(4)
    return mean_attention.amax(3)


def redundancy_scores(
    keys: Float[Tensor, "batch t_layer t_head t_time dim"], real: Bool[Tensor, "batch t_time"]
) -> Float[Tensor, "batch t_layer t_head t_time"]:
    """Return the softmax over tokens of minus the mean cosine of a key to the others: high if it is unlike.

    The cosines to all keys sum to one product with the sum of the unit keys, so no matrix of pairs is made.
    ``keys`` holds zeros where not ``real``.

    Source: R-KV, arXiv 2505.24133, as KaVa has it, arXiv 2510.02312.
    """
    unit_keys = F.normalize(keys, dim=4)
    cosines_to_all = (unit_keys * unit_keys.sum(3, keepdim=True)).sum(4)
    cosines_to_others = cosines_to_all - unit_keys.square().sum(4)
    others = (real.sum(1) - 1).clamp_min(1)
    return _softmax_over_real(-cosines_to_others / others[:, None, None, None], real[:, None, None])


def _softmax_over_real(x: Tensor, real: Tensor) -> Tensor:
    """Return the softmax over what is real of the last axis; finite if nothing is."""
    return x.masked_fill(~real, torch.finfo(x.dtype).min).softmax(-1)


def _scores_in_time(
    score: Float[Tensor, "batch t_layer t_head _"], tokens: _SegmentTokens, time: int
) -> Float[Tensor, "batch t_layer t_head {time}"]:
    """Put the scores of a segment's tokens at their positions in the whole sequence; −inf elsewhere."""
    real = tokens.real[:, None, None]
    position = tokens.position[:, None, None].expand_as(score)
    whole = score.new_full((*score.shape[:3], time), -torch.inf)
    return whole.scatter(3, position, score.masked_fill(~real, -torch.inf))
