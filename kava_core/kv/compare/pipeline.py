"""From the caches of student and teachers to the terms of the loss: align, fuse, compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from kava_core import shapecheck
from kava_core.config import KVLossConfig, Part
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.boundaries import attribute_errors_to, require_shape, summed_loss, teacher_weights
from kava_core.kv.align.finite import assert_finite, part_at_least_float32
from kava_core.kv.align.per_layer import component_at_layer
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.compare.values import (
    NO_FUSER_INPUTS,
    ROUTER,
    Aligned,
    FuserInputs,
    fuse_caches,
    rotate_target,
    rows_of_loss,
    select_layers,
)
from kava_core.kv.compare.weights import schedule_factor
from kava_core.protocols.axes import Cache, Geometry
from kava_core.protocols.fuser import Chooses, FusionContext, Regularised
from kava_core.protocols.kv_loss import ObservesCaches
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline
from kava_core.specfile.questions import active_losses, compared_layers, compared_parts, layers_of_loss
from kava_core.specfile.sections.pipeline import PipelineSpec


class KVPipeline(nn.Module):
    """Every trainable and calibrated part of the distillation beside the student.

    Args:
        spec: the pipeline's spec.
        teachers: geometry of every teacher, in the spec's order.
        student: the student's geometry.

    Raises:
        SpecError: the components do not fit together (say, a fused target from different views).
    """

    weights: Tensor

    def __init__(self, spec: PipelineSpec, *, teachers: Mapping[str, Geometry], student: Geometry) -> None:
        super().__init__()
        self.layers = compared_layers(spec, student.layer)
        self.separate = spec.target == "separate"
        self.names, self.parts, self.hidden = tuple(teachers), compared_parts(spec), student.hidden
        self.aligners = nn.ModuleList(
            TeacherAligner(
                teacher.align,
                name=name,
                teacher=geometry,
                student=student,
                layers=self.layers,
                parts=compared_parts(spec),
            )
            for teacher, (name, geometry) in zip(spec.teachers, teachers.items(), strict=True)
        )
        self.configs = active_losses(spec)
        self.terms = _unique_names([config.name for config in self.configs])
        self.matches = spec.rotary == "match"
        self._check_calibration(compared_parts(spec))
        self._check_views()
        self._check_widths()
        self._check_rotary(student)
        self.fuser_config = spec.fuser
        view = self.teachers[0].view.with_(hidden=student.hidden)
        self.fuser = spec.fuser.build(teachers=self.names, student=view)
        self._always: tuple[bool, ...] | None = None
        self._ran: tuple[bool, ...] = (True,) * len(self.names)
        rows = self.rows = [self._compared_rows(config, student) for config in self.configs]
        self.losses = nn.ModuleList(
            nn.ModuleList(self._loss(config, a, len(r)) for config, r in zip(self.configs, rows, strict=True))
            for a in self._compared
        )
        self._check_observing()
        self.progress = 0.0
        first = [config.weight for config in self.configs]
        self.register_buffer("weights", torch.tensor(first, dtype=torch.float64))
        for index, row in enumerate(rows):
            self.register_buffer(f"rows_{index}", torch.tensor(row), persistent=False)

    @property
    def teachers(self) -> list[TeacherAligner]:
        """The aligners, in the spec's order."""
        return [aligner for aligner in self.aligners if isinstance(aligner, TeacherAligner)]

    @property
    def _compared(self) -> list[TeacherAligner]:
        """Whose geometry a loss meets: every aligner's where separate, else the first's."""
        return self.teachers if self.separate else self.teachers[:1]

    def _loss(self, config: KVLossConfig, aligner: TeacherAligner, layer: int) -> nn.Module:
        with attribute_errors_to(f"kv_loss {config.name!r}", config):
            return config.build(
                teacher=aligner.target.with_(layer=layer), student=aligner.view.with_(layer=layer)
            )

    def _compared_rows(self, config: KVLossConfig, student: Geometry) -> list[int]:
        """Places, among the compared layers, of those the loss looks at."""
        wanted = layers_of_loss(config, student.layer)
        if self.teachers[0].view.layer == len(self.layers):
            return [self.layers.index(layer) for layer in wanted]
        if len(wanted) < len(self.layers):
            raise SpecError(
                f"loss {config.name!r} looks at layers {wanted}, but the head adapter merges layers "
                f"{list(self.layers)} into one: all losses must look at the same layers"
            )
        return list(range(self.teachers[0].view.layer))

    def _check_views(self) -> None:
        views = {(aligner.target, aligner.view) for aligner in self.teachers}
        found = "; ".join(f"{a.name}: {a.target}" for a in self.teachers)
        if not self.separate and len(views) > 1:
            raise SpecError(
                f"target: fused needs one head adapter view and one width for all teachers, not {found}; "
                "use the same head_adapter and a dim_projector, or target: separate"
            )
        if len({aligner.view.layer for aligner in self.teachers}) > 1:
            raise SpecError(f"all teachers must have their layers merged, or none: {found}")

    def _check_rotary(self, student: Geometry) -> None:
        """A target can be rotated as the student's keys are only where it has the student's heads."""
        for aligner in self.teachers:
            own = student.with_(layer=len(self.layers), qhead=aligner.target.qhead)
            if self.matches and aligner.target != own:
                raise SpecError(
                    f"rotary: match: teacher {aligner.name!r} is compared at {aligner.target}, not the "
                    f"student's {own}; use head_adapter structured, direction: to_student and a projector, "
                    "or rotary: strip"
                )

    def _check_observing(self) -> None:
        """What a loss learns of unrotated keys does not hold for keys that are rotated again."""
        for row in self._loss_rows if self.matches else ():
            for loss, config in zip(row, self.configs, strict=True):
                if isinstance(loss, ObservesCaches) and set(config.parts) != {"values"}:
                    raise SpecError(
                        f"loss {config.name!r} looks at unrotated caches before training: with rotary: match "
                        "it can compare values alone; use rotary: strip"
                    )

    def _check_calibration(self, parts: tuple[Part, ...]) -> None:
        """Where queries are projected by the keys' calibration, keys must be compared as well."""
        borrowed = any(getattr(a.dim_projector, "queries_from_keys", False) for a in self.teachers)
        if "queries" in parts and "keys" not in parts and borrowed:
            raise SpecError(
                f"losses compare {', '.join(parts)}: a calibrated projector needs keys as well; "
                "add keys to 'parts', or use dim_projector linear"
            )

    def _check_widths(self) -> None:
        for aligner in self.teachers:
            same = (aligner.target.head, aligner.target.dim) == (aligner.view.head, aligner.view.dim)
            strict = [config.name for config in self.configs if not config.basis_free]
            if not same and strict:
                raise SpecError(
                    f"teacher {aligner.name!r}: aligned to {aligner.target} but the student has "
                    f"{aligner.view}; loss {strict[0]!r} compares equal widths: use dim_projector "
                    "calibrated, linear or elastic"
                )

    def align(self, aligner: TeacherAligner, cache: Cache, teacher: Timeline, student: Timeline) -> Aligned:
        """One teacher's target and validity; its raw cache is not needed afterwards."""
        return self.warped(aligner, cache, aligner.plan(teacher, student))

    def warped(self, aligner: TeacherAligner, cache: Cache, time_map: TimeMap) -> Aligned:
        """``align`` with the time map already planned."""
        return Aligned(aligner.align(cache.map(part_at_least_float32), time_map), time_map.valid)

    def forward(
        self,
        student: Cache,
        caches: Sequence[Cache],
        timeline: Timeline,
        teachers: Sequence[Timeline],
        items: Tensor,
        rotation: Rotation | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms, by name.

        Args:
            student: the student's cache of the looked-at layers.
            caches: every teacher's cache of the layers its aligner reads (``sources``).
            timeline: the student's positions.
            teachers: every teacher's positions.
            items: number of the student's real tokens in the whole batch, over accumulation and processes.
            rotation: with ``rotary: match``, the student's own rotation in this forward pass.

        A term is the sum over positions with a target of the mean loss over layers, divided by ``items``.
        """
        sides = zip(self.teachers, caches, teachers, strict=True)
        aligned = [self.align(aligner, cache, theirs, timeline) for aligner, cache, theirs in sides]
        return self.terms_of(student, aligned, timeline, items, rotation)

    def terms_of(
        self,
        student: Cache,
        aligned: list[Aligned],
        timeline: Timeline,
        items: Tensor,
        rotation: Rotation | None = None,
        beside: FuserInputs = NO_FUSER_INPUTS,
    ) -> dict[str, Float[Tensor, ""]]:
        """``forward`` for targets that are aligned already."""
        student = student.map(part_at_least_float32)
        if self.matches and rotation is not None:
            aligned = [replace(one, target=rotate_target(one.target, rotation)) for one in aligned]
        if shapecheck.wanted():
            self._check_values(student, timeline, aligned)
        return self.compare(student, aligned, items, beside)

    def compare(
        self, student: Cache, aligned: list[Aligned], items: Tensor, beside: FuserInputs = NO_FUSER_INPUTS
    ) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms of the student's cache against aligned targets.

        With several teachers also ``weight/NAME``, each teacher's mean weight, and with a fuser that adds to
        the loss ``router``.
        """
        views = [aligner.view_of(student) for aligner in self.teachers]
        weights, own = self.routed(views[0], aligned, items, beside)
        return self._terms(views, aligned, weights) | own

    def routed(
        self, view: Cache, aligned: list[Aligned], items: Tensor, beside: FuserInputs = NO_FUSER_INPUTS
    ) -> tuple[Float[Tensor, "teacher batch layer time"], dict[str, Float[Tensor, ""]]]:
        """The fuser's weights, divided by ``items``, and the terms it adds, as for ``compare``."""
        context = self.context(view, aligned, beside)
        with self._blame_fuser():
            weights = teacher_weights(self.fuser, context, context.valid, layer=view.any.shape[1])
            terms = (
                {ROUTER: self.fuser.penalty(weights) / items} if isinstance(self.fuser, Regularised) else {}
            )
        if len(self.names) > 1:
            terms |= self._shares(weights.detach().mean(2).sum(2) / items, beside.tasks)
        return weights / items, terms

    def of_layer(
        self, teacher: int, row: int, view: Cache, target: Cache, weight: Float[Tensor, "batch 1 time"]
    ) -> Iterator[tuple[int, Float[Tensor, ""]]]:
        """The share that the compared layer at ``row`` has in every loss that looks at it, with its place."""
        losses = self.losses[teacher]
        for index, (config, rows) in enumerate(zip(self.configs, self.rows, strict=True)):
            if row not in rows:
                continue
            with attribute_errors_to(f"kv_loss {config.name!r}", config):
                loss = component_at_layer(losses[index], rows.index(row))
                one = summed_loss(
                    loss, view.pick(config.parts), target.pick(config.parts), weight / len(rows)
                )
                yield index, require_shape(one, (), "")

    def _shares(
        self, weights: Float[Tensor, "teacher batch"], tasks: tuple[str, ...] | None
    ) -> dict[str, Float[Tensor, ""]]:
        """Each teacher's weight; in evaluation of each task apart as well."""
        found = {f"weight/{name}": weights[k].sum() for k, name in enumerate(self.names)}
        if self.training or tasks is None:
            return found
        rows = {task: [i for i, other in enumerate(tasks) if other == task] for task in tasks}
        apart = {
            f"weight/{name}@{task}": weights[k, mine].sum()
            for k, name in enumerate(self.names)
            for task, mine in rows.items()
        }
        return found | (apart if len(rows) > 1 else {})

    def weighed(
        self, student: Cache, aligned: list[Aligned], weights: Float[Tensor, "teacher batch time"]
    ) -> dict[str, Float[Tensor, ""]]:
        """The unweighted loss terms with given weights of the teachers, without the fuser."""
        views = [aligner.view_of(student) for aligner in self.teachers]
        layers = views[0].any.shape[1]
        return self._terms(views, aligned, weights[:, :, None].expand(-1, -1, layers, -1))

    def context(self, view: Cache, aligned: list[Aligned], beside: FuserInputs) -> FusionContext:
        """What the fuser may look at."""
        hidden = beside.hidden
        if hidden is None and view.any.is_meta:
            hidden = view.any.new_empty(view.any.shape[0], view.any.shape[3], self.hidden)
        return FusionContext(
            valid=torch.stack([one.valid for one in aligned]),
            targets=tuple(one.target for one in aligned),
            student=view,
            hidden=hidden,
            tasks=beside.tasks,
        )

    @torch.no_grad()
    def choose(self) -> tuple[bool, ...]:
        """Which teachers are to run in this forward pass."""
        if isinstance(self.fuser, Chooses) and (self.draws or self._always is None):
            with self._blame_fuser():
                self._ran = self._always = tuple(self.fuser.choose().tolist())
        return self._ran

    @property
    def observing_losses(self) -> list[ObservesCaches]:
        """The losses that want to see data before training."""
        return [loss for row in self._loss_rows for loss in row if isinstance(loss, ObservesCaches)]

    @property
    def _loss_rows(self) -> list[list[nn.Module]]:
        """For every compared teacher its losses, in the order of ``configs``."""
        return [list(row) for row in self.losses if isinstance(row, nn.ModuleList)]

    @torch.no_grad()
    def show_losses(self, student: Cache, aligned: list[Aligned]) -> None:
        """Show one batch to the losses that want to see data.

        Where targets are fused, they are fused evenly over the teachers that run.
        """
        views = [aligner.view_of(student) for aligner in self.teachers]
        targets, valid = [one.target for one in aligned], [one.valid for one in aligned]
        if not self.separate:
            runs = (True,) * len(aligned) if self.draws else self.choose()
            where = torch.stack(valid) & torch.tensor(runs, device=valid[0].device)[:, None, None]
            even = where.to(views[0].any.dtype)[:, :, None].expand(-1, -1, views[0].any.shape[1], -1)
            targets, valid = [fuse_caches(targets, even)], [where.any(0)]
        for row, view, target, where in zip(self._loss_rows, views, targets, valid, strict=False):
            for index, (loss, config) in enumerate(zip(row, self.configs, strict=True)):
                if isinstance(loss, ObservesCaches):
                    rows = getattr(self, f"rows_{index}")
                    mine, theirs = (select_layers(side, rows, config.parts) for side in (view, target))
                    with attribute_errors_to(f"kv_loss {config.name!r}", config):
                        loss.observe(mine, theirs, where)

    @property
    def trains_aligners(self) -> bool:
        """Whether something between a teacher's cache and the losses is trained."""
        return any(p.requires_grad for aligner in self.teachers for p in aligner.parameters())

    @property
    def trains_yardstick(self) -> bool:
        """Whether an aligner or a loss can be trained to look better without the student."""
        return self.trains_aligners or any(p.requires_grad for p in self.losses.parameters())

    @property
    def draws(self) -> bool:
        """Whether the fuser chooses other teachers in every forward pass."""
        return isinstance(self.fuser, Chooses) and getattr(self.fuser, "draws", True)

    def idle(self) -> Tensor | float:
        """0, attached to what is trained for teachers that do not run: others wait for all gradients."""
        away = [place for place, runs in enumerate(self._ran) if not runs]
        modules = [m for place in away for m in (self.aligners[place], *self._losses_of(place))]
        trained = [p for module in modules for p in module.parameters() if p.requires_grad]
        return torch.stack([0 * p.sum() for p in trained]).sum() if trained else 0.0

    def _losses_of(self, place: int) -> list[nn.Module]:
        return [self.losses[place]] if self.separate else []

    def absent(self, aligner: TeacherAligner, like: Tensor) -> Aligned:
        """The target of a teacher that does not run: zeros, nowhere valid. ``like``: Bool ``batch time``."""
        zero = torch.zeros((), device=like.device)
        batch, time = like.shape
        layer, dim = aligner.target.layer, aligner.target.dim
        shapes = {part: (batch, layer, aligner.target.heads(part), time, dim) for part in self.parts}
        target = Cache(**{part: zero.expand(shape) for part, shape in shapes.items()})
        return Aligned(target, torch.zeros_like(like), ran=False)

    def _blame_fuser(self) -> AbstractContextManager[None]:
        return attribute_errors_to(f"fuser {self.fuser_config.name!r}", self.fuser_config)

    def _terms(
        self, views: list[Cache], aligned: list[Aligned], weights: Float[Tensor, "teacher batch layer time"]
    ) -> dict[str, Tensor]:
        targets, losses = [one.target for one in aligned], list(self.losses)
        if not self.separate:
            targets, weights = [fuse_caches(targets, weights)], weights.sum(0, keepdim=True)
        elif any(one.ran for one in aligned):
            ran = [place for place, one in enumerate(aligned) if one.ran]
            views, targets = ([each[i] for i in ran] for each in (views, targets))
            losses = [losses[i] for i in ran]
            weights = weights[ran] if len(ran) < len(aligned) else weights
        terms = {}
        for index, (name, config) in enumerate(zip(self.terms, self.configs, strict=True)):
            rows = getattr(self, f"rows_{index}")
            with attribute_errors_to(f"kv_loss {config.name!r}", config):
                terms[name] = torch.stack(
                    [
                        require_shape(
                            summed_loss(one[index], *rows_of_loss(view, target, weight, rows, config.parts)),
                            (),
                            "",
                        )
                        for one, view, target, weight in zip(losses, views, targets, weights, strict=False)
                    ]
                ).sum()
        return terms

    def total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Σ λ · term, and what the fuser adds."""
        weights = zip(self.terms, self.present_weights(), strict=True)
        weighed = [weight.to(terms[name].dtype) * terms[name] for name, weight in weights]
        return torch.stack(weighed + ([terms[ROUTER]] if ROUTER in terms else [])).sum()

    def present_weights(self) -> Float[Tensor, " _"]:
        """λ of every term at this point of the run (``progress``, from 0 to 1)."""
        factors = [schedule_factor(config, self.progress) for config in self.configs]
        if all(factor == 1.0 for factor in factors):
            return self.weights
        # One by one: a tensor of the factors would have to be sent to the device.
        return torch.stack([w * f for w, f in zip(self.weights.unbind(), factors, strict=True)])

    def _check_values(self, student: Cache, timeline: Timeline, aligned: list[Aligned]) -> None:
        assert_finite(student, timeline.mask, "the student's cache")
        for aligner, one in zip(self.teachers, aligned, strict=True):
            assert_finite(one.target, one.valid, f"the aligned cache of teacher {aligner.name!r}")


def _unique_names(names: list[str]) -> list[str]:
    """``relation, relation`` → ``relation, relation_2``."""
    counts: dict[str, int] = {}
    unique = []
    for name in names:
        counts[name] = counts.get(name, 0) + 1
        unique.append(name if counts[name] == 1 else f"{name}_{counts[name]}")
    return unique
