"""Pictures of all variants side by side: entropy and cosine by layer, time by stage."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kava_core.jobs.profile.profile import Profile
from kava_core.jobs.profile.stages import CAPTURED, PLAN, STEP, STUDENT

LINES = ("-", "--", ":", "-.")
"""One for every teacher."""


def draw(profiles: Mapping[str, Profile], path: Path, *, title: str) -> bool:
    """A colour a variant, a kind of line a teacher. False where matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(19, 4.4), layout="constrained")
    raw, entropy, keys, values, times = figure.subplots(1, 5)
    for colour, (variant, found) in enumerate(profiles.items()):
        _raw(raw, found, f"C{colour}")
        _entropies(entropy, found, f"C{colour}", variant)
        _cosines(keys, found, "keys", f"C{colour}")
        _cosines(values, found, "values", f"C{colour}")
    entropy.set(title="entropy of attention\nthick: aligned; thin: student", xlabel="student layer")
    entropy.set_ylim(-0.03, 1.03)
    for axis, part in ((keys, "keys"), (values, "values")):
        axis.set(title=f"cosine of {part}, aligned and student", xlabel="student layer")
        axis.axhline(0, color="grey", linewidth=0.5)
        axis.set_ylim(min(axis.get_ylim()[0], -0.2), 1.03)
    _times(times, profiles)
    figure.legend(*entropy.get_legend_handles_labels(), loc="outside lower center", ncols=6)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return True


def _raw(axis: Any, found: Profile, colour: str) -> None:
    for line, one in zip(_lines(found), found.teachers.values(), strict=True):
        axis.plot(one.sources, one.before.share, line, color=colour, marker="o")
    axis.set(
        title="entropy of attention\nteachers before alignment", xlabel="teacher layer", ylim=(-0.03, 1.03)
    )
    axis.set_ylabel("share of log n")
    axis.xaxis.get_major_locator().set_params(integer=True)


def _entropies(axis: Any, found: Profile, colour: str, variant: str) -> None:
    names = list(map(str, found.layers))
    axis.plot(names, found.student.share, color=colour, linewidth=0.8, marker=".", label=variant)
    for line, one in zip(_lines(found), found.teachers.values(), strict=True):
        if one.after is not None:
            axis.plot(names, one.after.share, line, color=colour, linewidth=2, marker="o")


def _cosines(axis: Any, found: Profile, part: Any, colour: str) -> None:
    for line, one in zip(_lines(found), found.teachers.values(), strict=True):
        values = one.cosines.get(part, ())
        names = list(map(str, found.layers)) if len(values) == len(found.layers) else ["all"] * len(values)
        axis.plot(names, values, line, color=colour, marker="o")


def _lines(found: Profile) -> list[str]:
    return [LINES[place % len(LINES)] for place in range(len(found.teachers))]


def _times(axis: Any, profiles: Mapping[str, Profile]) -> None:
    """Bars of every stage, all teachers together, one below the other."""
    stages = list(dict.fromkeys(cost.stage for one in profiles.values() for cost in one.costs))
    order = [STEP, STUDENT, CAPTURED, *(s for s in stages if s not in (STEP, STUDENT, CAPTURED, PLAN)), PLAN]
    height = 0.8 / len(profiles)
    for place, found in enumerate(profiles.values()):
        sums = [sum(c.milliseconds for c in found.costs if c.stage == stage) for stage in order]
        axis.barh([row + place * height for row in range(len(order))], sums, height, color=f"C{place}")
    axis.set_yticks([row + 0.4 - height / 2 for row in range(len(order))], order)
    axis.set(title="milliseconds, all teachers, forward", xscale="log")
    axis.invert_yaxis()
