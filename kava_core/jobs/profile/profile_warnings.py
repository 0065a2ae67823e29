"""Find what looks wrong in a profile, in one line each."""

from __future__ import annotations

from collections.abc import Iterator

from kava_core.jobs.profile.layer_comparison import Entropy
from kava_core.jobs.profile.profiled_stages import CAPTURED, STEP, STUDENT, Cost, Stage
from kava_core.jobs.profile.variant_profile import Profile

MOST_OF_STEP = 0.5
"""A stage, other than a model's forward pass, should take no more of the forward pass of a step."""

NARROW, WIDE = 0.02, 0.98
"""Attention whose entropy is a smaller share of the log of its keys looks at one; larger, at all alike."""

COVERED = 0.5
"""Share of the student's positions that should have a target."""


def profile_warnings(profile: Profile) -> list[str]:
    """Return a line for everything that looks wrong; none if all is well."""
    return [
        *_non_finite_values(profile.stages),
        *_dead_channels(profile.stages),
        *_slow_stages(profile.costs),
        *_extreme_attention(profile),
        *_missing_targets(profile),
    ]


def _describe_model(teacher: str | None) -> str:
    return "the student" if teacher is None else f"teacher {teacher!r}"


def _non_finite_values(stages: list[Stage]) -> Iterator[str]:
    """Name the first stage of every teacher and part that has NaN or infinity."""
    named = set()
    for stage in stages:
        if stage.bad_layers and (stage.teacher, stage.part) not in named:
            named.add((stage.teacher, stage.part))
            layers = ", ".join(map(str, stage.bad_layers))
            yield (
                f"{_describe_model(stage.teacher)}, stage {stage.stage}: {stage.part} of layer {layers} hold "
                f"NaN or infinity ({stage.numbers.bad:.1%} of all values)"
            )


def _dead_channels(stages: list[Stage]) -> Iterator[str]:
    """Name the first stage of every teacher and part that has channels without change."""
    named = set()
    for stage in stages:
        if stage.numbers.dead > 0 and (stage.teacher, stage.part) not in named:
            named.add((stage.teacher, stage.part))
            yield (
                f"{_describe_model(stage.teacher)}, stage {stage.stage}: {stage.numbers.dead:.1%} of the "
                f"channels of {stage.part} do not change over positions"
            )


def _slow_stages(costs: list[Cost]) -> Iterator[str]:
    step = next(cost.milliseconds for cost in costs if cost.stage == STEP)
    for cost in costs:
        if cost.stage not in (CAPTURED, STUDENT, STEP) and cost.milliseconds > MOST_OF_STEP * step:
            yield (
                f"{_describe_model(cost.teacher)}, stage {cost.stage}: takes {cost.milliseconds:.1f} ms, "
                f"{cost.milliseconds / step:.0%} of a step's forward pass"
            )


def _extreme_attention(profile: Profile) -> Iterator[str]:
    """Name layers that look at one position, or at all alike.

    A student with random weights looks at everything alike, so its queries are not judged.
    """
    for name, teacher in profile.teachers.items():
        model = _describe_model(name)
        yield from _extreme_layers(teacher.before, teacher.sources, model)
        if profile.trained and teacher.after is not None:
            yield from _extreme_layers(teacher.after, profile.layers, f"{model} aligned")
    if profile.trained:
        yield from _extreme_layers(profile.student, profile.layers, _describe_model(None))


def _extreme_layers(entropy: Entropy, layers: tuple[int, ...], model: str) -> Iterator[str]:
    for layer, share in zip(layers, entropy.share, strict=True):
        if share < NARROW or share > WIDE:
            looks = "looks at one position" if share < NARROW else "looks at all positions alike"
            yield f"{model}: attention of layer {layer} {looks} (entropy {share:.3f} of log n)"


def _missing_targets(profile: Profile) -> Iterator[str]:
    for name, teacher in profile.teachers.items():
        if teacher.covered < COVERED:
            model = _describe_model(name)
            yield f"{model}: only {teacher.covered:.0%} of the student's positions have a target"
