"""Tokens aligned by the characters they share, for two tokenizers of one text."""

from __future__ import annotations

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
            enough = iou >= self.min_overlap
            row, place, iou = row[enough], place[enough], iou[enough]
        if self.hard:
            row, place, iou = _highest(row, place, iou, student.mask.numel())
        return TimeMap.of_entries(row, place, iou, student.mask)


def _overlaps(student: Timeline, teacher: Timeline) -> tuple[Tensor, Tensor, Tensor]:
    """Row, teacher position and IoU of every pair that shares characters, row after row."""
    begin, end = _spans(student)
    t_begin, t_end = _spans(teacher)
    first, stop = _candidates(begin, end, t_begin, t_end)
    row, place = ranges(first.flatten(), (stop - first).clamp_min(0).flatten())
    at = row // max(student.mask.shape[1], 1), place
    begin, end, t_begin, t_end = begin.flatten()[row], end.flatten()[row], t_begin[at], t_end[at]
    shared = torch.minimum(end, t_end) - torch.maximum(begin, t_begin)
    union = torch.maximum(end, t_end) - torch.minimum(begin, t_begin)
    some = shared > 0
    return row[some], place[some], shared[some].double() / union[some]


def _spans(timeline: Timeline) -> tuple[Tensor, Tensor]:
    """Begin and end of each token; one without text begins after and ends before all others."""
    begin, end = timeline.spans.unbind(-1)
    texts = timeline.mask & (end > begin)
    return torch.where(texts, begin, torch.iinfo(begin.dtype).max), torch.where(texts, end, 0)


def _candidates(begin: Tensor, end: Tensor, t_begin: Tensor, t_end: Tensor) -> tuple[Tensor, Tensor]:
    """For each student token a range of teacher positions outside of which none overlaps it.

    Before it every token so far ends too early, after it every later one begins too late. The highest end so
    far and the lowest begin from here on are ascending in whatever order the spans are.
    """
    highest_end = t_end.cummax(1).values
    lowest_begin = t_begin.flip(1).cummin(1).values.flip(1)
    first = torch.searchsorted(highest_end, begin.contiguous(), right=True)
    return first, torch.searchsorted(lowest_begin, end.contiguous())


def _highest(row: Tensor, place: Tensor, iou: Tensor, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the pair of the highest IoU, the first of equals."""
    best = iou.new_zeros(rows).scatter_reduce_(0, row, iou, "amax")
    kept = iou == best[row]
    row, place, iou = row[kept], place[kept], iou[kept]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = row[1:] != row[:-1]
    return row[first], place[first], iou[first]
