"""Compare the aligned teacher with the student layer by layer, and how each of them attends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.config import Part
from kava_core.jobs.profile.prepared_variant import KEYS_AND_VALUES, PreparedVariant, Side, plan_time_map
from kava_core.jobs.profile.recomputed_attention import AttentionRule, attention_entropy, attention_rules
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.maths.masks import widen, without_autocast
from kava_core.protocols.axes import Cache

LayerEntropies = list[tuple[Tensor, Tensor]]
"""For every layer nats and shares, each ``batch time``."""


@dataclass(frozen=True)
class Entropy:
    """Entropy of attention, a number for every layer: a mean over query heads and over real positions."""

    nats: tuple[float, ...]
    share: tuple[float, ...]
    """As a share of the log of how many keys a query sees: 0 looks at one, 1 at all alike."""


@dataclass(frozen=True)
class TeacherLayers:
    """How one teacher's layers compare with the student's."""

    covered: float
    """Share of the student's positions that have a target."""
    before: Entropy
    """The teacher's own, of the layers that are read."""
    sources: tuple[int, ...]
    """Numbers of the layers that are read."""
    after: Entropy | None
    """Its aligned keys under the student's queries, over positions with a target; None if its target does
    not have the student's heads and width."""
    cosines: dict[Part, tuple[float, ...]] = field(default_factory=dict)
    """Cosine of target and student, a mean over heads and positions for every compared layer; without the
    parts whose widths differ."""


def summed_cosines(
    student: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    valid: Bool[Tensor, "batch time"],
) -> Float[Tensor, " layer"]:
    """Return the sum over valid positions of the heads' mean cosine; a zero vector has cosine 0."""
    tiny = torch.finfo(widen(student).dtype).tiny
    cosines = torch.cosine_similarity(widen(student), widen(target), dim=-1, eps=tiny).mean(2)
    return torch.where(valid[:, None], cosines, 0).sum((0, 2))


def layer_entropies(
    cache: Cache,
    keys: Float[Tensor, "batch layer head time dim"],
    live: Bool[Tensor, "batch time"],
    rules: Sequence[AttentionRule],
) -> LayerEntropies:
    """Return for every layer the entropy of the cache's queries over ``keys``."""
    assert cache.queries is not None
    entropies = []
    for layer, rule in enumerate(rules):
        entropies.append(attention_entropy(cache.queries[:, layer], keys[:, layer], live, rule))
    return entropies


class _EntropyMeans:
    """Averages entropies of every layer over all batches, at the positions that count."""

    def __init__(self) -> None:
        self.batches: list[LayerEntropies] = []

    def add(self, layers: LayerEntropies, live: Tensor) -> None:
        self.batches.append([(nats[live], share[live]) for nats, share in layers])

    def mean(self) -> Entropy | None:
        if not self.batches:
            return None
        nats_by_layer: list[float] = []
        share_by_layer: list[float] = []
        for batches_of_layer in zip(*self.batches, strict=True):
            nats = float(torch.cat([nats for nats, _ in batches_of_layer]).mean())
            shares = torch.cat([share for _, share in batches_of_layer])
            nats_by_layer.append(nats)
            share_by_layer.append(_mean_share(shares, nats))
        return Entropy(tuple(nats_by_layer), tuple(share_by_layer))


def _mean_share(shares: Tensor, nats: float) -> float:
    """Average over queries that see several keys, whose shares are no NaN; NaN if the entropy itself is."""
    return float(shares.nanmean()) if nats == nats else torch.nan


def student_entropy(variant: PreparedVariant, batches: Sequence[Mapping[str, Any]]) -> Entropy:
    """Return the entropy of the student's own attention."""
    means = _EntropyMeans()
    for batch in batches:
        side = batch["student"]
        cache, _ = variant.attended_student_cache(side)
        assert cache.keys is not None
        live = side["attention_mask"].bool()
        means.add(layer_entropies(cache, cache.keys, live, student_rules(variant, cache)), live)
    entropy = means.mean()
    assert entropy is not None
    return entropy


def student_rules(variant: PreparedVariant, cache: Cache) -> list[AttentionRule]:
    """Return how the student's compared layers attend."""
    dim = cache.any.shape[-1]
    return attention_rules(variant.distiller.student, variant.pipeline.layers, dim)


def as_student_keys(
    variant: PreparedVariant,
    aligner: TeacherAligner,
    target: Cache,
    student: Cache,
    rotation: Rotation | None,
) -> Cache | None:
    """Return the target's keys and values as the student's attention would read them.

    Args:
        variant: the variant.
        aligner: the one that made the target.
        target: the aligned teacher.
        student: the student's own cache.
        rotation: how the student's keys were rotated; the target's are rotated likewise, but with
            ``rotary: keep``, where they are as the teacher rotated them.

    Returns:
        None if the target has other extents than the student's cache.
    """
    cache = to_student_view(aligner, target.pick(KEYS_AND_VALUES), student)
    if cache is None or rotation is None or variant.spec.rotary == "keep":
        return cache
    return cache.map(lambda tensor, part: rotation.apply(tensor) if part == "keys" else tensor)


def compare_teacher_layers(
    variant: PreparedVariant, index: int, batches: Sequence[Mapping[str, Any]]
) -> TeacherLayers:
    """Compare the layers of the teacher with this index with the student's."""
    aligner, name = variant.key_value_aligners[index], variant.teachers[index].name
    before, after = _EntropyMeans(), _EntropyMeans()
    cosine_sums: dict[Part, Tensor] = {}
    covered_positions = real_positions = 0
    for batch in batches:
        teacher_side, student_side = batch["teachers"][name], batch["student"]
        _add_teacher_entropy(variant, index, teacher_side, before)
        with without_autocast(variant.device):
            cache = variant.alignable_teacher_cache(index, teacher_side).pick(KEYS_AND_VALUES)
            time_map = plan_time_map(aligner, teacher_side, student_side, cache)
            target = aligner.unchecked_target(cache, time_map)
            _add_cosines(variant, aligner, target, student_side, time_map.valid, cosine_sums)
            _add_aligned_entropy(variant, aligner, target, student_side, time_map.valid, after)
        covered_positions += int(time_map.valid.sum())
        real_positions += int(student_side["attention_mask"].sum())
    entropy_before = before.mean()
    assert entropy_before is not None
    cosines = {part: tuple((sums / max(covered_positions, 1)).tolist()) for part, sums in cosine_sums.items()}
    covered = covered_positions / max(real_positions, 1)
    return TeacherLayers(covered, entropy_before, aligner.sources, after.mean(), cosines)


def _add_teacher_entropy(variant: PreparedVariant, index: int, side: Side, means: _EntropyMeans) -> None:
    """Add the entropy of the teacher's attention before anything is aligned."""
    cache = variant.attended_teacher_cache(index, side)
    live = side["attention_mask"].bool()
    assert cache.keys is not None
    layers = variant.pipeline.teachers[index].sources
    rules = attention_rules(variant.teachers[index].model, layers, cache.any.shape[-1])
    means.add(layer_entropies(cache, cache.keys, live, rules), live)


def _add_cosines(
    variant: PreparedVariant,
    aligner: TeacherAligner,
    target: Cache,
    student_side: Side,
    valid: Tensor,
    sums: dict[Part, Tensor],
) -> None:
    """Add the cosines of every part whose extents are the student's."""
    student = variant.compared_student_cache(student_side).pick(KEYS_AND_VALUES)
    view = aligner.view_of(student.map(part_at_least_float32))
    for part, tensor in view.items():
        target_part = getattr(target, part)
        if tensor.shape == target_part.shape:
            sums[part] = sums.get(part, 0) + summed_cosines(tensor, target_part, valid).double()


def _add_aligned_entropy(
    variant: PreparedVariant,
    aligner: TeacherAligner,
    target: Cache,
    student_side: Side,
    valid: Tensor,
    means: _EntropyMeans,
) -> None:
    """Add the entropy of the student's queries over the aligned keys, if those have the right extents."""
    student, rotation = variant.attended_student_cache(student_side)
    cache = as_student_keys(variant, aligner, target, student, rotation)
    if cache is not None:
        assert cache.keys is not None
        means.add(layer_entropies(student, cache.keys, valid, student_rules(variant, student)), valid)


def to_student_view(aligner: TeacherAligner, target: Cache, student: Cache) -> Cache | None:
    """Return the target with the student's extents, so that its parts can replace the student's.

    Returns:
        None if the target has other extents than the student's view, or the view does more than to reorder.
    """
    parts = {}
    for part, tensor in target.items():
        reordered = _to_student_order(aligner, tensor, getattr(student, part), part)
        if reordered is None:
            return None
        parts[part] = reordered
    return Cache(**parts)


def _to_student_order(
    aligner: TeacherAligner,
    target: Tensor,
    student: Float[Tensor, "batch layer head time dim"],
    part: Part,
) -> Tensor | None:
    """Undo the order in which a view such as ``flat`` puts the student's channels.

    The target has the view's extents, the result the student's. A view changes no channel, so the numbers
    of the channels, sent through it, show how to undo it.
    """
    _, layer, head, _, dim = student.shape
    if aligner.lifts:
        return None
    count = layer * head * dim
    numbers = torch.arange(count, dtype=torch.float64, device=target.device).view(1, layer, head, 1, dim)
    view = getattr(aligner.view_of(Cache(**{part: numbers})), part)
    same_extents = (view.shape[1:3], view.shape[4]) == (target.shape[1:3], target.shape[4])
    if not same_extents or view.numel() != count:
        return None
    order = view.flatten().long().argsort()
    channels = target.movedim(3, 1).flatten(2).index_select(2, order)
    return channels.unflatten(2, (layer, head, dim)).movedim(1, 3)
