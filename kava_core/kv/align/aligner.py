"""Align one teacher: bring both caches to where they are compared."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core.config import Part
from kava_core.errors import NonFiniteError
from kava_core.kv.align.boundaries import (
    adapt_heads,
    finish_component,
    fold_heads,
    project_dim,
    show_component,
    warp_time,
)
from kava_core.kv.align.components import AlignmentComponents
from kava_core.kv.align.finite import assert_finite, has_numbers_at_hand, raise_if
from kava_core.kv.align.per_layer import component_at_layer
from kava_core.kv.align.stage_order import Commuting, Stage, StageExtents, cheapest_order
from kava_core.kv.maths.sinks import leave_out, sinks_of
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.dim_projector import Calibrated
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.time_warper import Evictor
from kava_core.protocols.timeline import Timeline

KIND_OF_STAGE: dict[Stage, str] = {
    "heads": "head_adapter",
    "time": "time_warper",
    "width": "dim_projector",
}
"""The kind of component that does a stage."""


class TeacherAligner(nn.Module):
    """Brings one teacher's cache and the student's to the same layers, heads, time and width.

    Layers and time are always the student's. Heads and width are the student's, or, if the student is lifted,
    the teacher's: the same two components then map the student's cache.

    Args:
        components: one for every axis, built by ``kava_core.build.aligner``.
        teacher: the teacher's geometry, with the compared layers as ``layer``.
        student: the student's geometry, likewise.
        lifts_student: whether the student's cache is mapped to the teacher's heads and width
            (``direction: to_teacher``).
    """

    def __init__(
        self,
        components: AlignmentComponents,
        *,
        teacher: Geometry,
        student: Geometry,
        lifts_student: bool = False,
    ) -> None:
        super().__init__()
        self.name = components.teacher
        self.lifts = lifts_student
        self.teacher, self.student = teacher, student
        self.layer_map = components.layer_map
        self.time_plan = components.time_plan
        self.head_adapter: Any = components.head_adapter
        self.dim_projector: Any = components.dim_projector
        self._errors_of = components.errors_of
        joined_teacher = teacher.with_(dim=teacher.dim * self.layer_map.joined)
        self.moved = student if lifts_student else joined_teacher
        """Extents of the side that head adapter and projector map, before they do."""
        self.adapted: Geometry = components.teacher_view
        self.fixed: Geometry = components.student_view
        keeps_width = getattr(self.dim_projector, "keeps_width", False)
        self.projected = self.fixed.with_(dim=self.adapted.dim) if keeps_width else self.fixed
        self.commuting = self._what_commutes()

    @property
    def target(self) -> Geometry:
        """Return the extents of the teacher's cache where the losses compare."""
        return (self.fixed if self.lifts else self.projected).attending_like(self.teacher)

    @property
    def view(self) -> Geometry:
        """Return the extents of the student's cache where the losses compare."""
        return (self.projected if self.lifts else self.fixed).attending_like(self.student)

    def _what_commutes(self) -> Commuting:
        # A view that folds heads or layers into the width has no width "of every head" to project.
        folds = (self.adapted.dim, self.adapted.layer) != (self.moved.dim, self.moved.layer)
        return Commuting(
            linear_heads=getattr(self.head_adapter, "linear", False),
            linear_width=getattr(self.dim_projector, "linear", False),
            shared_width=getattr(self.dim_projector, "shared_width", False) and not folds,
        )

    @property
    def sources(self) -> tuple[int, ...]:
        """Return the teacher's layers to capture: attention layers, counted from 0, in ascending order."""
        return self.layer_map.sources

    @property
    def wants_calibration(self) -> bool:
        """Return whether the projector must see data before training."""
        return isinstance(self.dim_projector, Calibrated)

    @property
    def evictor(self) -> Evictor | None:
        """Return the component that chooses which of the teacher's tokens are kept; None if there is none.

        With one the captured cache has ``slot`` in place of ``t_time``.
        """
        return self.time_plan.evictor

    @property
    def finds_sinks(self) -> bool:
        """Return whether attention sinks behind the first token are looked for in captured values."""
        return self.time_plan.finds_sinks

    def plan(self, teacher: Timeline, student: Timeline) -> TimeMap:
        """Plan the time map of a batch.

        Args:
            teacher: the teacher's positions.
            student: the student's positions.
        """
        planned: TimeMap = self.time_plan(teacher, student)
        return planned

    def without_sinks(
        self,
        time_map: TimeMap,
        cache: Cache,
        mask: Bool[Tensor, "batch t_time"],
        student_sinks: Bool[Tensor, "batch time"] | None = None,
    ) -> TimeMap:
        """Return the map without attention sinks, if they are left out.

        Args:
            time_map: of the batch.
            cache: the teacher's; positions that read its sinks are left out.
            mask: which of the teacher's positions hold a token.
            student_sinks: which of the student's positions are sinks; None: none.
        """
        if not self.finds_sinks:
            return time_map
        return leave_out(time_map, sinks_of(cache, mask), student_sinks)

    # one stage

    def _warp(self, x: Tensor, time_map: TimeMap) -> Tensor:
        with self._errors_of("time_warper"):
            return warp_time(time_map, x, time=time_map.valid.shape[1])

    def _adapt(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        dim = x.shape[4]
        layer = self.adapted.layer if row is None else 1
        head = self.adapted.heads(part)
        # The width may have been projected before.
        dim = self.adapted.dim if dim == self.moved.dim else dim
        with self._errors_of("head_adapter"):
            adapter = component_at_layer(self.head_adapter, row)
            return adapt_heads(adapter, x, part, layer=layer, head=head, dim=dim)

    def _project(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        with self._errors_of("dim_projector"):
            projector = component_at_layer(self.dim_projector, row)
            scaled = self._before_width(x, part)
            return project_dim(projector, scaled, part, dim=self.projected.dim)

    def _before_width(self, x: Tensor, part: Part) -> Tensor:
        """Return what the projector is given: queries keep the scale of their model's attention.

        Losses divide a product by √dim of the width that they see.
        """
        if part != "queries" or self.projected.dim == self.adapted.dim:
            return x
        return x * (self.projected.dim / self.adapted.dim) ** 0.5

    def _fold(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        layer = self.fixed.layer if row is None else 1
        with self._errors_of("head_adapter"):
            return fold_heads(
                self.head_adapter, x, layer=layer, head=self.fixed.heads(part), dim=self.fixed.dim
            )

    def apply_stage(
        self, stage: Stage, x: Tensor, part: Part, time_map: TimeMap, row: int | None = None
    ) -> Tensor:
        """Return one part of the teacher's cache after one stage.

        Args:
            stage: which axis it changes.
            x: keys, values or queries, ``batch layer head time dim`` before the stage.
            part: which of the three they are.
            time_map: of the batch.
            row: if ``x`` holds a single compared layer, that layer's index among the compared ones; None:
                all.
        """
        if stage == "time":
            return self._warp(x, time_map)
        if self.lifts:
            return self._fold(x, part, row)
        return self._adapt(x, part, row) if stage == "heads" else self._project(x, part, row)

    # the order of stages

    def order(self, part: Part, t_time: int, time_map: TimeMap) -> tuple[Stage, ...]:
        """Choose the order of stages with the fewest multiplications for these lengths.

        Args:
            part: keys, values or queries.
            t_time: the teacher's number of positions.
            time_map: of the batch; it has the student's number of positions.
        """
        time = time_map.valid.shape[1]
        taps = 0 if time_map.identity else time_map.taps
        return self._cheapest_order(part, t_time, time, taps=taps)

    def _cheapest_order(self, part: Part, t_time: int, time: int, *, taps: int) -> tuple[Stage, ...]:
        extents = StageExtents(
            t_head=self.moved.heads(part),
            head=self.adapted.heads(part),
            t_time=t_time,
            time=time,
            t_dim=self.adapted.dim,
            dim=self.projected.dim,
            taps=taps,
        )
        return cheapest_order(extents, self.commuting)

    def stages(self, part: Part, t_time: int, time_map: TimeMap) -> tuple[Stage, ...]:
        """Return the stages that the teacher's cache goes through after its layers are mapped, in order.

        If the student is lifted, its own heads and width are mapped, and the teacher's side needs two stages
        only.
        """
        return ("time", "heads") if self.lifts else self.order(part, t_time, time_map)

    # the teacher's side

    def steps(self, cache: Cache, time_map: TimeMap) -> Iterator[tuple[str, Cache]]:
        """Yield every intermediate cache of the teacher with the name of its stage; the last is the target.

        Keys and queries may take different orders, as their head counts differ: a name is then, for example,
        ``heads/time``.

        Args:
            cache: the layers in ``sources``, each part ``batch t_layer t_head t_time t_dim``.
            time_map: of the batch.
        """
        with self._errors_of("layer_mapper"):
            cache = cache.map(lambda x, _: self.layer_map(x))
        yield "layers", cache
        orders = {part: self.stages(part, x.shape[3], time_map) for part, x in cache.items()}
        for stages_now in zip(*orders.values(), strict=True):
            stage_of_part = dict(zip(orders, stages_now, strict=True))
            cache = cache.map(
                lambda x, part: self.apply_stage(stage_of_part[part], x, part, time_map)  # noqa: B023
            )
            yield "/".join(dict.fromkeys(stages_now)), cache

    def align(self, cache: Cache, time_map: TimeMap) -> Cache:
        """Return the target: this teacher's cache where the losses compare.

        Args:
            cache: the layers in ``sources``, each part ``batch t_layer t_head t_time t_dim``.
            time_map: of the batch.

        Raises:
            NonFiniteError: the target holds NaN or infinity at a valid position.
        """
        target = self.unchecked_target(cache, time_map)
        self._check_target(target, cache, time_map)
        return target

    def unchecked_target(self, cache: Cache, time_map: TimeMap) -> Cache:
        """Return what ``align`` returns, NaN and infinity included, for a report of where they are."""
        *_, (_, target) = self.steps(cache, time_map)
        return target

    def align_layer(self, sources: Cache, time_map: TimeMap, row: int) -> Cache:
        """Return the target of a single student layer.

        Args:
            sources: the teacher layers that this student layer reads (``layer_map.reads[row]``), in that
                order.
            time_map: of the batch.
            row: the student layer's index among the compared ones.
        """
        target = {}
        for part, x in sources.items():
            *_, (_, target[part]) = self._kinds_and_results(x, part, time_map, row)
        self._check_target(Cache(**target), sources, time_map, row)
        return Cache(**target)

    def _kinds_and_results(
        self, x: Tensor, part: Part, time_map: TimeMap, row: int | None
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield what every component makes of one part, in order, with the component's kind."""
        with self._errors_of("layer_mapper"):
            x = self.layer_map(x) if row is None else self.layer_map.mix_row(x, row)
        yield "layer_mapper", x
        for stage in self.stages(part, x.shape[3], time_map):
            x = self.apply_stage(stage, x, part, time_map, row)
            yield KIND_OF_STAGE[stage], x

    # values

    def _check_target(self, target: Cache, cache: Cache, time_map: TimeMap, row: int | None = None) -> None:
        """Refuse a target that holds NaN or infinity, and name the component that made the first of them.

        On a GPU, where this is told late, the teacher and the layers are named.
        """
        where = f"the aligned cache of teacher {self.name!r}"
        try:
            assert_finite(target, time_map.valid, where, first_layer=row or 0)
        except NonFiniteError:
            self._name_source_of_non_finite(cache, time_map, row)
            raise

    @torch.no_grad()
    def _name_source_of_non_finite(self, cache: Cache, time_map: TimeMap, row: int | None) -> None:
        for part, given in cache.items():
            for kind, made in self._kinds_and_results(given, part, time_map, row):
                if bool(torch.isfinite(given).all()) and not bool(torch.isfinite(made).all()):
                    with self._errors_of(kind):
                        layers = [row] if row is not None else _layers_with_non_finite(made)
                        raise NonFiniteError(f"returned NaN or infinity for finite {part}, layers {layers}")
                given = made

    # the student's side

    def view_of(self, student: Cache, row: int | None = None) -> Cache:
        """Return the student's cache where the losses compare.

        Args:
            student: the student's cache of the compared layers, each part ``batch layer head time dim``.
            row: if the cache holds a single compared layer, that layer's index among the compared ones; None:
                all.
        """
        to_view = self._lift if self.lifts else self._fold
        return student.map(lambda x, part: self._finite_view(to_view(x, part, row), x))

    def _finite_view(self, view: Tensor, own: Tensor) -> Tensor:
        """Return a view of the student's cache; NaN or infinity in it must have been there before."""
        if view is own or view.is_meta:
            return view
        is_bad = ~torch.isfinite(view.detach().sum())
        if has_numbers_at_hand(view) and not is_bad:
            return view
        is_bad = is_bad & torch.isfinite(own.detach().sum())
        kinds = ["head_adapter", "dim_projector"] if self.lifts else ["head_adapter"]

        def make_error(_: list[int]) -> NonFiniteError:
            return NonFiniteError("returned NaN or infinity for the student's finite cache")

        with ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(self._errors_of(kind))
            raise_if(is_bad[None], make_error)
        return view

    def _lift(self, x: Tensor, part: Part, row: int | None = None) -> Tensor:
        time = x.shape[3]
        for stage in self._cheapest_order(part, time, time, taps=0):
            if stage == "heads":
                x = self._adapt(x, part, row)
            elif stage == "width":
                x = self._project(x, part, row)
        return x

    # calibration

    @torch.no_grad()
    def observe(self, teacher: Cache, student: Cache, time_map: TimeMap) -> None:
        """Show one batch to the projector: the tensors it will project, and the other side's beside them.

        Args:
            teacher: the teacher's cache of the layers in ``sources``.
            student: the student's cache of the compared layers.
            time_map: of the batch; only positions it marks as valid are used.
        """
        for (part, theirs), (_, own) in zip(teacher.items(), student.items(), strict=True):
            with self._errors_of("layer_mapper"):
                theirs = self.layer_map(theirs)
            if self.lifts:
                projected_side = self._adapt(own, part)
                other_side = self._fold(self._warp(theirs, time_map), part)
            else:
                projected_side = self._warp(self._adapt(theirs, part), time_map)
                other_side = self._fold(own, part)
            self._check_shown(projected_side, other_side, time_map.valid, part)
            with self._errors_of("dim_projector"):
                seen = self._before_width(projected_side, part)
                show_component(self.dim_projector, seen, other_side, time_map.valid, part)

    def _check_shown(
        self, projected_side: Tensor, other_side: Tensor, valid: Bool[Tensor, "batch time"], part: Part
    ) -> None:
        """Refuse NaN and infinity, which calibration would spread over everything."""
        teacher_side, own_side = projected_side, other_side
        if self.lifts:
            teacher_side, own_side = other_side, projected_side
        where = f"calibration: the aligned cache of teacher {self.name!r}"
        assert_finite(Cache(**{part: teacher_side}), valid, where)
        assert_finite(Cache(**{part: own_side}), valid, "calibration: the student's cache")

    def finish_calibration(self) -> None:
        """Let the projector compute its projection from everything observed."""
        with self._errors_of("dim_projector"):
            finish_component(self.dim_projector)


def _layers_with_non_finite(x: Float[Tensor, "batch layer head time dim"]) -> list[int]:
    where: list[int] = (
        (~torch.isfinite(x)).any(dim=4).any(dim=3).any(dim=2).any(dim=0).nonzero().flatten().tolist()
    )
    return where
