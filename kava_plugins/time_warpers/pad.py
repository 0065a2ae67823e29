"""Let the k-th real student token read the k-th real teacher token."""

from __future__ import annotations

import torch
from torch import nn

from kava_core.kv.maths.resample import places
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import PadConfig


class Pad(nn.Module):
    """Alignment on the first real tokens, on whichever side the padding is.

    The longer of the two is cut: student positions beyond the teacher's last real token are not valid.
    """

    def __init__(self, config: PadConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Map each token to the one of equal index."""
        at = places(_real_as_one_block(teacher), _real_as_one_block(student), 1)
        return TimeMap.gather(at.t_start + at.offset, at.valid & (at.offset < at.t_count))


def _real_as_one_block(timeline: Timeline) -> torch.Tensor:
    return timeline.mask.long() - 1
