"""Keep the first tokens and the most recent ones, as a streaming cache does (arXiv 2309.17453)."""

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

    Padding does not count, on whichever side it is. A token that is both counts as a sink.
    """

    def __init__(self, config: StreamingConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.sinks = config.sinks
        self.window = config.window

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map each kept token to one tap; tokens between, and those that the teacher lacks, are not valid."""
        at = places(teacher.mask.long() - 1, student.mask.long() - 1, blocks=1)
        tokens_to_end = at.count - at.offset
        is_sink = at.offset < self.sinks
        is_recent = tokens_to_end <= self.window
        t_offset = torch.where(is_sink, at.offset, at.t_count - tokens_to_end)
        exists = (t_offset >= 0) & (t_offset < at.t_count)
        return TimeMap.gather(at.t_start + t_offset, at.valid & (is_sink | is_recent) & exists)
