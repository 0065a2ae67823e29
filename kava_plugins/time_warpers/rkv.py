"""Eviction by importance and redundancy (R-KV, arXiv 2505.24133; KaVa, arXiv 2510.02312)."""

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
from kava_plugins.time_warpers._reasoning import highest, slot_map


class Rkv(nn.Module):
    """Keeps the reasoning tokens with the highest λ · importance + (1 − λ) · non-redundancy.

    Both are distributions over an example's reasoning tokens, for each layer and KV head (``importance``,
    ``redundancy``), on keys and queries as attention saw them. The answer's queries are the observers; an
    example without an answer is judged by redundancy alone.
    """

    reads: tuple[Part, ...] = ("keys", "queries")

    def __init__(self, config: RkvConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.weight = config.weight

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map from slots to the student's reasoning tokens."""
        return slot_map(teacher, student)

    @torch.no_grad()
    def choose(self, cache: Cache, timeline: Timeline, count: int) -> Int[Tensor, "batch t_layer t_head _"]:
        """Positions of the ``count`` tokens with the highest scores, in time order."""
        block, tokens = _block(timeline, REASONING), timeline.mask.shape[1]
        attended, unlike = _both(cache, timeline, block)
        score = self.weight * attended + (1 - self.weight) * unlike
        return highest(_in_time(score, block, tokens), count)

    @torch.no_grad()
    def scores(
        self, cache: Cache, timeline: Timeline
    ) -> dict[str, Float[Tensor, "batch t_layer t_head t_time"]]:
        """``importance`` and ``redundancy`` of every reasoning token; −inf elsewhere."""
        block, tokens = _block(timeline, REASONING), timeline.mask.shape[1]
        found = zip(("importance", "redundancy"), _both(cache, timeline, block), strict=True)
        return {name: _in_time(score, block, tokens) for name, score in found}


class _Block(NamedTuple):
    """The tokens of one segment, moved to the front and cut to the longest of the batch."""

    place: Int[Tensor, "batch time"]
    """Where each stands in the whole sequence."""
    real: Bool[Tensor, "batch time"]

    def of(self, x: Float[Tensor, "batch layer head _ dim"]) -> Float[Tensor, "batch layer head time dim"]:
        """The tokens of ``x``, in float32 at least, zeros after the last."""
        index = self.place[:, None, None, :, None].expand(-1, *x.shape[1:3], -1, x.shape[4])
        return torch.where(self.real[:, None, None, :, None], widen(x.gather(3, index)), 0)


def _block(timeline: Timeline, segment: int) -> _Block:
    inside = (timeline.mask & (timeline.segments == segment)).long()
    longest = int(inside.sum(1).max()) if inside.numel() else 0  # the one number a GPU is waited for
    order = inside.argsort(dim=1, descending=True, stable=True)[:, :longest]
    return _Block(order, inside.gather(1, order).bool())


def _both(cache: Cache, timeline: Timeline, block: _Block) -> tuple[Tensor, Tensor]:
    assert cache.keys is not None
    assert cache.queries is not None
    answer = _block(timeline, ANSWER)
    keys = block.of(cache.keys)
    return (
        importance(answer.of(cache.queries), keys, observed=answer.real, real=block.real),
        redundancy(keys, block.real),
    )


def importance(
    queries: Float[Tensor, "batch t_layer t_qhead time dim"],
    keys: Float[Tensor, "batch t_layer t_head t_time dim"],
    *,
    observed: Bool[Tensor, "batch time"],
    real: Bool[Tensor, "batch t_time"],
) -> Float[Tensor, "batch t_layer t_head t_time"]:
    """Attention of the observing queries to the keys alone: the mean over queries, the highest of a group.

    Logits are divided by √dim, as nearly all models do, whatever scale the model has. 0 where nothing
    observes; what is not ``real`` gets no attention. Memory: ``time`` × ``t_time`` for every query head.
    """
    head, time = keys.shape[2], queries.shape[3]
    grouped = queries.unflatten(2, (head, -1)).flatten(3, 4)
    logits = grouped @ (keys * keys.shape[4] ** -0.5).mT
    attention = _softmax(logits, real[:, None, None, None]).unflatten(3, (queries.shape[2] // head, time))
    share = observed.to(attention.dtype) / observed.sum(1, keepdim=True).clamp_min(1)
    return (share[:, None, None, None, None] @ attention).squeeze(4).amax(3)


def redundancy(
    keys: Float[Tensor, "batch t_layer t_head t_time dim"], real: Bool[Tensor, "batch t_time"]
) -> Float[Tensor, "batch t_layer t_head t_time"]:
    """Softmax over the tokens of minus the mean cosine of a key to the other keys: high where it is unlike.

    The cosines to all keys sum to one product with the sum of the unit keys, so no matrix of pairs is made.
    ``keys`` holds zeros where not ``real``.
    """
    unit = F.normalize(keys, dim=4)
    others = (unit * unit.sum(3, keepdim=True)).sum(4) - unit.square().sum(4)
    count = (real.sum(1) - 1).clamp_min(1)
    return _softmax(-others / count[:, None, None, None], real[:, None, None])


def _softmax(x: Tensor, real: Tensor) -> Tensor:
    """Over the last axis, of what is real; finite where nothing is."""
    return x.masked_fill(~real, torch.finfo(x.dtype).min).softmax(-1)


def _in_time(
    score: Float[Tensor, "batch t_layer t_head _"], block: _Block, tokens: int
) -> Float[Tensor, "batch t_layer t_head {tokens}"]:
    """Scores of a block where its tokens stand in the whole sequence; −inf elsewhere."""
    real = block.real[:, None, None]
    whole = score.new_full((*score.shape[:3], tokens), -torch.inf)
    return whole.scatter(3, block.place[:, None, None].expand_as(score), score.masked_fill(~real, -torch.inf))
