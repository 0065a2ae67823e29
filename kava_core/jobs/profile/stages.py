"""Every teacher's cache, and the student's, at every stage: what they hold, and what a stage takes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.errors import NonFiniteError
from kava_core.jobs.profile.numbers import Numbers, numbers
from kava_core.jobs.profile.prepared import Subject, time_map_of
from kava_core.jobs.profile.timing import Gauge, repeated
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.maths.masks import without_autocast
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap

CAPTURED, PLAN, STUDENT, STEP = "captured", "time map", "student", "step"
"""Of a teacher: its forward pass, and planning where its positions go; the student's forward pass; and the
whole forward pass with all losses."""


@dataclass(frozen=True)
class Stage:
    """One part at one stage; ``teacher`` is None for the student's own cache."""

    teacher: str | None
    part: Part
    stage: str
    numbers: Numbers
    layers: tuple[int, ...]
    """What layers the axis ``layer`` stands for: the teacher's where captured, else the student's."""

    @property
    def bad_layers(self) -> tuple[int, ...]:
        """Numbers of the layers with NaN or infinity."""
        return tuple(self.layers[place] for place in self.numbers.bad_layers)


@dataclass(frozen=True)
class Cost:
    """Of one stage of all its parts, on one batch."""

    teacher: str | None
    stage: str
    milliseconds: float
    mebibytes: float


def stages(subject: Subject, batches: Sequence[Mapping[str, Any]]) -> list[Stage]:
    """All parts that losses compare, teacher by teacher in the order they go through, then the student."""
    found = [
        one
        for place in range(len(subject.teachers))
        for one in _of_teacher(subject, place, [_steps(subject, place, batch) for batch in batches])
    ]
    own = [(subject.compared(b["student"]), b["student"]["attention_mask"].bool()) for b in batches]
    for part in subject.pipeline.parts:
        held = numbers([(getattr(cache, part), mask) for cache, mask in own])
        found.append(Stage(None, part, STUDENT, held, subject.pipeline.layers))
    return found


Step = dict[Part, tuple[str, Tensor, Tensor]]
"""Of every part: the stage, the tensor and where it is real."""


def _steps(subject: Subject, place: int, batch: Mapping[str, Any]) -> list[Step]:
    aligner, teacher = subject.pipeline.teachers[place], subject.teachers[place]
    side = batch["teachers"][teacher.name]
    with subject.autocast():
        cache = teacher.cache(side)
    mask = side["attention_mask"].bool()
    time_map = time_map_of(aligner, side, batch["student"])
    orders = {part: ("layers", *aligner.stages(part, x.shape[3], time_map)) for part, x in cache.items()}
    found: list[Step] = [{part: (CAPTURED, x, mask) for part, x in cache.items()}]
    with without_autocast(subject.device):
        for count, (_, now) in enumerate(aligner.steps(cache.map(part_at_least_float32), time_map), 1):
            done = {part: order[:count] for part, order in orders.items()}
            real = {part: time_map.valid if "time" in done[part] else mask for part in done}
            found.append({part: (done[part][-1], x, real[part]) for part, x in now.items()})
    return found


def _of_teacher(subject: Subject, place: int, batches: Sequence[list[Step]]) -> Iterator[Stage]:
    """Stages may differ between batches, whose lengths choose the order; the first batch's are named."""
    aligner = subject.pipeline.teachers[place]
    for steps in zip(*batches, strict=True):
        for part, (stage, *_) in steps[0].items():
            held = numbers([step[part][1:] for step in steps])
            layers = aligner.sources if stage == CAPTURED else subject.pipeline.layers
            merged = held.shape[1] != len(layers)
            yield Stage(aligner.name, part, stage, held, tuple(range(held.shape[1])) if merged else layers)


def costs(subject: Subject, batch: Mapping[str, Any]) -> list[Cost]:
    """Of every stage, each teacher's in order, the student's forward pass, and of the whole forward pass."""
    found = []
    for place, aligner in enumerate(subject.pipeline.teachers):
        work = partial(_work_of_teacher, subject, place, batch)
        found += [Cost(aligner.name, stage, *cost) for stage, cost in repeated(work, subject.device).items()]
    work = partial(_work_of_step, subject, batch)
    return found + [Cost(None, stage, *cost) for stage, cost in repeated(work, subject.device).items()]


def _work_of_teacher(
    subject: Subject, place: int, batch: Mapping[str, Any], gauge: Gauge
) -> Iterator[tuple[str, float]]:
    aligner, teacher = subject.pipeline.teachers[place], subject.teachers[place]
    side = batch["teachers"][teacher.name]
    value, cache = gauge(lambda: _captured(subject, place, side))
    yield CAPTURED, value
    planned: TimeMap
    value, planned = gauge(lambda: time_map_of(aligner, side, batch["student"]))
    yield PLAN, value
    with without_autocast(subject.device):
        steps = aligner.steps(cache, planned)
        value, step = gauge(lambda: next(steps, None))
        while step is not None:
            yield step[0], value
            value, step = gauge(lambda: next(steps, None))


def _captured(subject: Subject, place: int, side: Mapping[str, Any]) -> Cache:
    with subject.autocast():
        return subject.teachers[place].cache(side).map(part_at_least_float32)


def _work_of_step(subject: Subject, batch: Mapping[str, Any], gauge: Gauge) -> Iterator[tuple[str, float]]:
    yield STUDENT, gauge(lambda: _forward(subject, batch["student"]))[0]
    items = subject.distiller.loss_denominators(batch)
    yield STEP, gauge(lambda: _step(subject, batch, items))[0]


def _forward(subject: Subject, side: Mapping[str, Any]) -> None:
    text = {name: side[name] for name in ("input_ids", "attention_mask")}
    with subject.autocast():
        subject.distiller.student(**text, use_cache=False)


def _step(subject: Subject, batch: Mapping[str, Any], items: Tensor) -> None:
    # Debug mode stops at NaN and infinity, which are told of the stages.
    with subject.autocast(), torch.no_grad(), suppress(NonFiniteError):
        subject.distiller(batch["student"], batch["teachers"], items)
