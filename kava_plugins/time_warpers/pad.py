"""Equal index: the k-th real student token reads the k-th real teacher token."""

from __future__ import annotations

import torch
from torch import nn

from kava_core.kv.maths.resample import places
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import PadConfig


class Pad(nn.Module):
    """Aligns on the first real tokens, on whichever side the padding stands.

    The longer of the two is cut: student positions beyond the teacher's last real token are not valid.
    """

    def __init__(self, config: PadConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The map and its validity; one tap for each position."""
        at = places(_one_block(teacher), _one_block(student), 1)
        return TimeMap.gather(at.t_start + at.offset, at.valid & (at.offset < at.t_count))


def _one_block(timeline: Timeline) -> torch.Tensor:
    return timeline.mask.long() - 1
