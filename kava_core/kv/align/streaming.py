"""Align a teacher's cache layer by layer while the teacher runs, so that few raw layers are alive at once."""

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

    def take(self, t_layer: int, cache: Cache) -> Iterator[tuple[int, Cache]]:
        """Add a teacher layer, and yield every student layer for which it was the last one missing.

        Teacher layers that no student layer waits for any more are dropped at the end.

        Args:
            t_layer: the teacher layer's index among those the aligner reads.
            cache: that layer, each part ``batch 1 t_head t_time t_dim``.

        Yields:
            The student layer's index among the compared ones, and the teacher layers it reads, along
                ``layer``.
        """
        self.kept[t_layer] = cache.map(part_at_least_float32)
        for row in sorted(self.waiting):
            if all(read in self.kept for read in self.reads[row]):
                self.waiting.remove(row)
                yield row, _join_layers([self.kept[read] for read in self.reads[row]])
        awaited: set[int] = set()
        for row in self.waiting:
            awaited.update(self.reads[row])
        self.kept = {layer: kept for layer, kept in self.kept.items() if layer in awaited}


def most_layers_alive(reads: tuple[tuple[int, ...], ...]) -> int:
    """Count the most teacher layers that are alive together if they come in order.

    Args:
        reads: for every student layer, indices of the teacher layers it reads.
    """
    needed_until: dict[int, int] = {}
    for row in reads:
        for layer in row:
            needed_until[layer] = max(needed_until.get(layer, 0), max(row))
    alive = []
    for now in needed_until:
        alive.append(sum(layer <= now <= end for layer, end in needed_until.items()))
    return max(alive)


def _join_layers(caches: list[Cache]) -> Cache:
    """Join caches along the axis ``layer``."""
    if len(caches) == 1:
        return caches[0]
    return caches[0].map(lambda _, part: torch.cat([getattr(cache, part) for cache in caches], 1))


def align_layer_by_layer(aligner: TeacherAligner, run: RunTeacher, time_map: TimeMap) -> Cache:
    """Return the same target as ``aligner.align``, made while the teacher runs, without gradients.

    Args:
        aligner: of this teacher.
        run: runs the teacher, and hands over each layer.
        time_map: of the batch.
    """
    arrivals, targets = WaitingLayers(aligner), {}
    layers = len(arrivals.reads)

    def take(t_layer: int, cache: Cache) -> None:
        with torch.no_grad(), without_autocast(cache.any.device):
            for row, sources in arrivals.take(t_layer, cache):
                for part, x in aligner.align_layer(sources, time_map, row).items():
                    if part not in targets:
                        targets[part] = x.new_empty(x.shape[0], layers, *x.shape[2:])
                    targets[part][:, row : row + 1] = x

    run(take)
    return Cache(**targets)
