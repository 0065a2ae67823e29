"""Describe what an experiment asks: which variants are compared, by which number, at which cost."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from kava_core.config import Strict

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=80)]
"""A name that is also a folder: letters, digits, ``_ . -``, not starting with a dot."""

Control = Literal[
    "no_kv",
    "shuffled_teacher",
    "untrained_teacher",
    "shuffled_weights",
    "token_identity",
    "random_alignment",
    "frozen_probe",
]
Budget = Literal["student_tokens", "teacher_tokens", "flops"]

STEPS_TO_TARGET, FLOPS_TO_TARGET = "steps_to_target", "flops_to_target"
TARGET_METRICS = (STEPS_TO_TARGET, FLOPS_TO_TARGET)
"""The metrics that are read off a run's curve instead of its last evaluation."""

DIRECTIONS = {
    "exact_match": "higher",
    "ce": "lower",
    "perplexity": "lower",
    STEPS_TO_TARGET: "lower",
    FLOPS_TO_TARGET: "lower",
}
"""Which way each known metric is better."""


STAND_INS: dict[Control, str] = {
    "untrained_teacher": "random_weights",
    "shuffled_weights": "shuffled_weights",
    "token_identity": "token_identity",
}
"""The controls that put something in every teacher's place, and what (``TeacherSpec.stand_in.kind``)."""


def control_changes(control: Control, compare: CompareSpec, teachers: int) -> dict[str, Any]:
    """Return what a control changes of its treatment: dotted paths to new values, as in ``variants``."""
    if control == "no_kv":
        if compare.no_kv_steps is None:
            return {"losses": []}
        return {"losses": [], "train.steps": compare.no_kv_steps}
    if control == "shuffled_teacher":
        return {"train.shuffle_teacher": True}
    if control == "frozen_probe":
        return {"student.frozen": True}
    if control in STAND_INS:
        stand_in = {"kind": STAND_INS[control]}
        return {f"teachers.{index}.stand_in": dict(stand_in) for index in range(teachers)}
    random_projector = {"name": "linear", "trainable": False, "init": "random"}
    return {f"teachers.{index}.align.dim_projector": random_projector for index in range(teachers)}


class CompareSpec(Strict):
    """The comparisons of an experiment, declared before it runs.

    All of them are one family for Holm's correction. ``kava experiment`` runs and judges them; ``kava train``
    ignores this block. Example: ``{treatment: kv, controls: [no_kv, shuffled_teacher, untrained_teacher,
    token_identity]}``: the four that "KV distillation helps" has to beat.
    """

    metric: str = "exact_match"
    """The number that is compared. Either a number of the last evaluation, as ``run.json`` has it
    (``exact_match``, ``ce``, ``perplexity`` …); or ``steps_to_target``, the first evaluated step at which
    ``of`` reaches ``target``; or ``flops_to_target``, the operations until then, those of making a store
    included."""
    of: Literal["exact_match", "ce", "perplexity"] = "exact_match"
    """With ``steps_to_target`` and ``flops_to_target``: the metric that has to reach the target."""
    target: float | None = None
    """With ``steps_to_target`` and ``flops_to_target``: the value that ``of`` has to reach, such as 0.9 for
    an exact match of 90 %. A run that does not reach it, within the steps (or operations) that both compared
    variants have, counts one evaluation interval more; means are lower bounds then."""
    goal: Literal["higher", "lower"] | None = None
    """Whether a higher or a lower number is better. Known for ``exact_match``, ``ce``, ``perplexity``,
    ``steps_to_target`` and ``flops_to_target``; any other metric needs it."""
    treatment: Name | None = None
    """Name of the variant that controls are made of and compared with; default: the first variant."""
    controls: tuple[Control, ...] = ()
    """More variants, each the treatment with one thing broken, and a comparison of the treatment with each.
    ``no_kv``: no KV losses; ``shuffled_teacher``: every example meets another example's cache;
    ``untrained_teacher``: teachers with random weights of the trained ones' scale; ``shuffled_weights``:
    the same with the trained numbers permuted; ``token_identity``: a fixed random vector for each token in
    place of its keys and values; ``random_alignment``: random matrices in place of the width projectors;
    ``frozen_probe``: the student's weights are fixed, so only the aligner learns."""
    no_kv_steps: Annotated[int, Field(gt=0)] | None = None
    """Optimizer steps of the control ``no_kv``, if it is to spend on longer training the operations that
    teachers cost (``kava experiment`` prints how many steps that are); null: as many as the treatment."""
    pairs: tuple[tuple[Name, Name], ...] = ()
    """Further comparisons of two variants, first minus second. Example: ``[[deep, shallow]]``."""
    unequal: tuple[Budget, ...] = ()
    """Budgets in which compared variants may differ on purpose. If they differ in any other, none is called
    better."""
    tolerance: float = Field(0.01, ge=0)
    """Two budgets count as equal if they differ by at most this share; 0.01 is 1 %."""

    @model_validator(mode="after")
    def _asks_something(self) -> CompareSpec:
        if (self.metric in TARGET_METRICS) != (self.target is not None):
            raise ValueError(
                f"'target' goes with 'metric: {STEPS_TO_TARGET}' or '{FLOPS_TO_TARGET}', and only with them"
            )
        if self.metric not in DIRECTIONS and self.goal is None:
            raise ValueError(f"'metric: {self.metric}' needs 'goal': higher or lower")
        if len(set(self.controls)) != len(self.controls):
            raise ValueError("'controls' must differ from one another")
        if any(first == second for first, second in self.pairs):
            raise ValueError("'pairs' compare two different variants")
        return self

    @property
    def lower_is_better(self) -> bool:
        """Return whether a smaller number is the better one."""
        return (self.goal or DIRECTIONS[self.metric]) == "lower"
