"""Compute the KV losses while the teacher runs: one teacher layer, target and gradient alive at a time.

The terms are sums over student layers, so each layer's share and its gradient can be formed as soon as the
teacher layers it reads have run. What remains is the gradient of the student's cache, which the backward pass
would make anyway, and no raw cache for the backward pass of an aligner that is trained. All of it happens in
one ``autograd.Function``, so the trainer, DDP and FSDP meet an ordinary scalar.

The student's graph is alive meanwhile. If no gradient goes through the targets, ``align_layer_by_layer`` is
therefore the cheaper way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from kava_core import shapecheck
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import assert_finite, part_at_least_float32
from kava_core.kv.align.streaming import RunTeacher, WaitingLayers
from kava_core.kv.capture.rotation import Rotation
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import rotate_target
from kava_core.kv.maths.masks import without_autocast
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap


@dataclass(frozen=True)
class TeacherStream:
    """One teacher that is about to run."""

    teacher: int
    """Its place among the pipeline's."""
    run: RunTeacher
    time_map: TimeMap


def terms_layer_by_layer(
    pipeline: KVPipeline,
    student: Cache,
    weights: Float[Tensor, "teacher batch layer time"],
    streams: Sequence[TeacherStream],
    factors: Float[Tensor, "_ _"],
    rotation: Rotation | None = None,
) -> tuple[Float[Tensor, " _"], dict[str, Float[Tensor, ""]]]:
    """Return weighted sums of the loss terms, with gradient, and the unweighted terms, without.

    Equal to ``KVPipeline.compare_aligned`` up to the order in which layers are added.

    Args:
        pipeline: decides what is aligned and compared.
        student: the student's cache of the compared layers.
        weights: of every teacher at every position, as ``KVPipeline.route`` returns them.
        streams: the teachers that run, one after another.
        factors: a row for each sum, with a factor for every term. The gradient of each sum takes as much
            memory as the student's cache.
        rotation: as for ``KVPipeline.forward``.
    """
    trained = [p for p in (*pipeline.aligners.parameters(), *pipeline.losses.parameters()) if p.requires_grad]
    parts = dict(student.map(part_at_least_float32).items())
    job = _AllTeachers(pipeline, streams, factors, rotation, tuple(parts), trained)
    wanted = torch.is_grad_enabled()
    sums, terms = _LayerByLayerTerms.apply(job, wanted, weights, *parts.values(), *trained)  # type: ignore[no-untyped-call]
    return sums, dict(zip(pipeline.term_names, terms.unbind(), strict=True))


class _LayerByLayerTerms(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, job: _AllTeachers, wanted: bool, weights: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor]:
        needed = ctx.needs_input_grad[2:] if wanted else (False,) * (1 + len(tensors))
        sums, terms, gradients = job(weights, tensors, needed)
        ctx.save_for_backward(*chain.from_iterable(gradients))
        ctx.sums = len(gradients)
        ctx.mark_non_differentiable(terms)
        return sums, terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        inputs = len(saved) // ctx.sums
        gradients: list[Tensor | None] = []
        for index in range(inputs):
            gradients_of_sums = saved[index::inputs]
            scaled = []
            for outer, inner in zip(gradient, gradients_of_sums, strict=True):
                if inner is not None:
                    scaled.append(outer * inner)
            gradients.append(sum(scaled[1:], scaled[0]) if scaled else None)
        return None, None, *gradients


@dataclass(frozen=True)
class _AllTeachers:
    """All teachers of a forward pass."""

    pipeline: KVPipeline
    streams: Sequence[TeacherStream]
    factors: Tensor
    rotation: Rotation | None
    parts: tuple[Any, ...]
    trained: Sequence[Tensor]

    def __call__(
        self, weights: Tensor, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]
    ) -> tuple[Tensor, Tensor, list[list[Tensor | None]]]:
        """Return sums, terms, and for every sum the gradients of the weights and of each tensor.

        A gradient is None for a tensor that needs none.
        """
        count = len(self.parts)
        student = Cache(**dict(zip(self.parts, (x.detach() for x in tensors[:count]), strict=True)))
        sums = range(len(self.factors) if any(needed) else 0)
        gradients = [_gradient_buffers((weights, *tensors), needed) for _ in sums]
        dtype = torch.promote_types(weights.dtype, student.any.dtype)
        terms = weights.new_zeros(len(self.pipeline.term_names), dtype=dtype)
        for stream in self.streams:
            layers = _OneTeacher(self, stream, student, weights.detach(), needed, gradients, terms)
            stream.run(layers.take)
        # Not a matrix product, which autocast would round.
        return (
            (self.factors.to(terms.dtype) * terms).sum(1),
            terms,
            gradients or [[None] * (1 + len(tensors))],
        )


def _gradient_buffers(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    buffers = []
    for tensor, is_needed in zip(tensors, needed, strict=True):
        zeros = torch.zeros_like(tensor, memory_format=torch.contiguous_format) if is_needed else None
        buffers.append(zeros)
    return buffers


@dataclass
class _OneTeacher:
    """One teacher's layers as they come."""

    job: _AllTeachers
    stream: TeacherStream
    student: Cache
    weights: Tensor
    needed: tuple[bool, ...]
    gradients: list[list[Tensor | None]]
    terms: Tensor

    def __post_init__(self) -> None:
        self.arrivals = WaitingLayers(self.aligner)

    @property
    def aligner(self) -> TeacherAligner:
        """Return this teacher's aligner."""
        return self.job.pipeline.teachers[self.stream.teacher]

    def take(self, t_layer: int, cache: Cache) -> None:
        """Compare the student layers for which this teacher layer was the last one missing.

        Args:
            t_layer: the teacher layer's index among those the aligner reads.
            cache: that layer.
        """
        with without_autocast(self.weights.device):
            for row, sources in self.arrivals.take(t_layer, cache):
                self._compare(row, sources)

    def _compare(self, row: int, sources: Cache) -> None:
        wanted = any(self.needed)
        weight = self.weights[self.stream.teacher, :, row : row + 1]
        leaves = [weight, *(x[:, row : row + 1] for _, x in self.student.items())]
        for leaf, is_needed in zip(leaves, self.needed, strict=False):
            leaf.requires_grad_(wanted and is_needed)
        with torch.set_grad_enabled(wanted):
            shares = list(self._terms(row, sources, leaves[0], leaves[1:]))
            for index, value in shares:
                self.terms[index] += value.detach()
            if wanted:
                self._collect(row, shares, leaves)

    def _terms(
        self, row: int, sources: Cache, weight: Tensor, own: list[Tensor]
    ) -> Iterator[tuple[int, Tensor]]:
        """Yield every loss's index and its share of this layer."""
        pipeline, aligner = self.job.pipeline, self.aligner
        target = aligner.align_layer(sources, self.stream.time_map, row)
        if self.job.rotation is not None:
            target = rotate_target(target, self.job.rotation.at(row))
        view = aligner.view_of(Cache(**dict(zip(self.job.parts, own, strict=True))), row)
        if shapecheck.active():
            valid = self.stream.time_map.valid
            assert_finite(view, valid, f"the student's cache (compared layer {row})")
        yield from pipeline.losses_at_layer(self.stream.teacher, row, view, target, weight)

    def _collect(self, row: int, shares: list[tuple[int, Tensor]], leaves: list[Tensor]) -> None:
        """Add this layer's gradients; losses that need none of it have none."""
        wanted = [tensor for tensor in (*leaves, *self.job.trained) if tensor.requires_grad]
        for number, (factors, gradients) in enumerate(zip(self.job.factors, self.gradients, strict=True)):
            weighted = []
            for index, value in shares:
                if value.requires_grad:
                    weighted.append(value * factors[index].to(value.dtype))
            if not weighted:
                continue
            last = number == len(self.gradients) - 1
            new_gradients: Sequence[Tensor | None] = torch.autograd.grad(
                torch.stack(weighted).sum(), wanted, retain_graph=not last, allow_unused=True
            )
            gradient_of = dict(zip(map(id, wanted), new_gradients, strict=True))
            self._add(row, gradient_of, leaves, gradients)

    def _add(
        self,
        row: int,
        gradient_of: dict[int, Tensor | None],
        leaves: list[Tensor],
        totals: list[Tensor | None],
    ) -> None:
        for index, tensor in enumerate([*leaves, *self.job.trained]):
            gradient, total = gradient_of.get(id(tensor)), totals[index]
            if gradient is None or total is None:
                continue
            if index == 0:  # the teachers' weights
                total[self.stream.teacher, :, row : row + 1] += gradient
            elif index < len(leaves):  # the student's keys, values or queries
                total[:, row : row + 1] += gradient
            else:
                total += gradient


def streams_terms(pipeline: KVPipeline) -> bool:
    """Return whether to stream the terms of the losses, rather than the targets alone.

    If an aligner is trained, its backward pass would keep the raw cache; if the student is lifted, the target
    is as large as the raw cache.
    """
    return pipeline.trains_aligners or any(aligner.lifts for aligner in pipeline.teachers)


def assert_can_stream(pipeline: KVPipeline) -> None:
    """Check that the losses can be computed layer by layer.

    Raises:
        SpecError: a component needs all layers or all teachers at once.
    """
    for aligner in pipeline.teachers:
        if aligner.evictor is not None:
            raise SpecError(
                f"train.stream: the time warper of teacher {aligner.name!r} evicts, from all layers at once"
            )
        if aligner.view.layer != len(pipeline.layers):
            raise SpecError(
                f"train.stream: the head adapter of teacher {aligner.name!r} sees all layers as one; use "
                "structured, or flat without 'layers'"
            )
    if not streams_terms(pipeline):
        return
    trained = "with a trained aligner or direction: to_teacher"
    if not pipeline.separate:
        raise SpecError(f"train.stream: {trained}, target: fused needs all caches at once; use separate")
    if getattr(pipeline.fuser, "needs_targets", True):
        name = pipeline.fuser_config.name
        raise SpecError(f"train.stream: {trained}, fuser {name!r} cannot see the targets; choose another")
