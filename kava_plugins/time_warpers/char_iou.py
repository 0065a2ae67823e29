"""Tokens aligned by the characters they share, for two tokenizers of one text."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import CharIoUConfig

Integers = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float64]


class CharIoU(nn.Module):
    """Weights by intersection over union of character spans; as many taps as there are overlaps.

    Spans may repeat (several tokens in one emoji), be empty, or stand in any order. Computed with numpy on
    the CPU, whose small operations cost less than torch's.
    """

    def __init__(self, config: CharIoUConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.hard = config.mode == "hard"
        self.min_overlap = config.min_overlap

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map; valid where a real token with text overlaps one of the teacher's by ``min_overlap``."""
        row, place, iou = _overlaps(student, teacher)
        if self.min_overlap:
            row, place, iou = _only(iou >= self.min_overlap, row, place, iou)
        if self.hard:
            row, place, iou = _highest(row, place, iou)
        device = student.mask.device
        rows, places = (torch.from_numpy(each).to(device, torch.long) for each in (row, place))
        return TimeMap.of_entries(rows, places, torch.from_numpy(iou).to(device), student.mask)


class _Tokens(NamedTuple):
    """The tokens of a batch that have text, one example after another."""

    example: Integers
    position: Integers
    begin: Integers
    """First character."""
    end: Integers

    def spread(self, stride: int) -> _Tokens:
        """Each example's characters after those of the example before it."""
        fits = (int(self.example.max(initial=0)) + 1) * stride < 2**31
        shift: Any = self.example.astype(np.int32 if fits else np.int64) * stride
        return self._replace(begin=self.begin + shift, end=self.end + shift)


def _tokens(timeline: Timeline) -> _Tokens:
    mask = timeline.mask.cpu().numpy()
    place = np.flatnonzero(mask).astype(np.int32)
    spans = timeline.spans.cpu().numpy().reshape(-1, 2).take(place, 0)
    begin, end = spans.T.astype(np.int32)
    if not (text := end > begin).all():
        place, begin, end = place[text], begin[text], end[text]
    example = place // max(mask.shape[1], 1)
    return _Tokens(example, place - example * mask.shape[1], begin, end)


def _overlaps(student: Timeline, teacher: Timeline) -> tuple[Integers, Integers, Floats]:
    """Row, teacher position and IoU of every pair that shares characters, row after row."""
    sides = _tokens(student), _tokens(teacher)
    stride = max(int(side.end.max(initial=0)) for side in sides)
    own, theirs = (side.spread(stride) for side in sides)
    mine, its = _candidates(own, theirs)
    begin, end = own.begin.take(mine), own.end.take(mine)
    t_begin, t_end = theirs.begin.take(its), theirs.end.take(its)
    shared = np.minimum(end, t_end) - np.maximum(begin, t_begin)
    iou = shared / (np.maximum(end, t_end) - np.minimum(begin, t_begin))
    row = (own.example * student.mask.shape[1] + own.position).take(mine)
    return _only(shared > 0, row, theirs.position.take(its), iou)


def _candidates(own: _Tokens, theirs: _Tokens) -> tuple[Integers, Integers]:
    """Pairs outside of which none overlaps: for each token a range of the other side's.

    Before it every token so far ends too early, after it every later one begins too late. The highest end so
    far and the lowest begin from here on are ascending in whatever order the spans are.
    """
    highest_end = np.maximum.accumulate(theirs.end)
    lowest_begin = np.minimum.accumulate(theirs.begin[::-1])[::-1]
    first = np.searchsorted(highest_end, own.begin, side="right")
    count = np.maximum(np.searchsorted(lowest_begin, own.end) - first, 0)
    mine = np.repeat(np.arange(len(count), dtype=np.int32), count)
    skipped = np.repeat((first - (count.cumsum() - count)).astype(np.int32), count)
    return mine, np.arange(len(mine), dtype=np.int32) + skipped


def _only(
    kept: npt.NDArray[np.bool_], row: Integers, place: Integers, iou: Floats
) -> tuple[Integers, Integers, Floats]:
    return (row, place, iou) if kept.all() else (row[kept], place[kept], iou[kept])


def _highest(row: Integers, place: Integers, iou: Floats) -> tuple[Integers, Integers, Floats]:
    """Of each row the pair of the highest IoU, the first of equals."""
    order = np.lexsort((place, -iou, row))
    first = np.append(True, np.diff(row[order]) != 0)[: len(order)]
    best = order[first]
    return row[best], place[best], iou[best]
