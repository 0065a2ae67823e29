"""A teacher's cache aligned layer by layer while it runs, one layer of it alive at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import part_at_least_float32
from kava_core.kv.maths.masks import without_autocast
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap

RunTeacher = Callable[[Callable[[int, Cache], None]], None]
"""Runs a teacher; its argument takes the place and the cache of every layer the aligner reads."""


class WaitingLayers:
    """Teacher layers that some student layer still waits for."""

    def __init__(self, aligner: TeacherAligner) -> None:
        self.reads = aligner.layer_map.reads
        self.waiting = set(range(len(self.reads)))
        self.kept: dict[int, Cache] = {}

    def take(self, place: int, cache: Cache) -> Iterator[tuple[int, Cache]]:
        """Every student layer for which this was the last one missing, with the teacher layers it reads.

        Forgets, at the end, what no layer waits for.
        """
        self.kept[place] = cache.map(part_at_least_float32)
        for row in sorted(self.waiting):
            if all(read in self.kept for read in self.reads[row]):
                self.waiting.remove(row)
                yield row, _join_layers([self.kept[read] for read in self.reads[row]])
        awaited = {read for row in self.waiting for read in self.reads[row]}
        self.kept = {place: cache for place, cache in self.kept.items() if place in awaited}


def most_layers_alive(reads: tuple[tuple[int, ...], ...]) -> int:
    """Most teacher layers that are alive together, where they come in order."""
    places = {place for row in reads for place in row}
    ends = {place: max(max(row) for row in reads if place in row) for place in places}
    return max(sum(place <= now <= end for place, end in ends.items()) for now in ends)


def _join_layers(caches: list[Cache]) -> Cache:
    """Side by side along the axis ``layer``."""
    if len(caches) == 1:
        return caches[0]
    return caches[0].map(lambda _, part: torch.cat([getattr(cache, part) for cache in caches], 1))


def align_layer_by_layer(aligner: TeacherAligner, run: RunTeacher, time_map: TimeMap) -> Cache:
    """``aligner.align`` of what ``run`` hands over, without gradients."""
    arrivals, targets = WaitingLayers(aligner), {}
    layers = len(arrivals.reads)

    def take(place: int, cache: Cache) -> None:
        with torch.no_grad(), without_autocast(cache.any.device):
            for row, sources in arrivals.take(place, cache):
                for part, x in aligner.align_layer(sources, time_map, row).items():
                    if part not in targets:
                        targets[part] = x.new_empty(x.shape[0], layers, *x.shape[2:])
                    targets[part][:, row : row + 1] = x

    run(take)
    return Cache(**targets)
