"""Resample prompt, reasoning and answer separately, each example by its own borders."""

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
        """Map each segment to the teacher's; ``smoothing`` first averages within the teacher's segment."""
        segment = student.segments.clamp_min(0)
        compared_segment = torch.where(self.wanted[segment], student.segments, -1)
        at = places(teacher.segments, compared_segment, len(SEGMENT_NAMES))
        if self.thinned:
            at = at.only(evenly_kept(at, self.kept[segment]))
        resampled = block_map(at, self.mode)
        return self._smoothing_map(teacher).then(resampled) if self.smooths else resampled

    def _smoothing_map(self, teacher: Timeline) -> TimeMap:
        at = places(teacher.segments, teacher.segments, len(SEGMENT_NAMES))
        return moving_average(at, self.windows[teacher.segments.clamp_min(0)])
