"""Define the contract of time warpers: ``t_time → time``, and of those that evict."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor

from kava_core.config import Part
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline


@runtime_checkable
class TimeWarper(Protocol):
    """``t_time → time``, plus validity. Constructed as ``TimeWarper(config, *, teacher, student)``."""

    def __call__(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Return the row-stochastic map from the teacher's positions to the student's, for each example."""
        ...


@runtime_checkable
class Evictor(Protocol):
    """The methods of a time warper that chooses tokens for every layer and KV head of the teacher apart.

    Only for a student of latent tokens: the teacher's reasoning tokens are then *evicted* to as many *slots*
    as it has. Called with timelines, the warper returns the map from slots to the student: its k-th reasoning
    token reads slot k, valid where the teacher has more than k reasoning tokens.
    """

    reads: tuple[Part, ...]
    """The parts of the teacher's cache that it needs."""

    def choose(self, cache: Cache, timeline: Timeline, count: int) -> Int[Tensor, "batch t_layer t_head _"]:
        """Choose the teacher's positions for ``count`` slots: reasoning tokens in time order, each once.

        Keys and queries of ``cache`` are as attention saw them, with their rotation. Slots beyond the number
        of reasoning tokens are not read, but must hold a position. Padding may hold NaN.
        """
        ...


@runtime_checkable
class Scores(Protocol):
    """The method of an evictor that chooses by scores, of which evaluation logs the spread."""

    def scores(
        self, cache: Cache, timeline: Timeline
    ) -> dict[str, Float[Tensor, "batch t_layer t_head t_time"]]:
        """Return every score by name; −inf at positions that are no reasoning token."""
        ...
