"""Answer questions about a validated spec, without building anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from kava_core.config import PARTS, ComponentConfig, KVLossConfig, Part
from kava_core.errors import SpecError
from kava_core.hookspecs import KINDS
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


def looked_at(spec: PipelineSpec, student_layers: int) -> tuple[int, ...]:
    """Student layers that some loss of weight > 0 looks at, ascending."""
    return tuple(sorted({layer for loss in active(spec) for layer in layers_of(loss, student_layers)}))


def layers_of(loss: KVLossConfig, student_layers: int) -> list[int]:
    """A loss's student layers, counted from 0. SpecError where one does not exist."""
    if loss.layers == "all":
        return list(range(student_layers))
    outside = [layer for layer in loss.layers if not -student_layers <= layer < student_layers]
    if outside:
        raise SpecError(
            f"loss {loss.name!r}: layers {outside}: the student has layers 0 to {student_layers - 1}"
        )
    return sorted({layer % student_layers for layer in loss.layers})


def active(spec: PipelineSpec) -> list[KVLossConfig]:
    """The losses with a weight above 0."""
    return [loss for loss in spec.losses if loss.weight > 0]


def parts_of(spec: PipelineSpec) -> tuple[Part, ...]:
    """The parts some active loss compares, in the fixed order."""
    wanted = {part for loss in active(spec) for part in loss.parts}
    return tuple(part for part in PARTS if part in wanted)


def used_components(spec: PipelineSpec) -> Iterator[tuple[str, ComponentConfig]]:
    """Kind and declaration of every component a run of this spec builds."""
    for teacher in spec.teachers:
        for kind in type(teacher.align).model_fields:
            if kind in KINDS:
                yield kind, getattr(teacher.align, kind)
    if spec.teachers:
        yield "fuser", spec.fuser
    for loss in spec.losses:
        yield "kv_loss", loss


def used_teachers(spec: PipelineSpec) -> tuple[Any, ...]:
    """The spec's teachers that run: all with KV losses, else those whose logits are distilled, or none."""
    if active(spec):
        return spec.teachers
    asked = (*heard(spec), felt(spec))
    return tuple(t for t in spec.teachers if t.name in asked or (t.itself and t.itself.cross_entropy))


def heard(spec: PipelineSpec) -> tuple[str, ...]:
    """Names of the teachers whose logits are distilled."""
    if spec.logits is None or spec.logits.weight == 0:
        return ()
    return spec.logits.teachers or tuple(teacher.name for teacher in spec.teachers)


def felt(spec: PipelineSpec) -> str | None:
    """Name of the teacher whose hidden states are distilled."""
    if spec.codi is None or spec.codi.weight == 0:
        return None
    return spec.codi.teacher or spec.teachers[0].name


def weights_key(teacher: TeacherSpec) -> str:
    """The same for teachers with the same weights, and only for them."""
    return teacher.model_dump_json(exclude={"name", "align", "template", "rationale", "last_step", "itself"})
