"""What looks wrong in a profile, in one line each."""

from __future__ import annotations

from collections.abc import Iterator

from kava_core.jobs.profile.layers import Entropy
from kava_core.jobs.profile.profile import Profile
from kava_core.jobs.profile.stages import CAPTURED, STEP, STUDENT, Cost, Stage

MOST_OF_STEP = 0.5
"""A stage, other than a model's forward pass, that takes more of the forward pass of a step."""

NARROW, WIDE = 0.02, 0.98
"""Attention whose entropy is a smaller share of the log of its keys looks at one; larger, at all alike."""

COVERED = 0.5
"""Share of the student's positions that should have a target."""


def signs(found: Profile) -> list[str]:
    """Everything; none where all is well."""
    return [*_bad(found.stages), *_dead(found.stages), *_slow(found.costs), *_attention(found), *_few(found)]


def _who(teacher: str | None) -> str:
    return "the student" if teacher is None else f"teacher {teacher!r}"


def _bad(stages: list[Stage]) -> Iterator[str]:
    """The first stage of every teacher and part that has NaN or infinity."""
    named = set()
    for one in stages:
        if one.bad_layers and (one.teacher, one.part) not in named:
            named.add((one.teacher, one.part))
            layers = ", ".join(map(str, one.bad_layers))
            yield (
                f"{_who(one.teacher)}, stage {one.stage}: {one.part} of layer {layers} hold NaN or infinity "
                f"({one.numbers.bad:.1%} of all values)"
            )


def _dead(stages: list[Stage]) -> Iterator[str]:
    named = set()
    for one in stages:
        if one.numbers.dead > 0 and (one.teacher, one.part) not in named:
            named.add((one.teacher, one.part))
            yield (
                f"{_who(one.teacher)}, stage {one.stage}: {one.numbers.dead:.1%} of the channels of "
                f"{one.part} do not change over positions"
            )


def _slow(costs: list[Cost]) -> Iterator[str]:
    step = next(cost.milliseconds for cost in costs if cost.stage == STEP)
    for one in costs:
        if one.stage not in (CAPTURED, STUDENT, STEP) and one.milliseconds > MOST_OF_STEP * step:
            yield (
                f"{_who(one.teacher)}, stage {one.stage}: takes {one.milliseconds:.1f} ms, "
                f"{one.milliseconds / step:.0%} of a step's forward pass"
            )


def _attention(found: Profile) -> Iterator[str]:
    """A student with random weights looks at everything alike; its queries are not judged."""
    for name, teacher in found.teachers.items():
        yield from _extreme(teacher.before, teacher.sources, _who(name))
        if found.trained and teacher.after is not None:
            yield from _extreme(teacher.after, found.layers, f"{_who(name)} aligned")
    if found.trained:
        yield from _extreme(found.student, found.layers, _who(None))


def _extreme(entropy: Entropy, layers: tuple[int, ...], who: str) -> Iterator[str]:
    for layer, share in zip(layers, entropy.share, strict=True):
        if share < NARROW or share > WIDE:
            looks = "looks at one position" if share < NARROW else "looks at all positions alike"
            yield f"{who}: attention of layer {layer} {looks} (entropy {share:.3f} of log n)"


def _few(found: Profile) -> Iterator[str]:
    for name, teacher in found.teachers.items():
        if teacher.covered < COVERED:
            yield f"{_who(name)}: only {teacher.covered:.0%} of the student's positions have a target"
