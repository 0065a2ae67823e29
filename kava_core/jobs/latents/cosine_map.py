"""Measure where the keys and values of latent tokens resemble a teacher's: mean cosines, and a control.

The control is the teacher of the next example: what is alike there as well is due to position and to the
kind of task, not to the example's content.
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
class CosineSums:
    """Summed cosines and how many there are, to be added up over batches."""

    total: Float[Tensor, "layer _"]
    count: Int[Tensor, " _"]
    """Examples that have this column."""

    @property
    def mean(self) -> Float[Tensor, "layer _"]:
        """Return the mean cosine; NaN in a column that no example has."""
        return self.total / self.count


@dataclass(frozen=True)
class CosineMaps:
    """Maps of one teacher and one part, such as keys. Columns that no example has are NaN."""

    slots: CosineSums
    """``layer time``: the student's layer and slot against the aligned target there, mean over heads."""
    steps: CosineSums
    """``time t_time``: slot against the teacher's reasoning token, before time alignment, mean over layers
    and heads."""
    slots_next: CosineSums | None
    """As ``slots``, against the next example's teacher; None for a single example."""
    steps_next: CosineSums | None
    """As ``steps``, against the next example's teacher; None for a single example."""


TeacherMaps = dict[str, dict[Part, CosineMaps]]
"""Maps by teacher and part."""


def comparable_aligners(distiller: Distiller) -> list[TeacherAligner]:
    """Return the aligners that bring a teacher to the student's heads and width; others have no cosine."""
    pipeline = distiller.pipeline
    return [aligner for aligner in pipeline.teachers if _has_student_extents(aligner, pipeline.parts)]


def _has_student_extents(aligner: TeacherAligner, parts: Sequence[Part]) -> bool:
    target, view = aligner.target, aligner.view
    same_heads = all(target.heads(part) == view.heads(part) for part in parts)
    return same_heads and (target.layer, target.dim) == (view.layer, view.dim)


@torch.no_grad()
def compute_cosine_maps(distiller: Distiller, batches: Iterable[Mapping[str, Any]]) -> TeacherMaps:
    """Average over all examples of the batches, for every teacher that can be compared.

    The next example is that of the same batch, and the first after the last.
    """
    by_batch: dict[str, dict[Part, list[CosineMaps]]] = {}
    for batch in batches:
        for name, part, maps in _batch_maps(distiller, batch):
            by_batch.setdefault(name, {}).setdefault(part, []).append(maps)
    summed: TeacherMaps = {}
    for name, parts in by_batch.items():
        summed[name] = {part: _add_maps(maps) for part, maps in parts.items()}
    return summed


def _batch_maps(distiller: Distiller, batch: Mapping[str, Any]) -> Iterator[tuple[str, Part, CosineMaps]]:
    pipeline = distiller.pipeline
    student = student_cache_without_dropout(distiller, batch["student"])
    targets = aligned_targets(distiller, batch)
    comparable = {aligner.name for aligner in comparable_aligners(distiller)}
    for aligner, aligned in zip(pipeline.teachers, targets, strict=True):
        if aligner.name not in comparable:
            continue
        side = batch["teachers"][aligner.name]
        view = aligner.view_of(student)
        unaligned = time_unaligned_cache(distiller, aligner, side)
        for part, slots in view.items():
            target, steps = getattr(aligned.target, part), getattr(unaligned, part)
            yield aligner.name, part, _part_maps(slots, target, aligned.valid, steps, side["segments"])


def time_unaligned_cache(distiller: Distiller, aligner: TeacherAligner, side: Mapping[str, Any]) -> Cache:
    """Return a teacher's cache in the student's layers, heads and width, at all its own positions."""
    (teacher,) = (each for each in distiller.teachers if each.name == aligner.name)
    if aligner.evictor is not None:  # its own cache would hold only what is kept
        teacher = type(teacher)(
            teacher.name,
            teacher.model,
            layers=aligner.sources,
            parts=distiller.parts,
            rotary=distiller.rotary,
        )
    same_time = TimeMap.same(side["attention_mask"].bool())
    return aligner.align(teacher.cache(side).map(part_at_least_float32), same_time)


def _part_maps(slots: Tensor, target: Tensor, valid: Tensor, steps: Tensor, segments: Tensor) -> CosineMaps:
    """Compare the student's latent tokens with their own example's teacher, and with the next example's.

    Args:
        slots: the student's latent tokens, ``batch layer head time dim``.
        target: the aligned teacher, of the same extents.
        valid: where there is a target, ``batch time``.
        steps: the teacher at its own positions, ``batch layer head t_time dim``.
        segments: of the teacher's positions, ``batch t_time``.
    """
    slots_next = steps_next = None
    if len(slots) > 1:
        slots_next = sum_slot_cosines(slots, target.roll(-1, 0), valid.roll(-1, 0))
        steps_next = sum_step_cosines(slots, steps.roll(-1, 0), segments.roll(-1, 0))
    return CosineMaps(
        sum_slot_cosines(slots, target, valid),
        sum_step_cosines(slots, steps, segments),
        slots_next,
        steps_next,
    )


def sum_slot_cosines(
    student: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    valid: Bool[Tensor, "batch time"],
) -> CosineSums:
    """Sum the cosines of the student with its target at valid positions, mean over heads: ``layer time``."""
    cosines = (_normalised(student) * _normalised(target)).sum(-1).mean(2)
    return CosineSums(torch.where(valid[:, None], cosines, 0).double().sum(0), valid.sum(0))


def sum_step_cosines(
    student: Float[Tensor, "batch layer head time dim"],
    teacher: Float[Tensor, "batch layer head t_time dim"],
    segments: Int[Tensor, "batch t_time"],
) -> CosineSums:
    """Sum the cosines of every slot with every token of the teacher's reasoning: ``time t_time``.

    The tokens of the reasoning are counted from 0 in every example.
    """
    sums = torch.einsum("blhsd, blhtd -> bst", _normalised(student), _normalised(teacher))
    cosines = sums / (student.shape[1] * student.shape[2])
    inside = segments.eq(REASONING)
    longest = int(inside.sum(1).amax())
    order = inside.long().argsort(dim=1, descending=True, stable=True)[:, :longest]
    exists = inside.gather(1, order)
    cosines = cosines.gather(2, order[:, None].expand(-1, student.shape[3], -1))
    return CosineSums(torch.where(exists[:, None], cosines, 0).double().sum(0), exists.sum(0))


def _normalised(vectors: Tensor) -> Tensor:
    """Return vectors of length 1; a zero vector stays one, so its cosines are 0."""
    return F.normalize(vectors, dim=-1, eps=torch.finfo(vectors.dtype).tiny)


def _add_maps(maps: Sequence[CosineMaps]) -> CosineMaps:
    """Add up the maps of all batches; a batch of a single example has no control."""
    slots: list[CosineSums] = []
    steps: list[CosineSums] = []
    slots_next: list[CosineSums] = []
    steps_next: list[CosineSums] = []
    for each in maps:
        slots.append(each.slots)
        steps.append(each.steps)
        if each.slots_next is not None and each.steps_next is not None:
            slots_next.append(each.slots_next)
            steps_next.append(each.steps_next)
    return CosineMaps(
        _add_sums(slots),
        _add_sums(steps),
        _add_sums(slots_next) if slots_next else None,
        _add_sums(steps_next) if steps_next else None,
    )


def _add_sums(sums: Sequence[CosineSums]) -> CosineSums:
    """Add up sums whose columns may differ in number; those that are missing count as 0."""
    width = max(len(each.count) for each in sums)
    totals: list[Tensor] = []
    counts: list[Tensor] = []
    for each in sums:
        missing_columns = (0, width - len(each.count))
        totals.append(F.pad(each.total, missing_columns))
        counts.append(F.pad(each.count, missing_columns))
    return CosineSums(torch.stack(totals).sum(0).cpu(), torch.stack(counts).sum(0).cpu())
