"""Keep evenly spaced reasoning tokens."""

from __future__ import annotations

import torch
from torch import nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import UniformConfig
from kava_plugins.time_warpers._reasoning import reasoning_places


class Uniform(nn.Module):
    """The k-th of M reasoning tokens reads the teacher's ⌊(k + ½) · n / M⌋-th of n, all counted from 0.

    With n < M it reads the k-th, as eviction would: no token is read twice. A control of eviction.
    """

    def __init__(self, config: UniformConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map each reasoning token to one tap; valid where k < n."""
        at = reasoning_places(teacher, student)
        evenly_spaced = (2 * at.offset + 1) * at.t_count // (2 * at.count)
        t_offset = torch.where(at.t_count < at.count, at.offset, evenly_spaced)
        return TimeMap.gather(at.t_start + t_offset, at.valid & (at.offset < at.t_count))
