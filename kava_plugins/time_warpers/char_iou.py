"""Align tokens by the characters they share, for two tokenizers of one text."""

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

    Spans may repeat (several tokens in one emoji), be empty, or come in any order. Computed with numpy on
    the CPU, whose small operations cost less than torch's.
    """

    def __init__(self, config: CharIoUConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.hard = config.mode == "hard"
        self.min_overlap = config.min_overlap

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map tokens by their overlap; valid where a real token overlaps the teacher's by ``min_overlap``."""
        row, position, iou = _overlapping_pairs(student, teacher)
        if self.min_overlap:
            row, position, iou = _keep_pairs(iou >= self.min_overlap, row, position, iou)
        if self.hard:
            row, position, iou = _best_pairs(row, position, iou)
        device = student.mask.device
        rows = torch.from_numpy(row).to(device, torch.long)
        positions = torch.from_numpy(position).to(device, torch.long)
        return TimeMap.of_entries(rows, positions, torch.from_numpy(iou).to(device), student.mask)


class _TextTokens(NamedTuple):
    """The tokens of a batch that have text, one example after another."""

    example: Integers
    position: Integers
    begin: Integers
    """First character."""
    end: Integers

    def shift_examples(self, stride: int) -> _TextTokens:
        """Number each example's characters after those of the example before it."""
        fits_int32 = (int(self.example.max(initial=0)) + 1) * stride < 2**31
        shift: Any = self.example.astype(np.int32 if fits_int32 else np.int64) * stride
        return self._replace(begin=self.begin + shift, end=self.end + shift)


def _tokens_with_text(timeline: Timeline) -> _TextTokens:
    mask = timeline.mask.cpu().numpy()
    row = np.flatnonzero(mask).astype(np.int32)
    spans = timeline.spans.cpu().numpy().reshape(-1, 2).take(row, 0)
    begin, end = spans.T.astype(np.int32)
    has_text = end > begin
    if not has_text.all():
        row, begin, end = row[has_text], begin[has_text], end[has_text]
    example = row // max(mask.shape[1], 1)
    return _TextTokens(example, row - example * mask.shape[1], begin, end)


def _overlapping_pairs(student: Timeline, teacher: Timeline) -> tuple[Integers, Integers, Floats]:
    """Return row, teacher position and IoU of every pair that shares characters, row after row."""
    tokens, t_tokens = _tokens_with_text(student), _tokens_with_text(teacher)
    stride = max(int(tokens.end.max(initial=0)), int(t_tokens.end.max(initial=0)))
    tokens, t_tokens = tokens.shift_examples(stride), t_tokens.shift_examples(stride)
    chosen, t_chosen = _candidate_pairs(tokens, t_tokens)
    begin, end = tokens.begin.take(chosen), tokens.end.take(chosen)
    t_begin, t_end = t_tokens.begin.take(t_chosen), t_tokens.end.take(t_chosen)
    intersection = np.minimum(end, t_end) - np.maximum(begin, t_begin)
    union = np.maximum(end, t_end) - np.minimum(begin, t_begin)
    row = (tokens.example * student.mask.shape[1] + tokens.position).take(chosen)
    return _keep_pairs(intersection > 0, row, t_tokens.position.take(t_chosen), intersection / union)


def _candidate_pairs(tokens: _TextTokens, t_tokens: _TextTokens) -> tuple[Integers, Integers]:
    """Return pairs outside of which none overlaps: for each token a range of the other side's.

    Before the range every token so far ends too early, after it every later one begins too late. The highest
    end so far and the lowest begin from here on are ascending in whatever order the spans are.
    """
    highest_end = np.maximum.accumulate(t_tokens.end)
    lowest_begin = np.minimum.accumulate(t_tokens.begin[::-1])[::-1]
    first = np.searchsorted(highest_end, tokens.begin, side="right")
    count = np.maximum(np.searchsorted(lowest_begin, tokens.end) - first, 0)
    token = np.repeat(np.arange(len(count), dtype=np.int32), count)
    pairs_before = count.cumsum() - count
    shift = np.repeat((first - pairs_before).astype(np.int32), count)
    return token, np.arange(len(token), dtype=np.int32) + shift


def _keep_pairs(
    kept: npt.NDArray[np.bool_], row: Integers, position: Integers, iou: Floats
) -> tuple[Integers, Integers, Floats]:
    return (row, position, iou) if kept.all() else (row[kept], position[kept], iou[kept])


def _best_pairs(row: Integers, position: Integers, iou: Floats) -> tuple[Integers, Integers, Floats]:
    """Return the pair of the highest IoU of each row, the first of equals."""
    order = np.lexsort((position, -iou, row))
    begins_row = np.append(True, np.diff(row[order]) != 0)[: len(order)]
    best = order[begins_row]
    return row[best], position[best], iou[best]
