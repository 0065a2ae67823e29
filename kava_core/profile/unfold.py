"""A target in a head adapter's view, back in the student's own layers and heads."""

from __future__ import annotations

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.kv.aligner import TeacherAligner
from kava_core.kv.axes import Cache


def unfolded(aligner: TeacherAligner, target: Cache, student: Cache) -> Cache | None:
    """The target with the student's extents, so that its keys and values can stand in for the student's.

    A view such as ``flat`` puts the student's channels in another order and changes none of them, so the
    numbers of the channels, sent through it, tell how to undo it.

    Returns:
        None where the target has other extents than the student's view, or the view is no mere order.
    """
    found = {part: _undone(aligner, x, getattr(student, part), part) for part, x in target.items()}
    there = {part: x for part, x in found.items() if x is not None}
    return Cache(**there) if len(there) == len(found) else None


def _undone(aligner: TeacherAligner, x: Tensor, like: Tensor, part: Part) -> Tensor | None:
    """``batch layer head time dim`` of the student; ``x`` is of the view."""
    _, layer, head, _, dim = like.shape
    if aligner.lifts:
        return None
    count = layer * head * dim
    named = torch.arange(count, dtype=torch.float64, device=x.device).view(1, layer, head, 1, dim)
    view = getattr(aligner.view_of(Cache(**{part: named})), part)
    if (view.shape[1:3], view.shape[4]) != (x.shape[1:3], x.shape[4]) or view.numel() != count:
        return None
    order = view.flatten().long().argsort()
    flat = x.movedim(3, 1).flatten(2).index_select(2, order)
    return flat.unflatten(2, (layer, head, dim)).movedim(1, 3)
