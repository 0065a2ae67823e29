"""Evict to reasoning tokens drawn for every layer and head."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import RandomConfig
from kava_plugins.time_warpers._reasoning import highest_positions, is_reasoning, slot_map


class Random(nn.Module):
    """Evicts to tokens drawn without replacement, by torch's own random numbers; all if they are few."""

    reads: tuple[Part, ...] = ("keys",)

    def __init__(self, config: RandomConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map slots to the student's reasoning tokens."""
        return slot_map(teacher, student)

    def choose(self, cache: Cache, timeline: Timeline, count: int) -> Int[Tensor, "batch t_layer t_head _"]:
        """Draw the positions of ``count`` reasoning tokens; they come in time order."""
        scores = torch.rand(cache.any.shape[:4], device=cache.any.device)
        allowed = is_reasoning(timeline)[:, None, None]
        return highest_positions(scores.masked_fill(~allowed, -torch.inf), count)
