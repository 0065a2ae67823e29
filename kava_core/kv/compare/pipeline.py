"""Turn the caches of student and teachers into the terms of the loss: align, fuse, compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from kava_core import shapecheck
from kava_core.config import ComponentConfig, KVLossConfig, Part
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.boundaries import (
    attribute_errors_to,
    chosen_teachers,
    finish_component,
    fuser_penalty,
    show_component,
    summed_loss,
    teacher_weights,
)
from kava_core.kv.align.finite import assert_finite, part_at_least_float32
from kava_core.kv.align.per_layer import component_at_layer
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.compare.values import (
    NO_FUSER_INPUTS,
    ROUTER,
    Aligned,
    ComparedLoss,
    FuserInputs,
    fuse_caches,
    inputs_of_loss,
    rotate_target,
    select_layers,
)
from kava_core.kv.compare.weights import schedule_factor
from kava_core.kv.maths.sinks import sinks_of
from kava_core.protocols.axes import Cache
from kava_core.protocols.fuser import Chooses, FusionContext, Regularised
from kava_core.protocols.kv_loss import ObservesCaches
from kava_core.protocols.time_map import TimeMap
from kava_core.protocols.timeline import Timeline


class KVPipeline(nn.Module):
    """Every trainable and calibrated part of the distillation beside the student.

    ``kava_core.build.pipeline`` builds it from a spec and checks that its components fit together.

    Args:
        aligners: one for every teacher.
        fuser: weighs the teachers.
        losses: a list of KV losses for every aligner; with fused targets one list for all.
        compared: what each loss of such a list is, and which layers it looks at.
        fuser_config: the fuser's declaration, for error notes.
        layers: student layers that some loss looks at, counted from 0, ascending.
        parts: what some loss compares.
        separate: compare the student with every teacher; else with the mean of their targets.
        rotates_targets: rotate targets as the student's own keys are (``rotary: match``).
        hidden: width of the student's hidden states.
        student_is_latent: the student's positions are latent tokens, none of them an attention sink.
    """

    weights: Tensor

    def __init__(
        self,
        aligners: Sequence[TeacherAligner],
        fuser: nn.Module,
        losses: Sequence[Sequence[nn.Module]],
        *,
        compared: Sequence[ComparedLoss],
        fuser_config: ComponentConfig,
        layers: tuple[int, ...],
        parts: tuple[Part, ...],
        separate: bool,
        rotates_targets: bool,
        hidden: int,
        student_is_latent: bool = False,
    ) -> None:
        super().__init__()
        self.student_is_latent = student_is_latent
        self.layers, self.parts, self.hidden = layers, parts, hidden
        self.separate, self.rotates_targets = separate, rotates_targets
        self.aligners = nn.ModuleList(aligners)
        self.names = tuple(aligner.name for aligner in aligners)
        self.fuser, self.fuser_config = fuser, fuser_config
        self.losses = nn.ModuleList(nn.ModuleList(of_aligner) for of_aligner in losses)
        self.compared = tuple(compared)
        self.progress = 0.0
        """How far the run is, from 0 to 1; schedules of weights go by it."""
        self._fixed_choice: tuple[bool, ...] | None = None
        self._ran: tuple[bool, ...] = (True,) * len(self.names)
        first_weights = [loss.config.weight for loss in self.compared]
        self.register_buffer("weights", torch.tensor(first_weights, dtype=torch.float64))
        for index, loss in enumerate(self.compared):
            self.register_buffer(f"rows_{index}", torch.tensor(loss.rows), persistent=False)

    @property
    def teachers(self) -> list[TeacherAligner]:
        """Return the aligners, in the spec's order of teachers."""
        return [aligner for aligner in self.aligners if isinstance(aligner, TeacherAligner)]

    @property
    def term_names(self) -> list[str]:
        """Return the names of the KV terms, one for every loss."""
        return [loss.term for loss in self.compared]

    @property
    def configs(self) -> list[KVLossConfig]:
        """Return the declarations of the KV losses, in the order of ``term_names``."""
        return [loss.config for loss in self.compared]

    @property
    def trains_aligners(self) -> bool:
        """Return whether some component between a teacher's cache and the losses is trained."""
        return any(parameter.requires_grad for parameter in self.aligners.parameters())

    @property
    def trains_without_student(self) -> bool:
        """Return whether a KV loss can fall without the student: an aligner or a loss is trained."""
        return self.trains_aligners or any(parameter.requires_grad for parameter in self.losses.parameters())

    @property
    def draws_teachers(self) -> bool:
        """Return whether the fuser chooses other teachers in every forward pass."""
        return isinstance(self.fuser, Chooses) and getattr(self.fuser, "draws", True)

    # from teachers' caches to targets

    def align_with_map(self, aligner: TeacherAligner, cache: Cache, time_map: TimeMap) -> Aligned:
        """Return one teacher's target and where it is valid; the raw cache is not needed afterwards."""
        return Aligned(aligner.align(cache.map(part_at_least_float32), time_map), time_map.valid)

    @torch.no_grad()
    def choose_teachers(self) -> tuple[bool, ...]:
        """Return for every teacher whether it runs in this forward pass."""
        if isinstance(self.fuser, Chooses) and (self.draws_teachers or self._fixed_choice is None):
            with self._errors_of_fuser():
                self._ran = self._fixed_choice = chosen_teachers(self.fuser, len(self.names))
        return self._ran

    def empty_target(self, aligner: TeacherAligner, mask: Bool[Tensor, "batch time"]) -> Aligned:
        """Return the target of a teacher that does not run: zeros, valid nowhere."""
        zero = torch.zeros((), device=mask.device)
        batch, time = mask.shape
        extents = aligner.target
        target = {}
        for part in self.parts:
            target[part] = zero.expand(batch, extents.layer, extents.heads(part), time, extents.dim)
        return Aligned(Cache(**target), torch.zeros_like(mask), ran=False)

    # from targets to terms

    def forward(
        self,
        student: Cache,
        caches: Sequence[Cache],
        timeline: Timeline,
        teachers: Sequence[Timeline],
        items: Tensor,
        rotation: Rotation | None = None,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the unweighted loss terms, by name.

        A term is the sum over positions with a target of the mean loss over layers, divided by ``items``.

        Args:
            student: the student's cache of the compared layers.
            caches: every teacher's cache of the layers its aligner reads (``sources``).
            timeline: the student's positions.
            teachers: every teacher's positions.
            items: number of the student's real tokens in the whole batch, over accumulation and processes.
            rotation: the student's own rotation in this forward pass, if targets are rotated like it.
        """
        aligned = []
        for aligner, cache, their_timeline in zip(self.teachers, caches, teachers, strict=True):
            time_map = aligner.plan(their_timeline, timeline)
            time_map = aligner.without_sinks(time_map, cache, their_timeline.mask)
            aligned.append(self.align_with_map(aligner, cache, time_map))
        return self.compare_aligned(student, aligned, timeline, items, rotation)

    def compare_aligned(
        self,
        student: Cache,
        aligned: list[Aligned],
        timeline: Timeline,
        items: Tensor,
        rotation: Rotation | None = None,
        fuser_inputs: FuserInputs = NO_FUSER_INPUTS,
    ) -> dict[str, Float[Tensor, ""]]:
        """Do as ``forward``, for targets that are aligned already.

        Args:
            student: the student's cache of the compared layers.
            aligned: every teacher's target, in the spec's order.
            timeline: the student's positions.
            items: number of the student's real tokens in the whole batch, over accumulation and processes.
            rotation: the student's own rotation in this forward pass, if targets are rotated like it.
            fuser_inputs: hidden states and task labels, if the fuser reads them.
        """
        student = student.map(part_at_least_float32)
        aligned = self.without_student_sinks(aligned, student, timeline.mask)
        if self.rotates_targets and rotation is not None:
            aligned = [
                replace(teacher, target=rotate_target(teacher.target, rotation)) for teacher in aligned
            ]
        if shapecheck.active():
            self._check_values(student, timeline, aligned)
        return self.compare(student, aligned, items, fuser_inputs)

    def student_sinks(self, student: Cache, mask: Bool[Tensor, "batch time"]) -> Bool[Tensor, "batch time"]:
        """Return which of the student's positions are attention sinks; none among latent tokens.

        Args:
            student: the student's cache of the compared layers.
            mask: which positions hold a token.
        """
        return torch.zeros_like(mask) if self.student_is_latent else sinks_of(student, mask)

    def without_student_sinks(
        self, aligned: list[Aligned], student: Cache, mask: Bool[Tensor, "batch time"]
    ) -> list[Aligned]:
        """Return the targets without those at the student's own attention sinks, if they are left out.

        Args:
            aligned: every teacher's target, in the spec's order.
            student: the student's cache of the compared layers.
            mask: which of the student's positions hold a token.
        """
        if not any(aligner.finds_sinks for aligner in self.teachers):
            return aligned
        others = ~self.student_sinks(student, mask)
        without = []
        for aligner, teacher in zip(self.teachers, aligned, strict=True):
            valid = teacher.valid & others if aligner.finds_sinks else teacher.valid
            without.append(replace(teacher, valid=valid))
        return without

    def compare(
        self,
        student: Cache,
        aligned: list[Aligned],
        items: Tensor,
        fuser_inputs: FuserInputs = NO_FUSER_INPUTS,
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the unweighted loss terms of the student's cache against aligned targets.

        With several teachers also ``weight/NAME``, each teacher's mean weight, and with a fuser that adds to
        the loss ``router``.
        """
        views = [aligner.view_of(student) for aligner in self.teachers]
        weights, fuser_terms = self.route(views[0], aligned, items, fuser_inputs)
        return self._terms(views, aligned, weights) | fuser_terms

    def route(
        self, view: Cache, aligned: list[Aligned], items: Tensor, fuser_inputs: FuserInputs = NO_FUSER_INPUTS
    ) -> tuple[Float[Tensor, "teacher batch layer time"], dict[str, Float[Tensor, ""]]]:
        """Return the fuser's weights, divided by ``items``, and the terms it adds, as for ``compare``."""
        context = self.fusion_context(view, aligned, fuser_inputs)
        terms: dict[str, Tensor] = {}
        with self._errors_of_fuser():
            weights = teacher_weights(self.fuser, context, context.valid, layer=view.any.shape[1])
            if isinstance(self.fuser, Regularised):
                terms[ROUTER] = fuser_penalty(self.fuser, weights) / items
        if len(self.names) > 1:
            weights_of_examples = weights.detach().mean(2).sum(2) / items
            terms |= self._weight_metrics(weights_of_examples, fuser_inputs.tasks)
        return weights / items, terms

    def fusion_context(self, view: Cache, aligned: list[Aligned], fuser_inputs: FuserInputs) -> FusionContext:
        """Return what the fuser may look at."""
        hidden = fuser_inputs.hidden
        if hidden is None and view.any.is_meta:  # A dry run has no student that could give them.
            hidden = view.any.new_empty(view.any.shape[0], view.any.shape[3], self.hidden)
        return FusionContext(
            valid=torch.stack([teacher.valid for teacher in aligned]),
            targets=tuple(teacher.target for teacher in aligned),
            student=view,
            hidden=hidden,
            tasks=fuser_inputs.tasks,
        )

    def _weight_metrics(
        self, weights: Float[Tensor, "teacher batch"], tasks: tuple[str, ...] | None
    ) -> dict[str, Float[Tensor, ""]]:
        """Return each teacher's weight; in evaluation that of each task apart as well."""
        metrics = {f"weight/{name}": weights[index].sum() for index, name in enumerate(self.names)}
        if self.training or tasks is None or len(set(tasks)) < 2:
            return metrics
        examples_of_task: dict[str, list[int]] = {}
        for example, task in enumerate(tasks):
            examples_of_task.setdefault(task, []).append(example)
        for index, name in enumerate(self.names):
            for task, examples in examples_of_task.items():
                metrics[f"weight/{name}@{task}"] = weights[index, examples].sum()
        return metrics

    def _terms(
        self, views: list[Cache], aligned: list[Aligned], weights: Float[Tensor, "teacher batch layer time"]
    ) -> dict[str, Tensor]:
        targets, losses = [teacher.target for teacher in aligned], list(self.losses)
        if not self.separate:
            targets, weights = [fuse_caches(targets, weights)], weights.sum(0, keepdim=True)
        elif any(teacher.ran for teacher in aligned):
            ran = [index for index, teacher in enumerate(aligned) if teacher.ran]
            views = [views[index] for index in ran]
            targets = [targets[index] for index in ran]
            losses = [losses[index] for index in ran]
            weights = weights[ran] if len(ran) < len(aligned) else weights
        terms = {}
        for index, loss in enumerate(self.compared):
            rows = getattr(self, f"rows_{index}")
            shares = []
            with self._errors_of_loss(loss):
                # Fused, there is one target and one list of losses, but a view for every teacher, all alike.
                for of_aligner, view, target, weight in zip(losses, views, targets, weights, strict=False):
                    inputs = inputs_of_loss(view, target, weight, rows, loss.config.parts)
                    shares.append(summed_loss(of_aligner[index], *inputs))  # type: ignore[index]
                terms[loss.term] = torch.stack(shares).sum()
        return terms

    def terms_with_weights(
        self, student: Cache, aligned: list[Aligned], weights: Float[Tensor, "teacher batch time"]
    ) -> dict[str, Float[Tensor, ""]]:
        """Return the unweighted loss terms by name, with given weights of the teachers, without the fuser.

        Args:
            student: the student's cache of the compared layers.
            aligned: every teacher's target, in the spec's order.
            weights: of every teacher at every position; the same in all layers.
        """
        views = [aligner.view_of(student) for aligner in self.teachers]
        layers = views[0].any.shape[1]
        return self._terms(views, aligned, weights[:, :, None].expand(-1, -1, layers, -1))

    def losses_at_layer(
        self, teacher: int, row: int, view: Cache, target: Cache, weight: Float[Tensor, "batch 1 time"]
    ) -> Iterator[tuple[int, Float[Tensor, ""]]]:
        """Yield the place of every loss that looks at one compared layer, and that layer's share of it.

        Args:
            teacher: place of the teacher.
            row: place of the layer among the compared ones.
            view: the student's cache of this layer, where the losses compare.
            target: this teacher's, likewise.
            weight: this teacher's.
        """
        for index, loss in enumerate(self.compared):
            if row not in loss.rows:
                continue
            parts = loss.config.parts
            with self._errors_of_loss(loss):
                component = component_at_layer(self.losses[teacher][index], loss.rows.index(row))  # type: ignore[index]
                share = summed_loss(component, view.pick(parts), target.pick(parts), weight / len(loss.rows))
            yield index, share

    # from terms to one number

    def weighted_total(self, terms: Mapping[str, Tensor]) -> Tensor:
        """Return the sum over losses of λ · term, plus what the fuser adds."""
        addends = []
        for name, weight in zip(self.term_names, self.current_weights(), strict=True):
            addends.append(weight.to(terms[name].dtype) * terms[name])
        if ROUTER in terms:
            addends.append(terms[ROUTER])
        return torch.stack(addends).sum()

    def current_weights(self) -> Float[Tensor, " _"]:
        """Return λ of every term at this point of the run, ``progress``."""
        factors = [schedule_factor(config, self.progress) for config in self.configs]
        if all(factor == 1.0 for factor in factors):
            return self.weights
        # One by one: a tensor of the factors would have to be sent to the device.
        return torch.stack([w * f for w, f in zip(self.weights.unbind(), factors, strict=True)])

    def zero_for_unused_parameters(self) -> Tensor | float:
        """Return 0, attached to what is trained for teachers that did not run.

        Distributed training waits for a gradient of every parameter, of these too.
        """
        unused: list[nn.Parameter] = []
        for index, ran in enumerate(self._ran):
            if not ran:
                unused.extend(self.aligners[index].parameters())
                if self.separate:
                    unused.extend(self.losses[index].parameters())
        zeros = [0 * parameter.sum() for parameter in unused if parameter.requires_grad]
        return torch.stack(zeros).sum() if zeros else 0.0

    # before training

    @property
    def observes_caches(self) -> bool:
        """Return whether some loss must see data before training."""
        return any(isinstance(loss, ObservesCaches) for loss, _ in self._losses_and_declarations())

    def _losses_and_declarations(self) -> Iterator[tuple[nn.Module, ComparedLoss]]:
        for of_aligner in self.losses:
            assert isinstance(of_aligner, nn.ModuleList)
            yield from zip(of_aligner, self.compared, strict=True)

    def finish_losses(self) -> None:
        """Let the losses that saw data compute what they need of it."""
        for loss, compared in self._losses_and_declarations():
            if isinstance(loss, ObservesCaches):
                with self._errors_of_loss(compared):
                    finish_component(loss)

    def show_fuser(self, context: FusionContext) -> None:
        """Show one batch to a fuser that must see data before training."""
        with self._errors_of_fuser():
            show_component(self.fuser, context)

    def finish_fuser(self) -> None:
        """Let a fuser that saw data compute what it needs of it."""
        with self._errors_of_fuser():
            finish_component(self.fuser)

    def reward_fuser(self, value: Float[Tensor, ""]) -> None:
        """Give a fuser that learns from it the cross-entropy of this forward pass."""
        with self._errors_of_fuser():
            self.fuser.reward(value)

    @torch.no_grad()
    def show_losses(self, student: Cache, aligned: list[Aligned]) -> None:
        """Show one batch to the losses that must see data before training.

        If targets are fused, they are fused evenly over the teachers that run.

        Args:
            student: the student's cache of the compared layers.
            aligned: every teacher's target, in the spec's order.
        """
        views = [aligner.view_of(student) for aligner in self.teachers]
        targets = [teacher.target for teacher in aligned]
        valid = [teacher.valid for teacher in aligned]
        if not self.separate:
            runs = (True,) * len(aligned) if self.draws_teachers else self.choose_teachers()
            runs_here = torch.tensor(runs, device=valid[0].device)[:, None, None]
            where = torch.stack(valid) & runs_here
            layers = views[0].any.shape[1]
            even_weights = where.to(views[0].any.dtype)[:, :, None].expand(-1, -1, layers, -1)
            targets, valid = [fuse_caches(targets, even_weights)], [where.any(0)]
        for of_aligner, view, target, where in zip(self.losses, views, targets, valid, strict=False):
            for index, loss in enumerate(self.compared):
                component = of_aligner[index]  # type: ignore[index]
                if isinstance(component, ObservesCaches):
                    rows = getattr(self, f"rows_{index}")
                    own = select_layers(view, rows, loss.config.parts)
                    theirs = select_layers(target, rows, loss.config.parts)
                    with self._errors_of_loss(loss):
                        show_component(component, own, theirs, where)

    # errors

    def _errors_of_fuser(self) -> AbstractContextManager[None]:
        return attribute_errors_to(f"fuser {self.fuser_config.name!r}", self.fuser_config)

    def _errors_of_loss(self, loss: ComparedLoss) -> AbstractContextManager[None]:
        return attribute_errors_to(f"kv_loss {loss.config.name!r}", loss.config)

    def _check_values(self, student: Cache, timeline: Timeline, aligned: list[Aligned]) -> None:
        assert_finite(student, timeline.mask, "the student's cache")
        for aligner, teacher in zip(self.teachers, aligned, strict=True):
            assert_finite(teacher.target, teacher.valid, f"the aligned cache of teacher {aligner.name!r}")
