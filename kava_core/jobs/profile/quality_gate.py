"""Judge whether the aligned teacher gives the student's queries the output that its own cache gives.

For every layer the cosine between softmax(q · k) · v with the student's own keys and values and with the
aligned teacher's, q being the student's queries. Where caches are mapped between trained models, agreement
of attention outputs went with the quality kept (r = 0.57) and the fit of the map did not (r = −0.20;
arXiv 2608.03893). For a student with random weights neither its queries nor its own outputs mean anything
yet, so the number says little there; ``docs/results/gate.md`` shows measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.jobs.profile.layer_comparison import as_student_keys, student_rules
from kava_core.jobs.profile.prepared_variant import KEYS_AND_VALUES, PreparedVariant, plan_time_map
from kava_core.jobs.profile.recomputed_attention import AttentionRule, attention_output
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.maths.masks import without_autocast
from kava_core.protocols.axes import Cache

BATCH = 32
"""Most examples in a forward pass."""

ARMS = ("true", "shuffled", "random")
"""The example's own teacher; the next example's; the own one through a fixed random width projection."""

ArmCosines = dict[str, Float[Tensor, "batch layer"]]
"""Cosines of attention outputs of every example and layer, by arm."""


@dataclass(frozen=True)
class Gate:
    """The verdict on one teacher. Means over examples, which are means over query heads and positions.

    A position counts if it has a target in all three arms.
    """

    examples: int
    """Examples with at least one such position: n."""
    layers: dict[str, tuple[float, ...]]
    """Mean cosine of every compared layer, by arm."""
    mean: dict[str, float]
    """Mean cosine over layers as well, by arm."""
    difference: float
    """Mean over examples of true minus shuffled; each example is its own pair."""
    spread: float
    """Standard deviation of that difference over examples (n − 1)."""
    above: float
    """Share of examples whose true cosine is above the shuffled one."""

    @property
    def open(self) -> bool:
        """Return whether true beats shuffled by more than the spread over examples, which is the rule."""
        return self.difference > self.spread


def gate_verdict(cosines: Mapping[str, Float[Tensor, "batch layer"]]) -> Gate:
    """Judge a teacher by every example's cosines, by arm.

    Examples with NaN are left out. A single example has no spread, which keeps the gate closed.
    """
    complete = torch.stack([of_arm.isfinite().all(1) for of_arm in cosines.values()]).all(0)
    layers: dict[str, tuple[float, ...]] = {}
    mean: dict[str, float] = {}
    for arm, of_arm in cosines.items():
        kept = of_arm[complete].double()
        layers[arm] = tuple(kept.mean(0).tolist())
        mean[arm] = float(kept.mean())
    differences = (cosines["true"][complete].double() - cosines["shuffled"][complete].double()).mean(1)
    return Gate(
        examples=int(complete.sum()),
        layers=layers,
        mean=mean,
        difference=float(differences.mean()),
        spread=float(differences.std()) if len(differences) > 1 else torch.inf,
        above=float((differences > 0).double().mean()),
    )


def judge_teachers(
    variant: PreparedVariant, random_aligners: list[TeacherAligner], examples: int
) -> dict[str, Gate | None]:
    """Judge every teacher over validation examples.

    Args:
        variant: the variant.
        random_aligners: aligners whose width projections are random and fixed, one for each teacher.
        examples: how many, at least 2, or as many as there are.

    Returns:
        The verdicts by teacher; None if its target cannot be read by the student's attention.
    """
    batches: dict[str, list[ArmCosines]] = {teacher.name: [] for teacher in variant.teachers}
    for batch in variant.validation_batches(examples, BATCH):
        for index, name in enumerate(batches):
            cosines = _batch_cosines(variant, index, random_aligners[index], batch)
            if cosines is not None:
                batches[name].append(cosines)
    return {name: _verdict_of_batches(of_teacher) for name, of_teacher in batches.items()}


def _verdict_of_batches(batches: list[ArmCosines]) -> Gate | None:
    if not batches:
        return None
    cosines = {}
    for arm in ARMS:
        cosines[arm] = torch.cat([of_batch[arm] for of_batch in batches])
    return gate_verdict(cosines)


def _batch_cosines(
    variant: PreparedVariant, index: int, random_aligner: TeacherAligner, batch: Mapping[str, Any]
) -> ArmCosines | None:
    """Return the cosines of every example, by arm; None if the student's attention cannot read a target."""
    student, rotation = variant.attended_student_cache(batch["student"])
    arms = _arm_targets(variant, index, random_aligner, batch)
    caches: dict[str, Cache] = {}
    for arm in arms:
        cache = as_student_keys(variant, arm.aligner, arm.target, student, rotation)
        if cache is None:
            return None
        caches[arm.name] = cache
    live = torch.stack([arm.valid for arm in arms]).all(0)
    rules = student_rules(variant, student)
    return {arm: output_agreement(student, cache, live, rules) for arm, cache in caches.items()}


class _ArmTarget(NamedTuple):
    """What one arm offers as a target."""

    name: str
    aligner: TeacherAligner
    target: Cache
    valid: Bool[Tensor, "batch time"]


def _arm_targets(
    variant: PreparedVariant, index: int, random_aligner: TeacherAligner, batch: Mapping[str, Any]
) -> list[_ArmTarget]:
    aligner = variant.key_value_aligners[index]
    side = batch["teachers"][aligner.name]
    cache = variant.alignable_teacher_cache(index, side).pick(KEYS_AND_VALUES)
    next_side = {name: field.roll(-1, 0) for name, field in side.items() if isinstance(field, Tensor)}
    next_cache = cache.map(lambda tensor, _: tensor.roll(-1, 0))
    arms = (
        ("true", aligner, side, cache),
        ("shuffled", aligner, next_side, next_cache),
        ("random", random_aligner, side, cache),
    )
    targets = []
    with without_autocast(variant.device):
        for name, arm_aligner, arm_side, arm_cache in arms:
            time_map = plan_time_map(arm_aligner, arm_side, batch["student"], arm_cache)
            target = arm_aligner.unchecked_target(arm_cache, time_map)
            targets.append(_ArmTarget(name, arm_aligner, target, time_map.valid))
    return targets


def output_agreement(
    student: Cache, target: Cache, live: Bool[Tensor, "batch time"], rules: list[AttentionRule]
) -> Float[Tensor, "batch layer"]:
    """Return the cosine of both attention outputs, mean over query heads and live positions; NaN without any.

    Args:
        student: the student's queries, keys and values.
        target: keys and values of the same extents.
        live: positions that ask and are looked at, on both sides.
        rules: how each layer attends.
    """
    assert student.queries is not None
    assert student.keys is not None
    assert student.values is not None
    assert target.keys is not None
    assert target.values is not None
    columns = []
    for layer, rule in enumerate(rules):
        queries = student.queries[:, layer]
        own = attention_output(queries, student.keys[:, layer], student.values[:, layer], live, rule)
        aligned = attention_output(queries, target.keys[:, layer], target.values[:, layer], live, rule)
        cosines = torch.cosine_similarity(own, aligned, dim=-1, eps=torch.finfo(own.dtype).tiny).mean(1)
        columns.append(torch.where(live, cosines, 0).sum(1) / live.sum(1))
    return torch.stack(columns, 1)
