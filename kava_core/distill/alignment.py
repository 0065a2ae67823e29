"""Decide once how a step compares caches: not at all, with whole targets, or layer by layer.

Each way runs student and teachers in the order that keeps the least memory alive: where whole targets are
made, teachers run before the student has a graph; where terms are formed layer by layer, after it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kava_core.distill.denominators import TOKENS
from kava_core.distill.student_pass import StudentPass
from kava_core.distill.teachers import Side, TeacherReader, teacher_named, tensors_of, time_map_of
from kava_core.distill.terms import KVTerms
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.streaming import TeacherStream, streams_terms, terms_layer_by_layer
from kava_core.kv.compare.values import ROUTER, Aligned
from kava_core.kv.maths.masks import without_autocast
from kava_core.models.side_stream import SideStream
from kava_core.models.teacher import Teacher, TeacherPass
from kava_core.protocols.axes import Cache
from kava_core.protocols.timeline import Timeline


@dataclass(frozen=True)
class StepBatch:
    """What one forward pass reads."""

    student: Side
    teachers: Mapping[str, Side]
    """By name; with ``time_map`` if it is planned already, or a store's side."""
    denominators: Tensor
    """Of the whole batch, over accumulation and processes: ``kava_core.distill.denominators``."""

    @property
    def timeline(self) -> Timeline:
        """Return the student's positions."""
        return Timeline.from_batch(self.student)


@dataclass(frozen=True)
class Step:
    """What one forward pass made, before it becomes one number."""

    student: StudentPass
    teachers: list[TeacherPass]
    """Of the teachers that ran, without their caches."""
    kv_terms: KVTerms


RunStudent = Callable[[StepBatch], StudentPass]


@runtime_checkable
class Alignment(Protocol):
    """A way to compare the student's cache with its teachers'."""

    @property
    def targets(self) -> TeacherReader:
        """Return what makes targets without a student's pass: for calibration, evaluation and stores."""
        ...

    def compare(self, batch: StepBatch, run_student: RunStudent) -> Step:
        """Run student and teachers, and return the KV terms with their current weights."""
        ...

    def compare_apart(self, batch: StepBatch, run_student: RunStudent, *, keep_outputs: bool = False) -> Step:
        """Return terms of which every single one has a gradient, and no total.

        ``keep_outputs``: the teachers' passes hold logits and hidden states that are distilled.
        """
        ...


class NoAlignment:
    """Runs teachers for their logits and hidden states alone."""

    def __init__(self, teachers: Sequence[Teacher]) -> None:
        self.targets = TeacherReader(teachers, by_layer=False)

    def compare(self, batch: StepBatch, run_student: RunStudent) -> Step:
        """Run teachers, then the student; there are no KV terms."""
        return self.compare_apart(batch, run_student, keep_outputs=True)

    def compare_apart(self, batch: StepBatch, run_student: RunStudent, *, keep_outputs: bool = False) -> Step:
        """Run teachers, then the student; there are no KV terms."""
        passes = []
        for teacher in self.targets.teachers:
            passes.append(teacher.read(batch.teachers[teacher.name], keep_outputs=keep_outputs))
        student = run_student(batch)
        return Step(student, passes, KVTerms(torch.zeros_like(student.cross_entropy), {}))


class WholeTargets:
    """Makes every teacher's whole target, then runs the student and compares.

    Args:
        pipeline: aligns and compares.
        teachers: none if batches bring stored targets.
        by_layer: make the targets layer by layer, while each teacher runs.
        side_stream: where work of teachers on another GPU is queued.
    """

    def __init__(
        self, pipeline: KVPipeline, teachers: Sequence[Teacher], *, by_layer: bool, side_stream: SideStream
    ) -> None:
        self.pipeline = pipeline
        self.targets = TeacherReader(teachers, by_layer=by_layer)
        self.side_stream = side_stream

    def compare(self, batch: StepBatch, run_student: RunStudent) -> Step:
        """Run teachers, then the student; the terms keep their gradients."""
        step = self.compare_apart(batch, run_student, keep_outputs=True)
        with without_autocast(step.student.cross_entropy.device):
            total = self.pipeline.weighted_total(step.kv_terms.values)
            total = total + self.pipeline.zero_for_unused_parameters()
        return Step(step.student, step.teachers, KVTerms(total, step.kv_terms.values))

    def compare_apart(self, batch: StepBatch, run_student: RunStudent, *, keep_outputs: bool = False) -> Step:
        """Return terms with gradients and no total."""
        timeline, chosen = batch.timeline, self.pipeline.choose_teachers()
        with self.side_stream():
            aligned, passes = self.targets.read_targets(
                batch.teachers, timeline, self.pipeline, chosen, keep_outputs=keep_outputs
            )
        student = run_student(batch)
        self.side_stream.join(*tensors_of(aligned))
        with without_autocast(student.cross_entropy.device):
            values = self.pipeline.compare_aligned(
                student.cache,
                aligned,
                timeline,
                batch.denominators[TOKENS],
                student.rotation,
                student.fuser_inputs,
            )
        return Step(student, passes, KVTerms(torch.zeros_like(student.cross_entropy), values))


class TermsByLayer:
    """Runs the student, then forms every teacher's terms and their gradients while that teacher runs.

    Args:
        pipeline: aligns and compares.
        teachers: one for each aligner.
    """

    def __init__(self, pipeline: KVPipeline, teachers: Sequence[Teacher]) -> None:
        self.pipeline = pipeline
        self._whole_targets = TeacherReader(teachers, by_layer=False)
        self._targets_by_layer = TeacherReader(teachers, by_layer=True)

    @property
    def targets(self) -> TeacherReader:
        """Return what makes targets without a student's pass.

        Targets made layer by layer have no gradient; if one is wanted, whole caches are aligned.
        """
        return self._whole_targets if torch.is_grad_enabled() else self._targets_by_layer

    def compare(self, batch: StepBatch, run_student: RunStudent) -> Step:
        """Form the weighted sum of all terms."""
        one_sum = self.pipeline.current_weights()[None]
        student, passes, sums, values, fuser_terms = self._form(batch, run_student, one_sum, True)
        total = sums[0] + fuser_terms.get(ROUTER, 0)
        return Step(student, passes, KVTerms(total, values | fuser_terms))

    def compare_apart(self, batch: StepBatch, run_student: RunStudent, *, keep_outputs: bool = False) -> Step:
        """Form every term by itself, each with as much memory as the student's cache."""
        factors = torch.eye(len(self.pipeline.term_names), device=batch.denominators.device)
        student, passes, sums, _, fuser_terms = self._form(batch, run_student, factors, keep_outputs)
        values = dict(zip(self.pipeline.term_names, sums.unbind(), strict=True))
        return Step(student, passes, KVTerms(torch.zeros_like(sums[0]), values | fuser_terms))

    def _form(
        self, batch: StepBatch, run_student: RunStudent, factors: Tensor, keep_outputs: bool
    ) -> tuple[StudentPass, list[TeacherPass], Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Return both sides' passes, sums of terms with gradient, the terms without, the fuser's terms."""
        pipeline, timeline = self.pipeline, batch.timeline
        chosen = pipeline.choose_teachers()
        student = run_student(batch)
        time_maps = [time_map_of(a, batch.teachers[a.name], timeline) for a in pipeline.teachers]
        valid_nowhere = torch.zeros_like(timeline.mask)
        without_targets = []
        for time_map, runs in zip(time_maps, chosen, strict=True):
            without_targets.append(Aligned(Cache(), time_map.valid if runs else valid_nowhere, runs))
        with without_autocast(student.cross_entropy.device):
            own = student.cache.map(part_at_least_float32)
            # A teacher's sinks show after its last layer only: too late for terms that are formed before.
            without_targets = pipeline.without_student_sinks(without_targets, own, timeline.mask)
            view = pipeline.teachers[0].view_of(own)
            weights, fuser_terms = pipeline.route(
                view, without_targets, batch.denominators[TOKENS], student.fuser_inputs
            )
        passes: list[TeacherPass] = []

        def run_teacher(name: str, take_layer: Callable[[int, Cache], None]) -> None:
            teacher, side = teacher_named(self._whole_targets.teachers, name), batch.teachers[name]
            passes.append(teacher.read_by_layer(side, take_layer, keep_outputs=keep_outputs))

        streams = []
        for index, aligner in enumerate(pipeline.teachers):
            if chosen[index]:
                streams.append(TeacherStream(index, partial(run_teacher, aligner.name), time_maps[index]))
        sums, values = terms_layer_by_layer(
            pipeline, student.cache, weights, streams, factors, student.rotation
        )
        return student, passes, sums, values, fuser_terms


def choose_alignment(
    pipeline: KVPipeline, teachers: Sequence[Teacher], *, stream: bool, side_stream: SideStream
) -> Alignment:
    """Return the way that a pipeline's caches are compared, for all steps of a run.

    Args:
        pipeline: aligns and compares.
        teachers: one for each aligner; none if batches bring stored targets.
        stream: keep one teacher layer alive at a time.
        side_stream: where work of teachers on another GPU is queued.
    """
    if not pipeline.compared:
        return NoAlignment(teachers)
    if stream and streams_terms(pipeline):
        return TermsByLayer(pipeline, teachers)
    return WholeTargets(pipeline, teachers, by_layer=stream, side_stream=side_stream)
