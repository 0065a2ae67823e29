"""Answer questions about a validated spec, without building anything."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from kava_core.config import PARTS, ComponentConfig, KVLossConfig, Part
from kava_core.errors import SpecError
from kava_core.hookspecs import KINDS
from kava_core.specfile.sections.losses import LogitsSpec, TeachersTerm
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


def compared_layers(spec: PipelineSpec, student_layers: int) -> tuple[int, ...]:
    """Return the student layers that some loss with a weight above 0 compares, ascending from 0.

    Raises:
        SpecError: a loss names a layer that the student does not have.
    """
    layers: set[int] = set()
    for loss in active_losses(spec):
        layers.update(layers_of_loss(loss, student_layers))
    return tuple(sorted(layers))


def layers_of_loss(loss: KVLossConfig, student_layers: int) -> list[int]:
    """Return the student layers that a loss compares, ascending from 0.

    Raises:
        SpecError: the loss names a layer that the student does not have.
    """
    return chosen_layers(loss.layers, student_layers, where=f"loss {loss.name!r}")


def chosen_layers(layers: tuple[int, ...] | Literal["all"], student_layers: int, *, where: str) -> list[int]:
    """Return the student layers that a term names, ascending from 0.

    Args:
        layers: as in the spec; negative ones are counted from the last.
        student_layers: how many the student has.
        where: how the error names the term.

    Raises:
        SpecError: the term names a layer that the student does not have.
    """
    if layers == "all":
        return list(range(student_layers))
    outside = [layer for layer in layers if not -student_layers <= layer < student_layers]
    if outside:
        raise SpecError(f"{where}: layers {outside}: the student has layers 0 to {student_layers - 1}")
    return sorted({layer % student_layers for layer in layers})


def active_losses(spec: PipelineSpec) -> list[KVLossConfig]:
    """Return the KV losses with a weight above 0."""
    return [loss for loss in spec.losses if loss.weight > 0]


def compared_parts(spec: PipelineSpec) -> tuple[Part, ...]:
    """Return which of keys, values and queries some active loss compares, in this order."""
    parts: set[Part] = set()
    for loss in active_losses(spec):
        parts.update(loss.parts)
    return tuple(part for part in PARTS if part in parts)


def used_components(spec: PipelineSpec) -> Iterator[tuple[str, ComponentConfig]]:
    """Iterate over kind and declaration of every component that a run of this spec builds."""
    for teacher in spec.teachers:
        for kind in type(teacher.align).model_fields:
            if kind in KINDS:
                yield kind, getattr(teacher.align, kind)
    if spec.teachers:
        yield "fuser", spec.fuser
    for loss in spec.losses:
        yield "kv_loss", loss


def used_teachers(spec: PipelineSpec) -> tuple[TeacherSpec, ...]:
    """Return the teachers that run: all of them if a KV loss is active, else those that another term needs.

    Another term: distilled logits or hidden states, or the cross-entropy of a teacher that is the
    student itself.
    """
    if active_losses(spec):
        return spec.teachers
    needed = {*teachers_to_logits(spec), *hidden_teachers(spec), hidden_state_teacher(spec)}
    return tuple(
        teacher
        for teacher in spec.teachers
        if teacher.name in needed or (teacher.itself is not None and teacher.itself.cross_entropy > 0)
    )


def logit_teachers(spec: PipelineSpec) -> tuple[str, ...]:
    """Return the names of the teachers whose logits are distilled."""
    return _teachers_of_term(spec, spec.logits)


def cross_logit_teachers(spec: PipelineSpec) -> tuple[str, ...]:
    """Return the names of the teachers whose logits are distilled across tokenizers."""
    return _teachers_of_term(spec, spec.cross_logits)


def teachers_to_logits(spec: PipelineSpec) -> tuple[str, ...]:
    """Return the names of the teachers whose language-model head runs for some term, each once."""
    return tuple(dict.fromkeys((*logit_teachers(spec), *cross_logit_teachers(spec))))


def hidden_teachers(spec: PipelineSpec) -> tuple[str, ...]:
    """Return the names of the teachers whose hidden states are aligned and distilled."""
    return _teachers_of_term(spec, spec.hidden)


def _teachers_of_term(spec: PipelineSpec, term: LogitsSpec | TeachersTerm | None) -> tuple[str, ...]:
    if term is None or term.weight == 0:
        return ()
    return term.teachers or tuple(teacher.name for teacher in spec.teachers)


def hidden_state_teacher(spec: PipelineSpec) -> str | None:
    """Return the name of the teacher whose states before the answer are distilled (CODI); None if none is."""
    if spec.codi is None or spec.codi.weight == 0:
        return None
    return spec.codi.teacher or spec.teachers[0].name


def shared_weights_key(teacher: TeacherSpec) -> str:
    """Return a text that is equal for teachers with the same weights, and only for them."""
    return teacher.model_dump_json(exclude={"name", "align", "template", "rationale", "last_step", "itself"})
