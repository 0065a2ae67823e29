"""Let teacher and student share their positions: nothing is warped."""

from __future__ import annotations

from torch import nn

from kava_core.errors import KavaError
from kava_core.protocols.axes import Geometry
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_plugins.time_warpers import IdentityConfig


class Identity(nn.Module):
    """Position i reads position i, at no cost; valid where both are real."""

    def __init__(self, config: IdentityConfig, *, teacher: Geometry, student: Geometry) -> None:
        super().__init__()

    def forward(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Return the identity.

        Raises:
            KavaError: the two are not equally long.
        """
        t_time, time = teacher.mask.shape[1], student.mask.shape[1]
        if t_time != time:
            raise KavaError(
                f"time_warper identity: the teacher has {t_time} positions and the student {time}, "
                "they must be equal; other warpers: segment, pad, linear"
            )
        return TimeMap.same(teacher.mask & student.mask)
