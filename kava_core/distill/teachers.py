"""Run the teachers and align their caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kava_core.kv.align.aligner import TeacherAligner
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline


def time_map_of(aligner: TeacherAligner, side: Mapping[str, Any], timeline: Timeline) -> TimeMap:
    """The map the collator planned, or a new one."""
    planned: TimeMap | None = side.get("time_map")
    return aligner.plan(Timeline.from_batch(side), timeline) if planned is None else planned
