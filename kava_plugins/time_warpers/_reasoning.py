"""Find reasoning tokens, pair them in order, and choose them by scores."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.kv.maths.resample import Places, places
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import REASONING, Timeline


def is_reasoning(timeline: Timeline) -> Bool[Tensor, "batch time"]:
    """Return whether each position is a real token of the reasoning."""
    return timeline.mask & (timeline.segments == REASONING)


def reasoning_places(teacher: Timeline, student: Timeline) -> Places:
    """Locate each of the student's reasoning tokens among them, and the teacher's reasoning tokens."""
    return places(is_reasoning(teacher).long() - 1, is_reasoning(student).long() - 1, blocks=1)


def slot_map(teacher: Timeline, student: Timeline) -> TimeMap:
    """Map the student's k-th reasoning token to slot k; valid where the teacher has more than k.

    For a student that has nothing else this is the identity, at no cost.
    """
    at = reasoning_places(teacher, student)
    valid = at.valid & (at.offset < at.t_count)
    if bool(is_reasoning(student).all()):
        return TimeMap.same(valid)
    return TimeMap.gather(at.offset.clamp(0), valid)


def highest_positions(
    scores: Float[Tensor, "batch t_layer t_head t_time"], count: int
) -> Int[Tensor, "batch t_layer t_head _"]:
    """Return the positions of the ``count`` highest scores in time order, of equals the earlier.

    A score of −inf is never taken. If fewer are left, the slots at the end hold the last position of the time
    axis.
    """
    end = scores.shape[3]
    best = scores.argsort(dim=3, descending=True, stable=True)[..., :count]
    best = torch.where(scores.gather(3, best) > -torch.inf, best, end)
    filled = F.pad(best, (0, count - best.shape[3]), value=end)
    return filled.sort(dim=3).values.clamp_max(max(end - 1, 0))
