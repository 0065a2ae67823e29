"""Run the teachers of a step and align their caches, each in its own way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from kava_core.data.store.reader import decode_target
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.streaming import align_layer_by_layer
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import Aligned
from kava_core.kv.maths.masks import without_autocast
from kava_core.kv.maths.sinks import find_sinks, leave_out, value_lengths
from kava_core.models.teacher import Teacher, TeacherPass
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline

TakeLayer = Callable[[int, Cache], None]
"""Takes the place and the cache of every layer that an aligner reads."""
Side = Mapping[str, Any]
"""The collator's tensors of one model's side of a batch."""


def time_map_of(aligner: TeacherAligner, side: Side, timeline: Timeline) -> TimeMap:
    """Return the map that the collator planned, or plan it."""
    planned: TimeMap | None = side.get("time_map")
    return aligner.plan(Timeline.from_batch(side), timeline) if planned is None else planned


def teacher_named(teachers: Sequence[Teacher], name: str) -> Teacher:
    """Return the teacher of this name."""
    return next(teacher for teacher in teachers if teacher.name == name)


class TeacherReader:
    """Turns a batch's teacher sides into aligned targets, one raw cache alive at a time.

    Args:
        teachers: the teachers that run; none if batches bring stored targets.
        by_layer: align each teacher's layers while it runs, one of them alive at a time. No gradient then
            goes through the targets.
    """

    def __init__(self, teachers: Sequence[Teacher], *, by_layer: bool) -> None:
        self.teachers = tuple(teachers)
        self.by_layer = by_layer

    def read_targets(
        self,
        sides: Mapping[str, Side],
        timeline: Timeline,
        pipeline: KVPipeline,
        chosen: Sequence[bool] | None = None,
        *,
        keep_outputs: bool = False,
    ) -> tuple[list[Aligned], list[TeacherPass]]:
        """Return every teacher's target, and what else its pass gave.

        Args:
            sides: every teacher's side of the batch, by name.
            timeline: the student's positions.
            pipeline: whose aligners make the targets.
            chosen: which teachers run; None: all. Others get an empty target.
            keep_outputs: as for ``Teacher.read``.
        """
        aligned, passes = [], []
        for index, aligner in enumerate(pipeline.teachers):
            if chosen is not None and not chosen[index]:
                aligned.append(pipeline.empty_target(aligner, timeline.mask))
                continue
            target, teacher_pass = self._read_target(
                sides[aligner.name], aligner, timeline, pipeline, keep_outputs
            )
            aligned.append(target)
            if teacher_pass is not None:
                passes.append(teacher_pass)
        return aligned, passes

    def _read_target(
        self,
        side: Side,
        aligner: TeacherAligner,
        timeline: Timeline,
        pipeline: KVPipeline,
        keep_outputs: bool,
    ) -> tuple[Aligned, TeacherPass | None]:
        if "target" in side:
            return Aligned(*decode_target(side)), None
        teacher, time_map = teacher_named(self.teachers, aligner.name), time_map_of(aligner, side, timeline)
        if self.by_layer:
            return _read_target_by_layer(teacher, side, aligner, time_map, keep_outputs)
        teacher_pass = teacher.read(side, keep_outputs=keep_outputs)
        with without_autocast(timeline.mask.device):
            time_map = aligner.without_sinks(time_map, teacher_pass.cache, token_mask(side))
            aligned = pipeline.align_with_map(aligner, teacher_pass.cache, time_map)
        return aligned, without_cache(teacher_pass)


def _read_target_by_layer(
    teacher: Teacher, side: Side, aligner: TeacherAligner, time_map: TimeMap, keep_outputs: bool
) -> tuple[Aligned, TeacherPass]:
    passes: list[TeacherPass] = []
    lengths: list[Tensor] = []

    def run(take_layer: TakeLayer) -> None:
        def take_and_measure(t_layer: int, cache: Cache) -> None:
            if aligner.finds_sinks and cache.values is not None:
                lengths.append(value_lengths(cache.values))
            take_layer(t_layer, cache)

        passes.append(teacher.read_by_layer(side, take_and_measure, keep_outputs=keep_outputs))

    target = align_layer_by_layer(aligner, run, time_map)
    if lengths:  # Sinks show in all layers together, after the last one.
        time_map = leave_out(time_map, find_sinks(torch.cat(lengths, 1), token_mask(side)))
    return Aligned(target, time_map.valid), passes[0]


def token_mask(side: Side) -> Bool[Tensor, "batch time"]:
    """Return which positions of one model's side of a batch hold a token."""
    return Timeline.from_batch(side).mask


def without_cache(teacher_pass: TeacherPass) -> TeacherPass:
    """Return the same pass without its raw cache, so that its memory is freed once the cache is aligned."""
    cache = teacher_pass.cache.pick(())
    return TeacherPass(teacher_pass.teacher, cache, teacher_pass.logits, teacher_pass.hidden_states)


def tensors_of(aligned: Sequence[Aligned]) -> list[Tensor]:
    """Return every tensor of these targets."""
    tensors = []
    for teacher in aligned:
        tensors += [tensor for _, tensor in teacher.target.items()]
    return tensors
