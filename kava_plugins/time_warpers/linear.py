"""Resample the whole sequence at once, prompt, reasoning and answer alike."""

from __future__ import annotations

from torch import nn

from kava_core.kv.maths.resample import block_map, places
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import LinearConfig


class Linear(nn.Module):
    """All real teacher tokens stretched or shrunk to all real student tokens, example by example."""

    def __init__(self, config: LinearConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.mode = config.mode

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map all real tokens to all real tokens, evenly."""
        at = places(teacher.mask.long() - 1, student.mask.long() - 1, blocks=1)
        return block_map(at, self.mode)
