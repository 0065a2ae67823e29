"""Hold what aligns one teacher's cache, built and ready."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass

from torch import nn

from kava_core.config import ComponentConfig
from kava_core.kv.align.boundaries import attribute_errors_to
from kava_core.kv.align.layer_map import LayerMap
from kava_core.kv.align.time_plan import TimePlan
from kava_core.protocols.axes import Geometry


@dataclass(frozen=True)
class AlignmentComponents:
    """One component for every axis, as they are built: each meets what those before it leave."""

    teacher: str
    """The teacher's name, for error notes."""
    layer_map: LayerMap
    """``t_layer → layer``."""
    time_plan: TimePlan
    """``t_time → time``."""
    head_adapter: nn.Module
    """``t_head → head``."""
    dim_projector: nn.Module
    """``t_dim → dim``."""
    teacher_view: Geometry
    """Extents of the mapped side after the head adapter."""
    student_view: Geometry
    """Extents of the other side, as the head adapter sees it."""
    configs: Mapping[str, ComponentConfig]
    """Declaration of every component by kind, for error notes."""

    def errors_of(self, kind: str) -> AbstractContextManager[None]:
        """Attribute errors raised inside to the component of this kind."""
        return errors_of_component(kind, self.configs[kind], teacher=self.teacher)


def errors_of_component(kind: str, config: ComponentConfig, *, teacher: str) -> AbstractContextManager[None]:
    """Attribute errors raised inside to a component of one teacher's alignment."""
    return attribute_errors_to(f"{kind} {config.name!r}, teacher {teacher!r}", config)
