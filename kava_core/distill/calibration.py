"""Show data to components that must see it before the first step. Nothing here has gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kava_core.config import Part
from kava_core.distill.distiller import Distiller
from kava_core.distill.teachers import teacher_named, time_map_of, token_mask
from kava_core.errors import NonFiniteError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.finite import layers_not_finite, raise_unread_faults
from kava_core.kv.capture.evaluation_mode import evaluation_mode
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.kv.compare.values import NO_FUSER_INPUTS, Aligned
from kava_core.protocols.axes import Cache
from kava_core.protocols.timeline import Timeline


@torch.no_grad()
def calibrate_projectors(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Show one batch of teachers' and student's caches to every projector that must see data."""
    timeline = Timeline.from_batch(batch["student"])
    student = student_cache_without_dropout(distiller, batch["student"])
    own_sinks = distiller.pipeline.student_sinks(student, timeline.mask)
    for aligner, teacher in zip(distiller.pipeline.teachers, distiller.teachers, strict=True):
        if aligner.wants_calibration:
            side = batch["teachers"][teacher.name]
            cache = teacher.cache(side).map(_as_float32)
            _assert_finite_cache(cache, aligner, side)
            time_map = time_map_of(aligner, side, timeline)
            time_map = aligner.without_sinks(time_map, cache, token_mask(side), own_sinks)
            aligner.observe(cache, student, time_map)


@torch.no_grad()
def calibrate_hidden_states(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Show one batch of hidden states to every projector of them that must see data."""
    hidden, timeline = distiller.hidden, Timeline.from_batch(batch["student"])
    assert hidden is not None
    student = hidden.student_states(hidden_states_without_dropout(distiller, batch["student"]))
    for aligner in hidden.teachers:
        if aligner.wants_calibration:
            side = batch["teachers"][aligner.name]
            teacher_pass = teacher_named(distiller.teachers, aligner.name).read(side, keep_outputs=True)
            hidden.observe(student, teacher_pass, side, timeline)


def hidden_states_without_dropout(distiller: Distiller, side: Mapping[str, Tensor]) -> Sequence[Tensor]:
    """Return all hidden states of the student in evaluation mode, where the batch is."""
    home = side["segments"].device
    device = next(distiller.student.parameters()).device
    with evaluation_mode(distiller.student):
        outputs = distiller.student.base_model(
            input_ids=side["input_ids"].to(device),
            attention_mask=side["attention_mask"].to(device),
            use_cache=False,
            output_hidden_states=True,
        )
    return [states.to(home) for states in outputs.hidden_states]


def _assert_finite_cache(cache: Cache, aligner: TeacherAligner, side: Mapping[str, Any]) -> None:
    """Refuse to calibrate on a teacher's cache with NaN or infinity at real tokens.

    Raises:
        NonFiniteError: names the teacher and the layers.
    """
    if aligner.evictor is None:
        valid = Timeline.from_batch(side).mask
    else:  # Slots that hold no token are zero.
        valid = torch.ones_like(cache.any[:, 0, 0, :, 0], dtype=torch.bool)
    for part, x in cache.items():
        bad_layers = layers_not_finite(x, valid)
        if bad_layers.any():
            layers = [aligner.sources[row] for row in bad_layers.nonzero().flatten().tolist()]
            raise NonFiniteError(
                f"teacher {aligner.name!r}: its {part} of layers {layers} hold NaN or infinity; nothing "
                "can be calibrated on them"
            )


def finish_projectors(pipeline: KVPipeline) -> None:
    """Compute every calibrated projection from what was observed."""
    for aligner in pipeline.teachers:
        if aligner.wants_calibration:
            aligner.finish_calibration()


@torch.no_grad()
def show_fuser(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Show one batch of aligned targets to a fuser that must see data before training."""
    pipeline = distiller.pipeline
    student = student_cache_without_dropout(distiller, batch["student"])
    view = pipeline.teachers[0].view_of(student)
    context = pipeline.fusion_context(view, aligned_targets(distiller, batch), NO_FUSER_INPUTS)
    pipeline.show_fuser(context)


@torch.no_grad()
def show_losses(distiller: Distiller, batch: Mapping[str, Any]) -> None:
    """Show one batch to the losses that must see data before training."""
    student = student_cache_without_dropout(distiller, batch["student"])
    distiller.pipeline.show_losses(student, aligned_targets(distiller, batch))


def aligned_targets(
    distiller: Distiller, batch: Mapping[str, Any], pipeline: KVPipeline | None = None
) -> list[Aligned]:
    """Return every teacher's target of a batch; all teachers run.

    Args:
        distiller: whose teachers.
        batch: the collator's.
        pipeline: whose aligners; None: the distiller's.
    """
    timeline = Timeline.from_batch(batch["student"])
    pipeline = distiller.pipeline if pipeline is None else pipeline
    aligned, _ = distiller.alignment.targets.read_targets(batch["teachers"], timeline, pipeline)
    # No step of training follows that would read them.
    raise_unread_faults()
    return aligned


@torch.no_grad()
def student_cache_without_dropout(distiller: Distiller, side: Mapping[str, Tensor]) -> Cache:
    """Return the student's cache in evaluation mode, in float32; unrotated with ``rotary: match``.

    The student runs where its weights are; the cache comes back to where the batch is.
    """
    student, home = distiller.student, side["segments"].device
    device = next(student.parameters()).device
    tensors = {name: entry for name, entry in side.items() if name != "tasks"}
    side = {name: tensor.to(device) for name, tensor in tensors.items()}
    capture = distiller.capture_student("keep" if distiller.rotary == "keep" else "strip")
    with evaluation_mode(student):
        if distiller.latents is None:
            with capture:
                student.base_model(
                    input_ids=side["input_ids"], attention_mask=side["attention_mask"], use_cache=False
                )
        else:
            distiller.run_student(side, capture)
    cache = distiller.compared_positions(capture.take(), side)
    return cache.map(lambda x, part: _as_float32(x, part).to(home))


def _as_float32(x: Tensor, _: Part) -> Tensor:
    return x.float()
