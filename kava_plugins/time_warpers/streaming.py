"""The first tokens and the most recent ones, as a streaming cache keeps them (arXiv 2309.17453)."""

from __future__ import annotations

import torch
from torch import nn

from kava_core.kv.maths.resample import places
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import StreamingConfig


class Streaming(nn.Module):
    """Attention sinks by index from the beginning, recent tokens by index from the end.

    Padding does not count, on whichever side it stands. A token that is both counts as a sink.
    """

    def __init__(self, config: StreamingConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.sinks = config.sinks
        self.window = config.window

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map, one tap each; not valid is what lies between, and what the teacher lacks."""
        at = places(teacher.mask.long() - 1, student.mask.long() - 1, blocks=1)
        from_end = at.count - at.offset
        sink = at.offset < self.sinks
        read = torch.where(sink, at.offset, at.t_count - from_end)
        kept = at.valid & (sink | (from_end <= self.window)) & (read >= 0) & (read < at.t_count)
        return TimeMap.gather(at.t_start + read, kept)
