"""Character IoU by a double loop in exact fractions, and timelines to try it on."""

from __future__ import annotations

from fractions import Fraction

import torch

from kava_core.protocols.axes import Geometry
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import CharIoUConfig

GEOMETRY = Geometry(layer=1, head=1, dim=2, qhead=1, hidden=2)


def warper(**fields):
    return CharIoUConfig(**fields).build(teacher=GEOMETRY, student=GEOMETRY)


def timeline(examples, *, left=0, right=0):
    """One row for each list of spans, with padding on both sides up to one length."""
    time = max(map(len, examples), default=0)
    spans = torch.zeros(len(examples), left + time + right, 2, dtype=torch.long)
    mask = torch.zeros(spans.shape[:2], dtype=torch.bool)
    for b, example in enumerate(examples):
        spans[b, left : left + len(example)] = torch.tensor(example, dtype=torch.long).view(-1, 2)
        mask[b, left : left + len(example)] = True
    return Timeline(mask, (mask.long().cumsum(-1) - 1).clamp_min(0) * mask, mask.long() - 1, spans)


def iou(one, other):
    shared = min(one[1], other[1]) - max(one[0], other[0])
    if shared <= 0 or one[1] <= one[0] or other[1] <= other[0]:
        return Fraction(0)
    return Fraction(shared, max(one[1], other[1]) - min(one[0], other[0]))


def slow(teacher, student, mode="soft", min_overlap=0.0):
    """Dense map in float64 and validity, pair by pair."""
    dense = torch.zeros(*student.mask.shape, teacher.mask.shape[1], dtype=torch.float64)
    for b, i in student.mask.nonzero().tolist():
        theirs = teacher.mask[b].nonzero().flatten().tolist()
        span = student.spans[b, i].tolist()
        found = {j: iou(span, teacher.spans[b, j].tolist()) for j in theirs}
        found = {j: each for j, each in found.items() if each > 0 and float(each) >= min_overlap}
        if mode == "hard" and found:
            found = {max(found, key=lambda j: (found[j], -j)): Fraction(1)}
        for j, each in found.items():
            dense[b, i, j] = float(each / sum(found.values()))
    return dense, dense.sum(-1) > 0


def check(teacher, student, **fields):
    dense, valid = slow(teacher, student, **fields)
    time_map = warper(**fields)(teacher, student)
    assert torch.equal(time_map.valid, valid)
    torch.testing.assert_close(time_map.dense(dense.shape[2]).double(), dense, rtol=0, atol=1e-7)
    return time_map
