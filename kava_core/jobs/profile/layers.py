"""Layer by layer: how the aligned teacher resembles the student, and how each of them attends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.config import Part
from kava_core.jobs.profile.attention import Rule, entropy, rules
from kava_core.jobs.profile.prepared import BOTH, Subject, time_map_of
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.maths.masks import widen, without_autocast
from kava_core.protocols.axes import Cache


@dataclass(frozen=True)
class Entropy:
    """Of attention, a number for every layer: a mean over query heads and over real positions."""

    nats: tuple[float, ...]
    share: tuple[float, ...]
    """Of the log of how many keys a query sees: 0 looks at one, 1 at all alike."""


@dataclass(frozen=True)
class TeacherLayers:
    """Of one teacher."""

    covered: float
    """Share of the student's positions that have a target."""
    before: Entropy
    """Its own, of the layers that are read; ``sources`` are their numbers."""
    sources: tuple[int, ...]
    after: Entropy | None
    """Its aligned keys under the student's queries, over positions with a target; None where its target does
    not have the student's heads and width."""
    cosines: dict[Part, tuple[float, ...]] = field(default_factory=dict)
    """Of the target and the student, a mean over heads and positions for every compared layer; no part where
    widths differ."""


def cosines(
    own: Float[Tensor, "batch layer head time dim"],
    target: Float[Tensor, "batch layer head time dim"],
    valid: Bool[Tensor, "batch time"],
) -> Float[Tensor, " layer"]:
    """Summed over heads' mean at every valid position; a zero vector has cosine 0."""
    tiny = torch.finfo(widen(own).dtype).tiny
    each = torch.cosine_similarity(widen(own), widen(target), dim=-1, eps=tiny).mean(2)
    return torch.where(valid[:, None], each, 0).sum((0, 2))


def entropies(
    cache: Cache, keys: Float[Tensor, "batch layer head time dim"], live: Tensor, of: Sequence[Rule]
) -> list[tuple[Tensor, Tensor]]:
    """For every layer nats and shares, ``batch time``, of the cache's queries over ``keys``."""
    assert cache.queries is not None
    return [entropy(cache.queries[:, place], keys[:, place], live, rule) for place, rule in enumerate(of)]


class _Means:
    """Of every layer over all batches, without NaN where a position does not count."""

    def __init__(self) -> None:
        self.batches: list[list[tuple[Tensor, Tensor]]] = []

    def add(self, layers: list[tuple[Tensor, Tensor]], live: Tensor) -> None:
        self.batches.append([(nats[live], share[live]) for nats, share in layers])

    def entropy(self) -> Entropy | None:
        if not self.batches:
            return None
        layers = list(zip(*self.batches, strict=True))
        nats = tuple(float(torch.cat([n for n, _ in layer]).mean()) for layer in layers)
        shares = [torch.cat([share for _, share in layer]) for layer in layers]
        return Entropy(nats, tuple(_mean_of_several(share, n) for share, n in zip(shares, nats, strict=True)))


def _mean_of_several(shares: Tensor, nats: float) -> float:
    """Over queries that see several keys; NaN where the entropy itself is, which is not for seeing one."""
    return float(shares.nanmean()) if nats == nats else torch.nan


def own_entropy(subject: Subject, batches: Sequence[Mapping[str, Any]]) -> Entropy:
    """The student's."""
    means = _Means()
    for batch in batches:
        side = batch["student"]
        cache, _ = subject.attended(side)
        assert cache.keys is not None
        live = side["attention_mask"].bool()
        means.add(entropies(cache, cache.keys, live, student_rules(subject, cache)), live)
    found = means.entropy()
    assert found is not None
    return found


def student_rules(subject: Subject, cache: Cache) -> list[Rule]:
    """How the compared layers attend."""
    return rules(subject.distiller.student, subject.pipeline.layers, cache.any.shape[-1])


def stand_in(
    subject: Subject, aligner: Any, target: Cache, own: Cache, turn: Rotation | None
) -> Cache | None:
    """The target's keys and values where the student's attention can read them, rotated as its own are.

    With ``rotary: keep`` they are as the teacher rotated them. None where extents differ.
    """
    found = unfolded(aligner, target.pick(BOTH), own)
    if found is None or turn is None or subject.spec.rotary == "keep":
        return found
    return found.map(lambda x, part: turn.apply(x) if part == "keys" else x)


def teacher_layers(subject: Subject, place: int, batches: Sequence[Mapping[str, Any]]) -> TeacherLayers:
    """Of the teacher at ``place``."""
    aligner, name = subject.whole[place], subject.teachers[place].name
    before, after = _Means(), _Means()
    total: dict[Part, Tensor] = {}
    covered = real = 0
    for batch in batches:
        side, own = batch["teachers"][name], batch["student"]
        _add_raw(subject, place, side, before)
        with without_autocast(subject.device):
            time_map = time_map_of(aligner, side, own)
            target = aligner.align(subject.cache(place, side).pick(BOTH), time_map)
            _add_cosines(subject, aligner, target, own, time_map.valid, total)
            _add_after(subject, aligner, target, own, time_map.valid, after)
        covered += int(time_map.valid.sum())
        real += int(own["attention_mask"].sum())
    first = before.entropy()
    assert first is not None
    means = {part: tuple((sums / max(covered, 1)).tolist()) for part, sums in total.items()}
    return TeacherLayers(covered / max(real, 1), first, aligner.sources, after.entropy(), means)


def _add_raw(subject: Subject, place: int, side: Mapping[str, Any], means: _Means) -> None:
    cache, live = subject.raw(place, side), side["attention_mask"].bool()
    assert cache.keys is not None
    of = rules(subject.teachers[place].model, subject.pipeline.teachers[place].sources, cache.any.shape[-1])
    means.add(entropies(cache, cache.keys, live, of), live)


def _add_cosines(
    subject: Subject,
    aligner: Any,
    target: Cache,
    own: Mapping[str, Any],
    valid: Tensor,
    total: dict[Any, Tensor],
) -> None:
    view = aligner.view_of(subject.compared(own).pick(BOTH).map(part_at_least_float32))
    for part, x in view.items():
        theirs = getattr(target, part)
        if x.shape == theirs.shape:
            total[part] = total.get(part, 0) + cosines(x, theirs, valid).double()


def _add_after(
    subject: Subject, aligner: Any, target: Cache, side: Mapping[str, Any], valid: Tensor, means: _Means
) -> None:
    own, turn = subject.attended(side)
    found = stand_in(subject, aligner, target, own, turn)
    if found is not None:
        assert found.keys is not None
        means.add(entropies(own, found.keys, valid, student_rules(subject, own)), valid)


def unfolded(aligner: TeacherAligner, target: Cache, student: Cache) -> Cache | None:
    """The target with the student's extents, so that its keys and values can stand in for the student's.

    A view such as ``flat`` puts the student's channels in another order and changes none of them, so the
    numbers of the channels, sent through it, tell how to undo it.

    Returns:
        None where the target has other extents than the student's view, or the view is no mere order.
    """
    found = {part: _undone(aligner, x, getattr(student, part), part) for part, x in target.items()}
    there = {part: x for part, x in found.items() if x is not None}
    return Cache(**there) if len(there) == len(found) else None


def _undone(aligner: TeacherAligner, x: Tensor, like: Tensor, part: Part) -> Tensor | None:
    """``batch layer head time dim`` of the student; ``x`` is of the view."""
    _, layer, head, _, dim = like.shape
    if aligner.lifts:
        return None
    count = layer * head * dim
    named = torch.arange(count, dtype=torch.float64, device=x.device).view(1, layer, head, 1, dim)
    view = getattr(aligner.view_of(Cache(**{part: named})), part)
    if (view.shape[1:3], view.shape[4]) != (x.shape[1:3], x.shape[4]) or view.numel() != count:
        return None
    order = view.flatten().long().argsort()
    flat = x.movedim(3, 1).flatten(2).index_select(2, order)
    return flat.unflatten(2, (layer, head, dim)).movedim(1, 3)
