"""The quality gate: does the aligned teacher hand on to the student's queries what its own cache does?

For every layer the cosine between softmax(q · k) · v with the student's own keys and values and with the
aligned teacher's, q being the student's queries. Where caches are mapped between trained models, agreement
of attention outputs went with the quality kept (r = 0.57) and the fit of the map did not (r = −0.20;
arXiv 2608.03893). For a student with random weights neither its queries nor its own outputs mean anything
yet, so the number says little there; ``docs/profile.md`` tells what was found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from kava_core.jobs.profile.attention import Rule, handed_on
from kava_core.jobs.profile.layers import stand_in, student_rules
from kava_core.jobs.profile.prepared import BOTH, Subject, time_map_of
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.maths.masks import without_autocast
from kava_core.protocols.axes import Cache

BATCH = 32
"""Most examples in a forward pass."""

ARMS = ("true", "shuffled", "random")
"""The example's own teacher; the next example's; the own one through a fixed random width projection."""


@dataclass(frozen=True)
class Gate:
    """Of one teacher. Means over examples, which are means over query heads and positions.

    A position counts where it has a target in all three arms.
    """

    examples: int
    """With at least one such position: n."""
    layers: dict[str, tuple[float, ...]]
    """Mean cosine of every compared layer, by arm."""
    mean: dict[str, float]
    """Over layers as well."""
    difference: float
    """Mean over examples of true minus shuffled; each example is its own pair."""
    spread: float
    """Standard deviation of that difference over examples (n − 1)."""
    above: float
    """Share of examples where true is above shuffled."""

    @property
    def open(self) -> bool:
        """The rule: true beats shuffled by more than the spread over examples."""
        return self.difference > self.spread


def judged(cosines: Mapping[str, Float[Tensor, "batch layer"]]) -> Gate:
    """From every example's cosines, by arm; examples with NaN are left out. One example has no spread."""
    there = torch.stack([x.isfinite().all(1) for x in cosines.values()]).all(0)
    kept = {arm: x[there].double() for arm, x in cosines.items()}
    pairs = (kept["true"] - kept["shuffled"]).mean(1)
    return Gate(
        int(there.sum()),
        {arm: tuple(x.mean(0).tolist()) for arm, x in kept.items()},
        {arm: float(x.mean()) for arm, x in kept.items()},
        float(pairs.mean()),
        float(pairs.std()) if len(pairs) > 1 else torch.inf,
        float((pairs > 0).double().mean()),
    )


def gates(subject: Subject, random: list[TeacherAligner], examples: int) -> dict[str, Gate | None]:
    """Of every teacher, over validation examples; None where its target cannot stand in for the cache.

    Args:
        subject: the variant.
        random: aligners whose width projections are random and fixed, one for each teacher.
        examples: how many, at least 2, as far as there are.
    """
    found: dict[str, list[dict[str, Tensor]]] = {teacher.name: [] for teacher in subject.teachers}
    for batch in subject.batches(examples, BATCH):
        for place, name in enumerate(found):
            cosines = _of_batch(subject, place, random[place], batch)
            found[name] += [] if cosines is None else [cosines]
    return {
        name: judged({arm: torch.cat([one[arm] for one in batches]) for arm in ARMS}) if batches else None
        for name, batches in found.items()
    }


def _of_batch(
    subject: Subject, place: int, random: TeacherAligner, batch: Mapping[str, Any]
) -> dict[str, Float[Tensor, "batch layer"]] | None:
    """Cosines of every example, by arm."""
    own, turn = subject.attended(batch["student"])
    arms = [_arm(subject, one, own, turn) for one in _targets(subject, place, random, batch)]
    there = [arm for arm in arms if arm is not None]
    if len(there) < len(arms):
        return None
    live = torch.stack([valid for _, valid in there]).all(0)
    of = student_rules(subject, own)
    return {arm: agreement(own, target, live, of) for arm, (target, _) in zip(ARMS, there, strict=True)}


Target = tuple[TeacherAligner, Cache, Tensor]
"""Whose, the target, and where it is valid."""


def _targets(
    subject: Subject, place: int, random: TeacherAligner, batch: Mapping[str, Any]
) -> Iterator[Target]:
    aligner = subject.whole[place]
    side = batch["teachers"][aligner.name]
    cache = subject.cache(place, side).pick(BOTH)
    following = {name: x.roll(-1, 0) for name, x in side.items() if isinstance(x, Tensor)}
    others = cache.map(lambda x, _: x.roll(-1, 0))
    with without_autocast(subject.device):
        for one, theirs, held in (
            (aligner, side, cache),
            (aligner, following, others),
            (random, side, cache),
        ):
            time_map = time_map_of(one, theirs, batch["student"])
            yield one, one.align(held, time_map), time_map.valid


def _arm(subject: Subject, made: Target, own: Cache, turn: Rotation | None) -> tuple[Cache, Tensor] | None:
    aligner, target, valid = made
    found = stand_in(subject, aligner, target, own, turn)
    return None if found is None else (found, valid)


def agreement(
    own: Cache, target: Cache, live: Bool[Tensor, "batch time"], of: list[Rule]
) -> Float[Tensor, "batch layer"]:
    """Cosine of both attention outputs, mean over query heads and live positions; NaN without any.

    Args:
        own: the student's queries, keys and values.
        target: keys and values of the same extents.
        live: positions that ask and are looked at, on both sides.
        of: how each layer attends.
    """
    assert own.queries is not None
    columns = []
    for place, rule in enumerate(of):
        mine, theirs = (
            handed_on(own.queries[:, place], cache.keys[:, place], cache.values[:, place], live, rule)
            for cache in (own, target)
            if cache.keys is not None and cache.values is not None
        )
        each = torch.cosine_similarity(mine, theirs, dim=-1, eps=torch.finfo(mine.dtype).tiny).mean(1)
        columns.append(torch.where(live, each, 0).sum(1) / live.sum(1))
    return torch.stack(columns, 1)
