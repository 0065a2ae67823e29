"""Prompt, reasoning and answer resampled separately, each example by its own borders."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from kava_core.kv.maths.resample import block_map, evenly_kept, moving_average, places
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import SEGMENT_NAMES, Timeline
from kava_plugins.time_warpers import SegmentConfig


class Segment(nn.Module):
    """A student's segment reads the teacher's same segment, whatever their lengths.

    Not valid are segments the spec leaves out, segments the teacher does not have, and what ``ratio`` drops.
    """

    windows: Tensor
    kept: Tensor
    wanted: Tensor

    def __init__(self, config: SegmentConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()
        self.mode = config.mode
        windows = [getattr(config.smoothing, name) for name in SEGMENT_NAMES]
        kept = [round(getattr(config.ratio, name) * 1_000_000) for name in SEGMENT_NAMES]
        self.smooths = max(windows) > 1
        self.thinned = min(kept) < 1_000_000
        self.register_buffer("windows", torch.tensor(windows), persistent=False)
        self.register_buffer("kept", torch.tensor(kept), persistent=False)
        wanted = torch.tensor([name in config.segments for name in SEGMENT_NAMES])
        self.register_buffer("wanted", wanted, persistent=False)

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map and its validity; what ``smoothing`` averages is the teacher's whole segment."""
        own = student.segments.clamp_min(0)
        block = torch.where(self.wanted[own], student.segments, -1)
        at = places(teacher.segments, block, len(SEGMENT_NAMES))
        if self.thinned:
            at = at.only(evenly_kept(at, self.kept[own]))
        resampled = block_map(at, self.mode)
        return self._smoothed(teacher).then(resampled) if self.smooths else resampled

    def _smoothed(self, teacher: Timeline) -> TimeMap:
        within = places(teacher.segments, teacher.segments, len(SEGMENT_NAMES))
        return moving_average(within, self.windows[teacher.segments.clamp_min(0)])
