"""Build what aligns and compares hidden states, from geometries alone."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from kava_core.build.aligner import build_aligner
from kava_core.config import Part
from kava_core.distill.aligned_states import AlignedStates
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.capture.attention_layers import layer_outputs
from kava_core.kv.capture.geometry import model_geometry
from kava_core.protocols.axes import Geometry, meta_cache
from kava_core.protocols.time_map import TimeMap
from kava_core.specfile.questions import chosen_layers, hidden_teachers
from kava_core.specfile.sections.pipeline import PipelineSpec

PARTS: tuple[Part, ...] = ("values",)
"""The part of a cache that hidden states stand for."""


def state_geometry(model: Geometry) -> Geometry:
    """Return the extents of a model's hidden states as a cache: one head, as wide as the model."""
    return Geometry(layer=model.layer, head=1, dim=model.hidden, qhead=0, hidden=model.hidden)


def make_aligned_states(
    spec: PipelineSpec, models: Mapping[str, nn.Module], student: nn.Module, *, seed: int
) -> AlignedStates | None:
    """Build a run's term of hidden states; None if it has none.

    Args:
        spec: the run's.
        models: the teachers', by name.
        student: the student.
        seed: decides random weights.

    Raises:
        SpecError: the components of an alignment do not fit, or leave states of different widths.
    """
    names = hidden_teachers(spec)
    if not names:
        return None
    return build_aligned_states(
        spec,
        {name: model_geometry(models[name]) for name in names},
        model_geometry(student),
        seed=seed,
        outputs={name: layer_outputs(models[name]) for name in names},
        student_outputs=layer_outputs(student),
    )


def build_aligned_states(
    spec: PipelineSpec,
    teachers: Mapping[str, Geometry],
    student: Geometry,
    *,
    seed: int,
    outputs: Mapping[str, Sequence[int]],
    student_outputs: Sequence[int],
) -> AlignedStates:
    """Build the term of hidden states; the global generator is left as it was.

    Args:
        spec: the run's; it has a section ``hidden``.
        teachers: geometry of every teacher that takes part, by name.
        student: the student's geometry.
        seed: decides random weights.
        outputs: places of every teacher's layer outputs among its hidden states.
        student_outputs: likewise of the student's.

    Raises:
        SpecError: the components of an alignment do not fit, or leave states of different widths.
    """
    assert spec.hidden is not None
    layers = tuple(chosen_layers(spec.hidden.layers, student.layer, where="hidden"))
    aligners = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for teacher in spec.teachers:
            if teacher.name in teachers:
                aligners.append(
                    build_aligner(
                        teacher.align,
                        name=teacher.name,
                        teacher=state_geometry(teachers[teacher.name]),
                        student=state_geometry(student),
                        layers=layers,
                        parts=PARTS,
                    )
                )
    for aligner in aligners:
        _assert_equal_widths(aligner)
    places = {a.name: [outputs[a.name][source] for source in a.sources] for a in aligners}
    states = AlignedStates(
        spec.hidden,
        aligners,
        student_places=[student_outputs[layer] for layer in layers],
        teacher_places=places,
    )
    freeze_unread(states)
    return states


def _assert_equal_widths(aligner: TeacherAligner) -> None:
    """Raise SpecError if a teacher's aligned states and the student's have different extents."""
    target, view = aligner.target, aligner.view
    if (target.layer, target.head, target.dim) != (view.layer, view.head, view.dim):
        raise SpecError(
            f"hidden: teacher {aligner.name!r}: states are compared at {target.layer} layers of width "
            f"{target.dim}, the student's at {view.layer} of {view.dim}; use dim_projector calibrated, "
            "linear or elastic"
        )


def freeze_unread(states: AlignedStates) -> None:
    """Freeze every weight that no distance of hidden states reaches, such as a projector's for keys.

    Distributed training waits for gradients that never come.

    Args:
        states: changed in place.
    """
    if not any(weight.requires_grad for weight in states.parameters()):
        return
    probe = copy.deepcopy(states).to("meta")
    time_map = TimeMap.same(torch.ones(1, 2, dtype=torch.bool, device="meta"))
    distances = []
    for aligner in probe.teachers:
        own = meta_cache(aligner.student, PARTS, batch=1, layer=aligner.student.layer, time=2)
        theirs = meta_cache(aligner.teacher, PARTS, batch=1, layer=len(aligner.sources), time=2)
        distances.append(probe.distance(aligner, own, theirs, time_map))
    torch.stack(distances).sum().backward()
    read = {name for name, weight in probe.named_parameters() if weight.grad is not None}
    for name, weight in states.named_parameters():
        weight.requires_grad_(weight.requires_grad and name in read)
