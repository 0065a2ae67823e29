"""Where the keys and values of latent tokens resemble a teacher's: mean cosines, and a control beside them.

The control is the teacher of the next example: what is alike there as well is due to position and to the
kind of task, not to what the example says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from kava_core.config import Part
from kava_core.distill.calibration import aligned_targets, student_cache_without_dropout
from kava_core.distill.distiller import Distiller
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import REASONING


@dataclass(frozen=True)
class Sums:
    """Summed cosines and how many there are, to be added up over batches."""

    total: Float[Tensor, "layer _"]
    count: Int[Tensor, " _"]
    """Examples that have this column."""

    @property
    def mean(self) -> Float[Tensor, "layer _"]:
        """NaN in a column that no example has."""
        return self.total / self.count


@dataclass(frozen=True)
class CosineMaps:
    """Of one teacher and one part, keys say. Columns that no example has are NaN."""

    slots: Sums
    """``layer time``: the student's layer and slot against the aligned target there, mean over heads."""
    steps: Sums
    """``time t_time``: slot against the teacher's reasoning token, before time alignment, mean over layers
    and heads."""
    slots_next: Sums | None
    """The same against the next example's teacher; None for a single example."""
    steps_next: Sums | None


Maps = dict[str, dict[Part, CosineMaps]]
"""By teacher and part."""


def comparable(distiller: Distiller) -> list[TeacherAligner]:
    """The aligners that bring a teacher to the student's heads and width, without which is no cosine."""
    pipeline = distiller.pipeline
    return [a for a in pipeline.teachers if _same_extents(a, pipeline.parts)]


def _same_extents(aligner: TeacherAligner, parts: Sequence[Part]) -> bool:
    target, view = aligner.target, aligner.view
    heads = all(target.heads(part) == view.heads(part) for part in parts)
    return heads and (target.layer, target.dim) == (view.layer, view.dim)


@torch.no_grad()
def cosine_maps(distiller: Distiller, batches: Iterable[Mapping[str, Any]]) -> Maps:
    """Means over all examples of the batches, for every teacher that is ``comparable``.

    The next example is that of the same batch, and the first after the last.
    """
    found: dict[str, dict[Part, list[CosineMaps]]] = {}
    for batch in batches:
        for name, part, maps in _of_batch(distiller, batch):
            found.setdefault(name, {}).setdefault(part, []).append(maps)
    return {name: {part: _added(maps) for part, maps in parts.items()} for name, parts in found.items()}


def _of_batch(distiller: Distiller, batch: Mapping[str, Any]) -> Iterator[tuple[str, Part, CosineMaps]]:
    pipeline = distiller.pipeline
    student = student_cache_without_dropout(distiller, batch["student"])
    aligned = aligned_targets(distiller, batch)
    usable = {aligner.name for aligner in comparable(distiller)}
    for aligner, one in zip(pipeline.teachers, aligned, strict=True):
        if aligner.name not in usable:
            continue
        side = batch["teachers"][aligner.name]
        view, steps = aligner.view_of(student), dict(unaligned(distiller, aligner, side).items())
        targets = dict(one.target.items())
        for part, own in view.items():
            yield aligner.name, part, _maps(own, (targets[part], one.valid), (steps[part], side["segments"]))


def unaligned(distiller: Distiller, aligner: TeacherAligner, side: Mapping[str, Any]) -> Cache:
    """A teacher's cache in the student's layers, heads and width, at all of the teacher's positions."""
    (teacher,) = (one for one in distiller.teachers if one.name == aligner.name)
    if aligner.evictor is not None:  # else its cache would hold what is kept alone
        how: dict[str, Any] = {"parts": distiller.parts, "rotary": distiller.rotary}
        teacher = type(teacher)(teacher.name, teacher.model, layers=aligner.sources, **how)
    same = TimeMap.same(side["attention_mask"].bool())
    return aligner.align(teacher.cache(side).map(part_at_least_float32), same)


def _maps(own: Tensor, target: tuple[Tensor, Tensor], steps: tuple[Tensor, Tensor]) -> CosineMaps:
    following = [tuple(x.roll(-1, 0) for x in pair) for pair in (target, steps)]
    has_next = len(own) > 1
    return CosineMaps(
        slot_sums(own, *target),
        step_sums(own, *steps),
        slot_sums(own, *following[0]) if has_next else None,
        step_sums(own, *following[1]) if has_next else None,
    )


def slot_sums(
    own: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    valid: Bool[Tensor, "batch time"],
) -> Sums:
    """``layer time``: cosines of the student with its target where there is one, mean over heads."""
    cosines = (_unit(own) * _unit(target)).sum(-1).mean(2)
    return Sums(torch.where(valid[:, None], cosines, 0).double().sum(0), valid.sum(0))


def step_sums(
    own: Float[Tensor, "batch layer head time dim"],
    teacher: Float[Tensor, "batch layer head t_time dim"],
    segments: Int[Tensor, "batch t_time"],
) -> Sums:
    """``time t_time``: cosines of every slot with every token of the teacher's reasoning, counted from 0."""
    pattern = "blhsd, blhtd -> bst"
    cosines = torch.einsum(pattern, _unit(own), _unit(teacher)) / (own.shape[1] * own.shape[2])
    inside = segments.eq(REASONING)
    longest = int(inside.sum(1).amax())
    order = inside.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    there = inside.gather(1, order)
    cosines = cosines.gather(2, order[:, None].expand(-1, own.shape[3], -1))
    return Sums(torch.where(there[:, None], cosines, 0).double().sum(0), there.sum(0))


def _unit(x: Tensor) -> Tensor:
    """A zero vector stays one, so its cosines are 0."""
    return F.normalize(x, dim=-1, eps=torch.finfo(x.dtype).tiny)


def _added(maps: Sequence[CosineMaps]) -> CosineMaps:
    slots_next = [one.slots_next for one in maps if one.slots_next is not None]
    steps_next = [one.steps_next for one in maps if one.steps_next is not None]
    return CosineMaps(
        _sum([one.slots for one in maps]),
        _sum([one.steps for one in maps]),
        _sum(slots_next) if slots_next else None,
        _sum(steps_next) if steps_next else None,
    )


def _sum(sums: Sequence[Sums]) -> Sums:
    """Columns that only some have count as far as they go."""
    width = max(len(one.count) for one in sums)
    total, count = (
        torch.stack([F.pad(x, (0, width - x.shape[-1])) for x in each]).sum(0)
        for each in ([one.total for one in sums], [one.count for one in sums])
    )
    return Sums(total.cpu(), count.cpu())
