"""Find out everything that ``kava profile`` reports about one variant."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kava_core.errors import SpecError
from kava_core.files import finite_or_null
from kava_core.jobs.profile.layer_comparison import (
    Entropy,
    TeacherLayers,
    compare_teacher_layers,
    student_entropy,
)
from kava_core.jobs.profile.prepared_variant import PreparedVariant, prepare_variant
from kava_core.jobs.profile.profiled_stages import Cost, Stage, profile_costs, profile_stages
from kava_core.jobs.profile.quality_gate import Gate, judge_teachers
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.registry import Registry
from kava_core.specfile.sections.compare import CompareSpec, control_changes
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class Profile:
    """What was found out about one variant."""

    stages: list[Stage]
    costs: list[Cost]
    """Costs on the first batch. The stages of keys, values and queries that are aligned together are one."""
    student: Entropy
    teachers: dict[str, TeacherLayers]
    layers: tuple[int, ...]
    """Numbers of the compared student layers."""
    trained: bool
    """Whether the student's weights were trained before: a folder's, or a pretraining's."""
    gates: dict[str, Gate | None] | None
    """None if no gate was asked for."""
    notes: tuple[str, ...]

    def json(self, warnings: list[str]) -> dict[str, Any]:
        """Return everything as plain values, with null for what is not a number."""
        fields = asdict(self) | {"wrong": warnings}
        for name, gate in (self.gates or {}).items():
            if gate is not None:
                fields["gates"][name]["open"] = gate.open
        return finite_or_null(fields)


@dataclass(frozen=True)
class ProfileOptions:
    """How much is looked at."""

    batches: int
    """Validation batches of the size that training has."""
    gate_examples: int | None
    """Validation examples of the gate; None: no gate."""


def load_and_profile(spec: PipelineSpec, registry: Registry, maps: Path, options: ProfileOptions) -> Profile:
    """Load, calibrate and measure a variant that compares a teacher's cache; layer maps go into ``maps``."""
    trained = spec.student.path is not None or spec.student.pretrain is not None
    variant = prepare_variant(spec, maps)
    with torch.no_grad():
        return profile_variant(variant, registry, options, trained)


def profile_variant(
    variant: PreparedVariant, registry: Registry, options: ProfileOptions, trained: bool
) -> Profile:
    """Measure a variant that is ready. Call it without gradients.

    Args:
        variant: the models as they are before the first step.
        registry: the installed components, for the gate's control.
        options: how much is looked at.
        trained: whether the student's weights were trained before.
    """
    size = variant.spec.train.batch_size
    batches = list(variant.validation_batches(options.batches * size, size))
    stages = profile_stages(variant, batches)
    costs = profile_costs(variant, batches[0])
    student = student_entropy(variant, batches)
    teachers = {}
    for index, teacher in enumerate(variant.teachers):
        teachers[teacher.name] = compare_teacher_layers(variant, index, batches)
    gates = None
    if options.gate_examples is not None:
        gates = _judge_gates(variant, registry, options.gate_examples)
    notes = tuple(_reading_notes(variant, trained))
    return Profile(stages, costs, student, teachers, variant.pipeline.layers, trained, gates, notes)


def _judge_gates(variant: PreparedVariant, registry: Registry, examples: int) -> dict[str, Gate | None]:
    if len(variant.data.validation_items) < 2:
        raise SpecError(
            "kava profile --gate: needs at least 2 validation examples, to exchange their teachers"
        )
    random_aligners = variant.make_aligners(with_random_alignment(variant.spec, registry))
    return judge_teachers(variant, random_aligners, examples)


def with_random_alignment(spec: PipelineSpec, registry: Registry) -> PipelineSpec:
    """Give every teacher of a spec the width projector of the control ``random_alignment``."""
    changes = control_changes("random_alignment", CompareSpec(), 1)
    (fields,) = changes.values()
    projector = registry.get("dim_projector", fields["name"]).model_validate(fields)
    teachers = []
    for teacher in spec.teachers:
        align = teacher.align.model_copy(update={"dim_projector": projector})
        teachers.append(teacher.model_copy(update={"align": align}))
    return spec.model_copy(update={"teachers": tuple(teachers)})


def _reading_notes(variant: PreparedVariant, trained: bool) -> list[str]:
    """Return what a reader of the profile has to know, one line each."""
    notes = []
    if not trained:
        notes.append("the student has random weights: its attention, the cosines and the gate say little")
    if variant.has_own_aligners:
        parts = ", ".join(variant.pipeline.parts)
        notes.append(
            f"the losses compare {parts} alone: cosines, entropy and gate have aligners of their own"
        )
    unfitted = [aligner.name for aligner in variant.key_value_aligners if not _is_fitted_to_student(aligner)]
    if unfitted:
        notes.append(
            f"the projector of {', '.join(unfitted)} was not fitted to the student: cosines and gate are "
            "those of chance, whatever it is worth"
        )
    if variant.pipeline.trains_aligners:
        notes.append("aligners that are trained are seen as they begin")
    if all(config.basis_free for config in variant.pipeline.configs):
        notes.append("the losses do not look at the basis: cosines and gate need not rise in training")
    if variant.spec.train.shuffle_teacher:
        notes.append("train.shuffle_teacher is not looked at: teachers are the examples' own")
    return notes


def _is_fitted_to_student(aligner: TeacherAligner) -> bool:
    return aligner.wants_calibration and bool(getattr(aligner.dim_projector, "paired", True))
