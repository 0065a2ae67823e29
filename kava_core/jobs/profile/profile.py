"""Everything that is found out about one variant."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kava_core.errors import SpecError
from kava_core.jobs.profile.gate import Gate, gates
from kava_core.jobs.profile.layers import Entropy, TeacherLayers, own_entropy, teacher_layers
from kava_core.jobs.profile.prepared import Subject, make_subject
from kava_core.jobs.profile.stages import Cost, Stage, costs, stages
from kava_core.json_files import finite_or_null
from kava_core.registry import Registry
from kava_core.specfile.sections.compare import CompareSpec, control_changes
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class Profile:
    """Of one variant."""

    stages: list[Stage]
    costs: list[Cost]
    """On the first batch. The stages of keys, values and queries that are aligned together are one."""
    student: Entropy
    teachers: dict[str, TeacherLayers]
    layers: tuple[int, ...]
    """Numbers of the compared student layers."""
    trained: bool
    """Whether the student's weights were trained before: a folder's, or a pretraining's."""
    gates: dict[str, Gate | None] | None
    """None where it was not asked for."""
    notes: tuple[str, ...]

    def json(self, wrong: list[str]) -> dict[str, Any]:
        """Plain values; null for what is not a number."""
        found = asdict(self) | {"wrong": wrong}
        for name, gate in (self.gates or {}).items():
            if gate is not None:
                found["gates"][name]["open"] = gate.open
        return finite_or_null(found)


@dataclass(frozen=True)
class Wanted:
    """How much is looked at."""

    batches: int
    """Validation batches of the size that training has."""
    gate_examples: int | None
    """None: no gate."""


def profile(spec: PipelineSpec, registry: Registry, maps: Path, wanted: Wanted) -> Profile:
    """Load, calibrate and measure a variant that compares a teacher's cache; layer maps go into ``maps``."""
    trained = spec.student.path is not None or spec.student.pretrain is not None
    subject = make_subject(spec, maps)
    with torch.no_grad():
        return measured(subject, registry, wanted, trained)


def measured(subject: Subject, registry: Registry, wanted: Wanted, trained: bool) -> Profile:
    """Of a variant that is ready; ``trained`` as in ``Profile``. Call it without gradients."""
    size = subject.spec.train.batch_size
    batches = list(subject.batches(wanted.batches * size, size))
    return Profile(
        stages(subject, batches),
        costs(subject, batches[0]),
        own_entropy(subject, batches),
        {t.name: teacher_layers(subject, place, batches) for place, t in enumerate(subject.teachers)},
        subject.pipeline.layers,
        trained,
        None if wanted.gate_examples is None else _gates(subject, registry, wanted.gate_examples),
        tuple(_notes(subject, trained)),
    )


def _gates(subject: Subject, registry: Registry, examples: int) -> dict[str, Gate | None]:
    if len(subject.data.validation_items) < 2:
        raise SpecError(
            "kava profile --gate: needs at least 2 validation examples, to exchange their teachers"
        )
    return gates(subject, subject.aligners(with_random_alignment(subject.spec, registry)), examples)


def with_random_alignment(spec: PipelineSpec, registry: Registry) -> PipelineSpec:
    """The spec with the control ``random_alignment``: its width projectors for every teacher."""
    changes = control_changes("random_alignment", CompareSpec(), 1)
    (drawn,) = changes.values()
    projector = registry.get("dim_projector", drawn["name"]).model_validate(drawn)
    teachers = tuple(
        t.model_copy(update={"align": t.align.model_copy(update={"dim_projector": projector})})
        for t in spec.teachers
    )
    return spec.model_copy(update={"teachers": teachers})


def _notes(subject: Subject, trained: bool) -> list[str]:
    spec = subject.spec
    found = (
        []
        if trained
        else ["the student has random weights: its attention, the cosines and the gate say little"]
    )
    if subject.apart:
        parts = ", ".join(subject.pipeline.parts)
        found.append(
            f"the losses compare {parts} alone: cosines, entropy and gate have aligners of their own"
        )
    blind = [
        a.name
        for a in subject.whole
        if not (a.wants_calibration and getattr(a.dim_projector, "paired", True))
    ]
    if blind:
        found.append(
            f"the projector of {', '.join(blind)} was not fitted to the student: cosines and gate are "
            "those of chance, whatever it is worth"
        )
    if subject.pipeline.trains_aligners:
        found.append("aligners that are trained are seen as they begin")
    if all(config.basis_free for config in subject.pipeline.configs):
        found.append("the losses do not look at the basis: cosines and gate need not rise in training")
    if spec.train.shuffle_teacher:
        found.append("train.shuffle_teacher is not looked at: teachers are the examples' own")
    return found
