"""Tokens aligned by the characters they share, for two tokenizers of one text."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from kava_core.kv.axes import Geometry
from kava_core.kv.timeline import Timeline
from kava_core.kv.timemap import TimeMap, ranges
from kava_plugins.time_warpers import CharIoU as Config


class CharIoU(nn.Module):
    """Weights by intersection over union of character spans; as many taps as there are overlaps.

    Spans may repeat (several tokens in one emoji), be empty, or stand in any order.
    """

    def __init__(self, config: Config, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.hard = config.mode == "hard"
        self.min_overlap = config.min_overlap

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map; valid where a real token with text overlaps one of the teacher's by ``min_overlap``."""
        row, place, iou = _overlaps(student, teacher)
        if self.min_overlap:
            iou = torch.where(iou >= self.min_overlap, iou, 0)
        if self.hard:
            row, place, iou = _highest(row, place, iou, student.mask.numel())
        return TimeMap.of_entries(row, place, iou, student.mask)


class _Texts(NamedTuple):
    """All tokens with text, of all examples in a row; each example's characters follow the one's before."""

    row: Tensor
    """``example · time + position``."""
    begin: Tensor
    end: Tensor


def _overlaps(student: Timeline, teacher: Timeline) -> tuple[Tensor, Tensor, Tensor]:
    """Row, teacher position and IoU, row after row, of all pairs that share characters and perhaps others."""
    length = max((int(side.spans.max()) for side in (student, teacher) if side.spans.numel()), default=0) + 1
    ours, theirs = _texts(student, length), _texts(teacher, length)
    owner, place = _candidates(ours, theirs, len(student.mask) * length)
    begin, end = ours.begin.index_select(0, owner), ours.end.index_select(0, owner)
    t_begin, t_end = theirs.begin.index_select(0, place), theirs.end.index_select(0, place)
    shared = (torch.minimum(end, t_end) - torch.maximum(begin, t_begin)).clamp_min(0)
    union = torch.maximum(end, t_end) - torch.minimum(begin, t_begin)
    index = theirs.row.index_select(0, place) % max(teacher.mask.shape[1], 1)
    return ours.row.index_select(0, owner), index, shared.double() / union


def _texts(side: Timeline, length: int) -> _Texts:
    begin, end = side.spans.unbind(-1)
    row = (side.mask & (end > begin)).flatten().nonzero().squeeze(1)
    shift = row // max(side.mask.shape[1], 1) * length
    begin, end = (each.flatten().index_select(0, row) + shift for each in (begin, end))
    return _Texts(row, begin, end)


def _candidates(ours: _Texts, theirs: _Texts, length: int) -> tuple[Tensor, Tensor]:
    """For each student token a range of teacher tokens outside of which none overlaps it.

    Before it every token so far ends too early, after it every later one begins too late: the highest end so
    far and the lowest begin from here on are ascending in whatever order the spans are.
    """
    highest_end = theirs.end.cummax(0).values
    lowest_begin = theirs.begin.flip(0).cummin(0).values
    first = _count_up_to(ours.begin, highest_end, length)
    return ranges(first, (_count_up_to(ours.end - 1, lowest_begin, length) - first).clamp_min(0))


def _count_up_to(bound: Tensor, value: Tensor, length: int) -> Tensor:
    """How many values each bound reaches; all lie between 0 and ``length``.

    By counting the values at every character: a third of the time of a binary search.
    """
    return torch.bincount(value, minlength=length).cumsum(0).index_select(0, bound)


def _highest(row: Tensor, place: Tensor, iou: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the pair of the highest IoU, the first of equals."""
    best = iou.new_zeros(rows).scatter_reduce_(0, row, iou, "amax")
    kept = iou == best.index_select(0, row)
    row, place, iou = row[kept], place[kept], iou[kept]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    return row[first], place[first], iou[first]
