"""Build one teacher's alignment from its section of the spec."""

from __future__ import annotations

from kava_core.config import ComponentConfig, Part
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.boundaries import build_component, views_of
from kava_core.kv.align.components import AlignmentComponents, errors_of_component
from kava_core.kv.align.eviction import assert_evicts
from kava_core.kv.align.layer_map import LayerMap
from kava_core.kv.align.time_plan import TimePlan, WarperField
from kava_core.protocols.axes import Geometry
from kava_core.specfile.sections.align import AlignSpec


def build_aligner(
    align: AlignSpec,
    *,
    name: str,
    teacher: Geometry,
    student: Geometry,
    layers: tuple[int, ...],
    parts: tuple[Part, ...],
) -> TeacherAligner:
    """Build the components of one teacher's alignment; each meets the extents that those before leave.

    Args:
        align: the teacher's section of the spec.
        name: the teacher's name, for error notes.
        teacher: the teacher's geometry.
        student: the student's geometry.
        layers: student layers that some loss compares, counted from 0.
        parts: what some loss compares.

    Raises:
        SpecError, PluginError: a component refuses what it meets, or returns what its contract forbids.
    """
    with errors_of_component("layer_mapper", align.layer_mapper, teacher=name):
        layer_map = LayerMap(
            build_component(align.layer_mapper, teacher=teacher, student=student),
            teacher=teacher,
            student=student,
            layers=layers,
            combine=align.layers,
        )
    # From here on a component meets the compared layers alone, and no queries if none are compared.
    extents = {"layer": len(layers)} | ({} if "queries" in parts else {"qhead": 0})
    teacher, student = teacher.with_(**extents), student.with_(**extents)
    time_plan = build_time_plan(align, name=name, teacher=teacher, student=student)
    if "queries" not in parts:  # an evictor reads them all the same
        teacher, student = teacher.without_queries(), student.without_queries()
    if time_plan.evictor is not None:
        assert_evicts(layer_map, parts, warper=align.time_warper.name)
    lifts_student = align.direction == "to_teacher"
    joined_teacher = teacher.with_(dim=teacher.dim * layer_map.joined)
    moved, fixed = (student, joined_teacher) if lifts_student else (joined_teacher, student)
    with errors_of_component("head_adapter", align.head_adapter, teacher=name):
        head_adapter = build_component(align.head_adapter, teacher=moved, student=fixed)
        teacher_view, student_view = views_of(head_adapter)
    with errors_of_component("dim_projector", align.dim_projector, teacher=name):
        dim_projector = build_component(align.dim_projector, teacher=teacher_view, student=student_view)
    kinds = ("layer_mapper", "time_warper", "head_adapter", "dim_projector")
    components = AlignmentComponents(
        teacher=name,
        layer_map=layer_map,
        time_plan=time_plan,
        head_adapter=head_adapter,
        dim_projector=dim_projector,
        teacher_view=teacher_view,
        student_view=student_view,
        configs={kind: getattr(align, kind) for kind in kinds},
    )
    return TeacherAligner(components, teacher=teacher, student=student, lifts_student=lifts_student)


def build_time_plan(align: AlignSpec, *, name: str, teacher: Geometry, student: Geometry) -> TimePlan:
    """Build one teacher's time warpers; raises what ``TimePlan`` raises."""
    warpers: dict[WarperField, ComponentConfig | None] = {
        "token_warper": align.token_warper,
        "time_warper": align.time_warper,
    }
    return TimePlan(
        warpers,
        name=name,
        teacher=teacher,
        student=student,
        sinks=align.sinks,
    )
