"""One teacher's alignment: its four components, and the steps from its cache to the student's axes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.kv.axes import Cache, Geometry
from kava_core.kv.extents import expect
from kava_core.kv.layer_map import LayerMap
from kava_core.kv.order import CANONICAL, Extents, Freedom, Stage, cheapest
from kava_core.kv.stages import adapt_heads, blame, fold_student, plan_time, project_dim, warp_time
from kava_core.kv.timeline import Timeline
from kava_core.kv.timemap import TimeMap
from kava_core.protocols import Calibrated
from kava_core.spec.model import AlignSpec

AXES = "batch layer head time dim"


class TeacherAligner(nn.Module):
    """Brings one teacher's cache to the student's layers, heads, time and width.

    Args:
        spec: the four components.
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
        self._spec = spec
        with self._blame("layer_mapper"):
            mapper = spec.layer_mapper.build(teacher=teacher, student=student)
            self.layer_map = LayerMap(mapper, teacher=teacher, student=student, layers=layers)
        extents = {"layer": len(layers)} | ({} if "queries" in parts else {"qhead": 0})
        student, self.teacher = student.with_(**extents), teacher.with_(**extents)
        with self._blame("head_adapter"):
            self.head_adapter = spec.head_adapter.build(teacher=self.teacher, student=student)
            self.adapted: Geometry = self.head_adapter.teacher_view
            self.view: Geometry = self.head_adapter.student_view
        with self._blame("time_warper"):
            self.time_warper = spec.time_warper.build(teacher=self.teacher, student=student)
        with self._blame("dim_projector"):
            self.dim_projector = spec.dim_projector.build(teacher=self.adapted, student=self.view)
        keeps_width = getattr(self.dim_projector, "keeps_width", False)
        self.target = self.view.with_(dim=self.adapted.dim) if keeps_width else self.view
        self.freedom = self._freedom()

    def _blame(self, kind: str) -> AbstractContextManager[None]:
        config = getattr(self._spec, kind)
        return blame(f"{kind} {config.name!r}, teacher {self.name!r}", config)

    def _freedom(self) -> Freedom:
        folds = self.adapted.dim != self.teacher.dim
        linear_heads = getattr(self.head_adapter, "linear", False)
        return Freedom(
            linear_heads=linear_heads,
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

    def plan(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """The time map of a batch."""
        with self._blame("time_warper"):
            return plan_time(self.time_warper, teacher, student)

    def fold(self, cache: Cache) -> Cache:
        """The student's cache in the view the losses see."""
        with self._blame("head_adapter"):
            return cache.map(
                lambda x, part: fold_student(
                    self.head_adapter, x, head=self.view.heads(part), dim=self.view.dim
                )
            )

    def order(self, part: Part, t_time: int, time_map: TimeMap) -> tuple[Stage, ...]:
        """The cheapest order of stages for these lengths."""
        extents = Extents(
            t_head=self.teacher.heads(part),
            head=self.adapted.heads(part),
            t_time=t_time,
            time=time_map.valid.shape[1],
            t_dim=self.adapted.dim,
            dim=self.target.dim,
            taps=0 if time_map.identity else time_map.index.shape[-1],
        )
        return cheapest(extents, self.freedom)

    def _stage(self, stage: Stage, x: Tensor, part: Part, time_map: TimeMap) -> Tensor:
        batch, layer, head, time, dim = x.shape
        if stage == "time":
            with self._blame("time_warper"):
                return warp_time(time_map, x, time=time_map.valid.shape[1])
        if stage == "heads":
            head = self.adapted.heads(part)
            dim = self.adapted.dim if dim == self.teacher.dim else dim
            with self._blame("head_adapter"):
                adapted = adapt_heads(self.head_adapter, x, part, head=head, dim=dim)
                return expect(adapted, (batch, layer, head, time, dim), AXES)
        with self._blame("dim_projector"):
            projected = project_dim(self.dim_projector, x, part, dim=self.target.dim)
            return expect(projected, (batch, layer, head, time, self.target.dim), AXES)

    def steps(self, cache: Cache, time_map: TimeMap) -> Iterator[tuple[str, Cache]]:
        """Every intermediate cache, named by the stages that made it; the last is the target.

        Keys and queries may take different orders, as their head counts differ.
        """
        cache = cache.map(lambda x, _: self.layer_map(x))
        yield "layers", cache
        orders = {part: self.order(part, x.shape[3], time_map) for part, x in cache.items()}
        for step in range(len(CANONICAL)):
            now = {part: order[step] for part, order in orders.items()}
            cache = cache.map(lambda x, part: self._stage(now[part], x, part, time_map))  # noqa: B023
            yield "/".join(dict.fromkeys(now.values())), cache

    def align(self, cache: Cache, time_map: TimeMap) -> Cache:
        """The target: this teacher's cache on the student's axes (as the adapter's view has them)."""
        *_, (_, target) = self.steps(cache, time_map)
        return target

    @torch.no_grad()
    def observe(self, cache: Cache, time_map: TimeMap) -> None:
        """Show one batch to the projector, with layers, heads and time aligned."""
        cache = cache.map(lambda x, _: self.layer_map(x))
        for stage in CANONICAL[:2]:
            cache = cache.map(lambda x, part: self._stage(stage, x, part, time_map))  # noqa: B023
        for part, x in cache.items():
            self.dim_projector.observe(x, time_map.valid, part)
