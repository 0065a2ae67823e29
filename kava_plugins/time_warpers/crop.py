"""Keep the first reasoning tokens."""

from __future__ import annotations

from torch import nn

from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import CropConfig
from kava_plugins.time_warpers._reasoning import reasoning_places


class Crop(nn.Module):
    """The student's k-th reasoning token reads the teacher's k-th; a control of eviction."""

    def __init__(self, config: CropConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map each reasoning token to one tap; valid where the teacher has a k-th reasoning token."""
        at = reasoning_places(teacher, student)
        return TimeMap.gather(at.t_start + at.offset, at.valid & (at.offset < at.t_count))
