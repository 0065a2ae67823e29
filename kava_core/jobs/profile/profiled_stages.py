"""Take every teacher's cache, and the student's, through every stage: what they hold, what a stage takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import NonFiniteError
from kava_core.jobs.profile.meters import Meter, measure_repeatedly
from kava_core.jobs.profile.part_numbers import PartNumbers, part_numbers
from kava_core.jobs.profile.prepared_variant import PreparedVariant, Side, plan_time_map
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.maths.masks import without_autocast
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap

CAPTURED = "captured"
"""Stage of a teacher: its forward pass."""
PLAN = "time map"
"""Stage of a teacher: planning where its positions go."""
STUDENT = "student"
"""The student's forward pass."""
STEP = "step"
"""The whole forward pass with all losses."""


@dataclass(frozen=True)
class Stage:
    """What one part holds at one stage."""

    teacher: str | None
    """None for the student's own cache."""
    part: Part
    stage: str
    numbers: PartNumbers
    layers: tuple[int, ...]
    """Numbers of the layers along the axis ``layer``: the teacher's if captured, else the student's."""

    @property
    def bad_layers(self) -> tuple[int, ...]:
        """Return the numbers of the layers with NaN or infinity."""
        return tuple(self.layers[index] for index in self.numbers.bad_layers)


@dataclass(frozen=True)
class Cost:
    """What one stage of all parts takes on one batch."""

    teacher: str | None
    stage: str
    milliseconds: float
    mebibytes: float


class _PartAtStage(NamedTuple):
    """One part of a teacher's cache after one stage."""

    stage: str
    tensor: Float[Tensor, "batch layer head time dim"]
    real: Bool[Tensor, "batch time"]


def profile_stages(variant: PreparedVariant, batches: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """Measure all parts that losses compare, teacher by teacher in the order of stages, then the student."""
    stages: list[Stage] = []
    for index in range(len(variant.teachers)):
        steps_of_batches = [_teacher_steps(variant, index, batch) for batch in batches]
        stages += _teacher_stages(variant, index, steps_of_batches)
    student_caches: list[tuple[Cache, Tensor]] = []
    for batch in batches:
        side = batch["student"]
        student_caches.append((variant.compared_student_cache(side), side["attention_mask"].bool()))
    for part in variant.pipeline.parts:
        numbers = part_numbers([(getattr(cache, part), mask) for cache, mask in student_caches])
        stages.append(Stage(None, part, STUDENT, numbers, variant.pipeline.layers))
    return stages


def _teacher_steps(
    variant: PreparedVariant, index: int, batch: Mapping[str, Any]
) -> list[dict[Part, _PartAtStage]]:
    """Return all parts of a teacher after each of its stages."""
    aligner, teacher = variant.pipeline.teachers[index], variant.teachers[index]
    side = batch["teachers"][teacher.name]
    with variant.autocast():
        cache = teacher.cache(side)
    mask = side["attention_mask"].bool()
    time_map = plan_time_map(aligner, side, batch["student"])
    steps = [{part: _PartAtStage(CAPTURED, tensor, mask) for part, tensor in cache.items()}]
    orders = {}
    for part, tensor in cache.items():
        orders[part] = ("layers", *aligner.stages(part, tensor.shape[3], time_map))
    with without_autocast(variant.device):
        caches = aligner.steps(cache.map(part_at_least_float32), time_map)
        for done, (_, staged) in enumerate(caches, start=1):
            step = {}
            for part, tensor in staged.items():
                stages_done = orders[part][:done]
                real = time_map.valid if "time" in stages_done else mask
                step[part] = _PartAtStage(stages_done[-1], tensor, real)
            steps.append(step)
    return steps


def _teacher_stages(
    variant: PreparedVariant, index: int, batches: Sequence[list[dict[Part, _PartAtStage]]]
) -> Iterator[Stage]:
    """Measure every part after every stage.

    The order of stages may differ between batches, whose lengths choose it; the first batch's is named.
    """
    aligner = variant.pipeline.teachers[index]
    for steps in zip(*batches, strict=True):
        for part, first in steps[0].items():
            numbers = part_numbers([(step[part].tensor, step[part].real) for step in steps])
            layers = aligner.sources if first.stage == CAPTURED else variant.pipeline.layers
            count = numbers.shape[1]
            merged = count != len(layers)
            yield Stage(aligner.name, part, first.stage, numbers, tuple(range(count)) if merged else layers)


def profile_costs(variant: PreparedVariant, batch: Mapping[str, Any]) -> list[Cost]:
    """Measure every stage of each teacher in order, the student's forward pass, and the whole step's."""
    costs = []
    for index, aligner in enumerate(variant.pipeline.teachers):
        work = partial(_run_teacher, variant, index, batch)
        for stage, (milliseconds, mebibytes) in measure_repeatedly(work, variant.device).items():
            costs.append(Cost(aligner.name, stage, milliseconds, mebibytes))
    work = partial(_run_step, variant, batch)
    for stage, (milliseconds, mebibytes) in measure_repeatedly(work, variant.device).items():
        costs.append(Cost(None, stage, milliseconds, mebibytes))
    return costs


def _run_teacher(
    variant: PreparedVariant, index: int, batch: Mapping[str, Any], meter: Meter
) -> Iterator[tuple[str, float]]:
    """Run and align a teacher; yield the name and measure of every stage."""
    aligner, teacher = variant.pipeline.teachers[index], variant.teachers[index]
    side = batch["teachers"][teacher.name]
    value, cache = meter(lambda: _capture_teacher(variant, index, side))
    yield CAPTURED, value
    time_map: TimeMap
    value, time_map = meter(lambda: plan_time_map(aligner, side, batch["student"]))
    yield PLAN, value
    with without_autocast(variant.device):
        steps = aligner.steps(cache, time_map)
        value, step = meter(lambda: next(steps, None))
        while step is not None:
            stage, _ = step
            yield stage, value
            value, step = meter(lambda: next(steps, None))


def _capture_teacher(variant: PreparedVariant, index: int, side: Side) -> Cache:
    with variant.autocast():
        return variant.teachers[index].cache(side).map(part_at_least_float32)


def _run_step(
    variant: PreparedVariant, batch: Mapping[str, Any], meter: Meter
) -> Iterator[tuple[str, float]]:
    """Run the student, then the whole forward pass; yield the name and measure of both."""
    value, _ = meter(lambda: _run_student(variant, batch["student"]))
    yield STUDENT, value
    denominators = variant.distiller.loss_denominators(batch)
    value, _ = meter(lambda: _run_distiller(variant, batch, denominators))
    yield STEP, value


def _run_student(variant: PreparedVariant, side: Side) -> None:
    with variant.autocast():
        variant.distiller.student(
            input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False
        )


def _run_distiller(variant: PreparedVariant, batch: Mapping[str, Any], denominators: Tensor) -> None:
    # Debug mode stops at NaN and infinity, which the stages report.
    with variant.autocast(), torch.no_grad(), suppress(NonFiniteError):
        variant.distiller(batch["student"], batch["teachers"], denominators)
