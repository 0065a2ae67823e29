"""Draw all variants side by side: entropy and cosine by layer, time by stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kava_core.config import Part
from kava_core.jobs.profile.layer_comparison import TeacherLayers
from kava_core.jobs.profile.profiled_stages import CAPTURED, PLAN, STEP, STUDENT
from kava_core.jobs.profile.variant_profile import Profile

LINE_STYLES = ("-", "--", ":", "-.")
"""One for every teacher."""


def draw_profiles(profiles: Mapping[str, Profile], path: Path, *, title: str) -> bool:
    """Draw a colour for each variant and a line style for each teacher.

    Returns:
        False if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(19, 4.4), layout="constrained")
    teacher_axis, student_axis, keys_axis, values_axis, time_axis = figure.subplots(1, 5)
    for index, (variant, profile) in enumerate(profiles.items()):
        colour = f"C{index}"
        _draw_teacher_entropy(teacher_axis, profile, colour)
        _draw_student_entropy(student_axis, profile, colour, variant)
        _draw_cosines(keys_axis, profile, "keys", colour)
        _draw_cosines(values_axis, profile, "values", colour)
    student_axis.set(title="entropy of attention\nthick: aligned; thin: student", xlabel="student layer")
    student_axis.set_ylim(-0.03, 1.03)
    for axis, part in ((keys_axis, "keys"), (values_axis, "values")):
        axis.set(title=f"cosine of {part}, aligned and student", xlabel="student layer")
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_ylim(min(axis.get_ylim()[0], -0.2), 1.03)
    _draw_times(time_axis, profiles)
    figure.legend(*student_axis.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _styled_teachers(profile: Profile) -> Iterator[tuple[str, TeacherLayers]]:
    """Yield every teacher with its line style."""
    for index, teacher in enumerate(profile.teachers.values()):
        yield LINE_STYLES[index % len(LINE_STYLES)], teacher


def _draw_teacher_entropy(axis: Any, profile: Profile, colour: str) -> None:
    for style, teacher in _styled_teachers(profile):
        axis.plot(teacher.sources, teacher.before.share, style, color=colour, marker="o")
    axis.set(
        title="entropy of attention\nteachers before alignment", xlabel="teacher layer", ylim=(-0.03, 1.03)
    )
    axis.set_ylabel("share of log n")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _draw_student_entropy(axis: Any, profile: Profile, colour: str, variant: str) -> None:
    layers = list(map(str, profile.layers))
    axis.plot(layers, profile.student.share, color=colour, linewidth=0.8, marker=".", label=variant)
    for style, teacher in _styled_teachers(profile):
        if teacher.after is not None:
            axis.plot(layers, teacher.after.share, style, color=colour, linewidth=2, marker="o")


def _draw_cosines(axis: Any, profile: Profile, part: Part, colour: str) -> None:
    for style, teacher in _styled_teachers(profile):
        values = teacher.cosines.get(part, ())
        merged = len(values) != len(profile.layers)
        layers = ["all"] * len(values) if merged else list(map(str, profile.layers))
        axis.plot(layers, values, style, color=colour, marker="o")


def _draw_times(axis: Any, profiles: Mapping[str, Profile]) -> None:
    """Draw bars of every stage, all teachers together, one below the other."""
    stages = _ordered_stages(profiles)
    height = 0.8 / len(profiles)
    for index, profile in enumerate(profiles.values()):
        milliseconds = dict.fromkeys(stages, 0.0)
        for cost in profile.costs:
            milliseconds[cost.stage] += cost.milliseconds
        rows = [row + index * height for row in range(len(stages))]
        axis.barh(rows, list(milliseconds.values()), height, color=f"C{index}")
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(stages))], stages)
    axis.set(title="milliseconds, all teachers, forward", xscale="log")
    axis.invert_yaxis()


def _ordered_stages(profiles: Mapping[str, Profile]) -> list[str]:
    """Return the stages of all variants: forward passes, then alignment in order, then the time map."""
    alignment: list[str] = []
    for profile in profiles.values():
        for cost in profile.costs:
            if cost.stage not in (STEP, STUDENT, CAPTURED, PLAN, *alignment):
                alignment.append(cost.stage)
    return [STEP, STUDENT, CAPTURED, *alignment, PLAN]
