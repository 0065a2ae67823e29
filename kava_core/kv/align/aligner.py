"""One teacher's alignment: its components, and the steps from both caches to where they are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.align.boundaries import (
    adapt_heads,
    attribute_errors_to,
    fold_heads,
    project_dim,
    require_shape,
    warp_time,
)
from kava_core.kv.align.eviction import assert_evicts
from kava_core.kv.align.layer_map import LayerMap
from kava_core.kv.align.per_layer import component_at_layer
from kava_core.kv.align.stage_order import Commuting, Stage, StageExtents, cheapest_order
from kava_core.kv.align.time_plan import TimePlan
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.dim_projector import Calibrated
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.sections.align import AlignSpec

AXES = "batch layer head time dim"


class TeacherAligner(nn.Module):
    """Brings one teacher's cache and the student's to the same layers, heads, time and width.

    Layers and time are always the student's. Heads and width are the student's, or, with
    ``direction: to_teacher``, the teacher's: the same two components then map the student's cache.

    Args:
        spec: the components.
        name: the teacher's name, for error notes.
        teacher: the teacher's geometry.
        student: the student's geometry.
        layers: student layers that some loss looks at, counted from 0.
        parts: what some loss compares.
    """

    def __init__(
        self,
        spec: AlignSpec,
        *,
        name: str,
        teacher: Geometry,
        student: Geometry,
        layers: tuple[int, ...],
        parts: tuple[Part, ...],
    ) -> None:
        super().__init__()
        self.name = name
        self.lifts = spec.direction == "to_teacher"
        self._spec = spec
        with self._blame("layer_mapper"):
            mapper = spec.layer_mapper.build(teacher=teacher, student=student)
            self.layer_map = LayerMap(
                mapper, teacher=teacher, student=student, layers=layers, combine=spec.layers
            )
        extents = {"layer": len(layers)} | ({} if "queries" in parts else {"qhead": 0})
        student, self.teacher = student.with_(**extents), teacher.with_(**extents)
        self.time_plan = TimePlan(spec, name=name, teacher=self.teacher, student=student)
        if self.evictor is not None:
            assert_evicts(self.layer_map, parts, warper=spec.time_warper.name)
        teacher = self.teacher.with_(dim=teacher.dim * self.layer_map.joined)
        self.moved, fixed = (student, teacher) if self.lifts else (teacher, student)
        with self._blame("head_adapter"):
            self.head_adapter = spec.head_adapter.build(teacher=self.moved, student=fixed)
            self.adapted: Geometry = self.head_adapter.teacher_view
            self.fixed: Geometry = self.head_adapter.student_view
        with self._blame("dim_projector"):
            self.dim_projector = spec.dim_projector.build(teacher=self.adapted, student=self.fixed)
        keeps_width = getattr(self.dim_projector, "keeps_width", False)
        self.projected = self.fixed.with_(dim=self.adapted.dim) if keeps_width else self.fixed
        self.freedom = self._freedom()

    @property
    def target(self) -> Geometry:
        """Extents of the teacher's side where the losses compare."""
        return self.fixed if self.lifts else self.projected

    @property
    def view(self) -> Geometry:
        """Extents of the student's side where the losses compare."""
        return self.projected if self.lifts else self.fixed

    def _blame(self, kind: str) -> AbstractContextManager[None]:
        config = getattr(self._spec, kind)
        return attribute_errors_to(f"{kind} {config.name!r}, teacher {self.name!r}", config)

    def _freedom(self) -> Commuting:
        folds = (self.adapted.dim, self.adapted.layer) != (self.moved.dim, self.moved.layer)
        return Commuting(
            linear_heads=getattr(self.head_adapter, "linear", False),
            linear_width=getattr(self.dim_projector, "linear", False),
            shared_width=getattr(self.dim_projector, "shared_width", False) and not folds,
        )

    @property
    def sources(self) -> tuple[int, ...]:
        """Teacher layers to capture, counted from 0."""
        return self.layer_map.sources

    @property
    def wants_calibration(self) -> bool:
        """Whether the projector wants to see data before training."""
        return isinstance(self.dim_projector, Calibrated)

    @property
    def evictor(self) -> Evictor | None:
        """What chooses the teacher's tokens, if any: its cache then comes with slots in place of time."""
        return self.time_plan.evictor

    def plan(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The time map of a batch."""
        return self.time_plan(teacher, student)

    def order(self, part: Part, t_time: int, time_map: TimeMap) -> tuple[Stage, ...]:
        """The cheapest order of stages for these lengths."""
        time = time_map.valid.shape[1]
        return self._cheapest(part, t_time, time, taps=0 if time_map.identity else time_map.taps)

    def _cheapest(self, part: Part, t_time: int, time: int, *, taps: int) -> tuple[Stage, ...]:
        extents = StageExtents(
            t_head=self.moved.heads(part),
            head=self.adapted.heads(part),
            t_time=t_time,
            time=time,
            t_dim=self.adapted.dim,
            dim=self.projected.dim,
            taps=taps,
        )
        return cheapest_order(extents, self.freedom)

    def _warp(self, x: Tensor, time_map: TimeMap) -> Tensor:
        with self._blame("time_warper"):
            return warp_time(time_map, x, time=time_map.valid.shape[1])

    def _adapt(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        batch, _, _, time, dim = x.shape
        layer, head = self.adapted.layer if row is None else 1, self.adapted.heads(part)
        dim = self.adapted.dim if dim == self.moved.dim else dim
        with self._blame("head_adapter"):
            adapter = component_at_layer(self.head_adapter, row)
            adapted = adapt_heads(adapter, x, part, layer=layer, head=head, dim=dim)
            return require_shape(adapted, (batch, layer, head, time, dim), AXES)

    def _project(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        with self._blame("dim_projector"):
            projector = component_at_layer(self.dim_projector, row)
            projected = project_dim(projector, x, part, dim=self.projected.dim)
            return require_shape(projected, (*x.shape[:4], self.projected.dim), AXES)

    def _fold(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        layer, head, dim = self.fixed.layer if row is None else 1, self.fixed.heads(part), self.fixed.dim
        with self._blame("head_adapter"):
            return fold_heads(self.head_adapter, x, layer=layer, head=head, dim=dim)

    def _stage(
        self, stage: Stage, x: Tensor, part: Part, time_map: TimeMap, row: int | None = None
    ) -> Tensor:
        if stage == "time":
            return self._warp(x, time_map)
        if self.lifts:
            return self._fold(x, part, row)
        return self._adapt(x, part, row) if stage == "heads" else self._project(x, part, row)

    def stages(self, part: Part, t_time: int, time_map: TimeMap) -> tuple[Stage, ...]:
        """What the teacher's cache goes through after its layers."""
        return ("time", "heads") if self.lifts else self.order(part, t_time, time_map)

    def steps(self, cache: Cache, time_map: TimeMap) -> Iterator[tuple[str, Cache]]:
        """Every intermediate cache of the teacher, named by the stages that made it; the last is the target.

        Keys and queries may take different orders, as their head counts differ.
        """
        cache = cache.map(lambda x, _: self.layer_map(x))
        yield "layers", cache
        orders = {part: self.stages(part, x.shape[3], time_map) for part, x in cache.items()}
        for now in zip(*orders.values(), strict=True):
            stage_of = dict(zip(orders, now, strict=True))
            cache = cache.map(lambda x, part: self._stage(stage_of[part], x, part, time_map))  # noqa: B023
            yield "/".join(dict.fromkeys(now)), cache

    def align(self, cache: Cache, time_map: TimeMap) -> Cache:
        """The target: this teacher's cache where the losses compare."""
        *_, (_, target) = self.steps(cache, time_map)
        return target

    def align_layer(self, sources: Cache, time_map: TimeMap, row: int) -> Cache:
        """``align`` for the student layer at ``row`` alone, from the teacher layers it reads (``reads``)."""
        target = {}
        for part, x in sources.items():
            x = self.layer_map.one(x, row)
            for stage in self.stages(part, x.shape[3], time_map):
                x = self._stage(stage, x, part, time_map, row)
            target[part] = x
        return Cache(**target)

    def view_of(self, student: Cache, row: int | None = None) -> Cache:
        """The student's cache where the losses compare; ``row``: it holds only the layer at this place."""
        view = self._lift if self.lifts else self._fold
        return student.map(lambda x, part: view(x, part, row))

    def _lift(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        time = x.shape[3]
        for stage in self._cheapest(part, time, time, taps=0):
            if stage != "time":
                x = self._adapt(x, part, row) if stage == "heads" else self._project(x, part, row)
        return x

    @torch.no_grad()
    def observe(self, teacher: Cache, student: Cache, time_map: TimeMap) -> None:
        """Show one batch to the projector: what it will project, and the other side at these positions."""
        for (part, theirs), (_, own) in zip(teacher.items(), student.items(), strict=True):
            theirs = self.layer_map(theirs)
            if self.lifts:
                x, like = self._adapt(own, part), self._fold(self._warp(theirs, time_map), part)
            else:
                x, like = self._warp(self._adapt(theirs, part), time_map), self._fold(own, part)
            with self._blame("dim_projector"):
                self.dim_projector.observe(x, like, time_map.valid, part)
