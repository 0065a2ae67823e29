"""Add up the memory of a process that trains alone, by what holds it."""

from __future__ import annotations

from math import prod

from kava_core.costs.dry_run import DryRun
from kava_core.costs.kept_activations import KeptActivations, kept_by_losses
from kava_core.costs.model_cost import DTYPE_BYTES, TRAINED_COPIES, ModelCost, tensor_bytes
from kava_core.kv.align.streaming import most_layers_alive
from kava_core.models.placement import REPLICATED, SHARDED
from kava_core.protocols.axes import Cache
from kava_core.specfile.questions import (
    cross_logit_teachers,
    logit_teachers,
    shared_weights_key,
    teachers_to_logits,
)
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

STUDENT_STATE = "student: weights, gradients, optimizer"
TEACHER_WEIGHTS = "teachers: weights"

LOGIT_BYTES = 12
"""Bytes of one logit at the peak, in the backward pass: the log-probability and two gradients in float32."""


def memory_alone(
    spec: PipelineSpec, dry: DryRun, models: list[ModelCost], kept: KeptActivations, logits: int
) -> dict[str, int]:
    """Return the bytes at the peak of a step, by what they hold.

    Args:
        spec: the run's.
        dry: its pipeline's dry run.
        models: the student, then the teachers.
        kept: what the student's passes keep for the backward pass.
        logits: bytes of the student's logits.
    """
    teachers = models[1:]
    teacher_weights = 0
    for cost, declared in unshared_teachers(spec, teachers):
        if not own_device(declared):
            teacher_weights += cost.held_bytes
    return {
        STUDENT_STATE: models[0].held_bytes,
        **student_pass_memory(spec, kept, logits),
        TEACHER_WEIGHTS: teacher_weights,
        "teachers: captured cache (the largest)": _largest_captured_cache(spec, dry, teachers),
        "teachers: aligned caches (fp32)": _aligned_cache_bytes(dry),
        "KV losses: kept for the backward pass": kept_by_losses(dry),
        "alignment: weights, gradients, optimizer": _alignment_bytes(dry),
    }


def student_pass_memory(spec: PipelineSpec, kept: KeptActivations, logits: int) -> dict[str, int]:
    """Return the bytes that the student's pass makes, by what they hold.

    With checkpointing either the logits or one layer that is computed again is at its peak, not both.
    """
    if not spec.student.gradient_checkpointing:
        return {"student: activations": kept.total, "student: logits and their gradient": logits}
    # Autocast does not keep copies of weights that are not trained.
    weight_copies = 0 if spec.student.lora is not None else kept.weight_copies
    return {
        "student: activations": kept.checkpointed,
        "student: logits, or a layer made again": max(logits + weight_copies, *kept.layers),
    }


def student_logit_bytes(spec: PipelineSpec, student: ModelCost, time: int, t_time: int) -> int:
    """Return the bytes of the student's logits over its own text and over what it reads as its own teacher.

    Both wait for the backward pass.
    """
    positions = time
    for teacher in spec.teachers:
        if teacher.itself is not None and teacher.itself.cross_entropy:
            positions += t_time
    return spec.train.batch_size * positions * student.vocabulary * LOGIT_BYTES


def distilled_logits_memory(
    spec: PipelineSpec, models: list[ModelCost], time: int, t_time: int
) -> dict[str, int]:
    """Return the bytes of logits that are distilled; nothing if none are.

    All teachers' logits wait for the student's, and each term keeps its gradient from every teacher.
    """
    distilled = teachers_to_logits(spec)
    if not distilled:
        return {}
    gradients = len(logit_teachers(spec)) + len(cross_logit_teachers(spec))
    student, teachers = models[0], models[1:]
    declared = _declared_teachers(spec)
    teacher_bytes = 0
    for teacher in teachers:
        if teacher.name in distilled:
            teacher_bytes += teacher.vocabulary * _computed_bytes(spec, declared[teacher.name]) * t_time
    student_bytes = gradients * student.vocabulary * _computed_bytes(spec, spec.student) * time
    batch_bytes = spec.train.batch_size * (teacher_bytes + student_bytes)
    return {"teachers: logits, and the term's gradient": batch_bytes}


def hidden_states_memory(spec: PipelineSpec, dry: DryRun) -> dict[str, int]:
    """Return the bytes of hidden states that are distilled; nothing if none are.

    All teachers' states wait for the student's: the embedding and every layer's output. In float32 there are
    then every aligned target, and of the student the compared layers and their difference from each target.
    """
    if dry.hidden is None:
        return {}
    declared = _declared_teachers(spec)
    total = 4 * dry.hidden.student.any.numel()
    for aligner in dry.hidden.states.teachers:
        states = dry.hidden.teachers[aligner.name].any
        layers = dry.teachers[aligner.name].layer + 1
        numbers = states.numel() // states.shape[1] * layers
        target = dry.hidden.student.any.shape[3] * len(states) * aligner.target.layer * aligner.target.dim
        total += numbers * _computed_bytes(spec, declared[aligner.name]) + 2 * 4 * target
    return {"hidden states: the teachers', and what is compared (fp32)": total}


def unshared_teachers(spec: PipelineSpec, teachers: list[ModelCost]) -> list[tuple[ModelCost, TeacherSpec]]:
    """Return the teachers with their declarations, one for all those that share weights."""
    declared = _declared_teachers(spec)
    by_weights: dict[object, tuple[ModelCost, TeacherSpec]] = {}
    for cost in reversed(teachers):  # so that of those who share weights the first is kept
        teacher = declared[cost.name]
        by_weights[shared_weights_key(teacher)] = (cost, teacher)
    return list(reversed(by_weights.values()))


def _declared_teachers(spec: PipelineSpec) -> dict[str, TeacherSpec]:
    return {teacher.name: teacher for teacher in spec.teachers}


def own_device(teacher: TeacherSpec) -> str | None:
    """Return the device of its own on which a teacher is placed; None if it has none."""
    return None if teacher.placement in (REPLICATED, SHARDED) else teacher.placement


def _computed_bytes(spec: PipelineSpec, model: ModelSpec) -> int:
    """Return the bytes of a number in a model's forward pass."""
    return 2 if spec.train.precision != "fp32" else DTYPE_BYTES[model.dtype]


def _largest_captured_cache(spec: PipelineSpec, dry: DryRun, teachers: list[ModelCost]) -> int:
    """Return the bytes of the largest raw cache.

    Teachers run one after the other, and a raw cache is let go once it is aligned. With ``train.stream``
    only the layers that one student layer reads are held at a time.
    """
    if dry.pipeline is None:
        return 0
    declared = _declared_teachers(spec)
    largest = 0
    for teacher in teachers:
        cache = dry.teacher_caches[teacher.name]
        size = _cache_bytes(spec, declared[teacher.name], cache, teacher.rotary)
        layers = cache.any.shape[1]
        largest = max(largest, size * _layers_held(spec, dry, teacher.name) // layers)
    return largest


def _layers_held(spec: PipelineSpec, dry: DryRun, teacher: str) -> int:
    """Count the teacher layers whose raw caches are held together."""
    aligner = dry.aligner(teacher)
    if not spec.train.stream:
        return len(aligner.sources)
    return most_layers_alive(aligner.layer_map.reads)


def _cache_bytes(spec: PipelineSpec, teacher: ModelSpec, cache: Cache, rotary: bool) -> int:
    """Return the bytes of a cache; autocast leaves what is rotated in the dtype of the weights."""
    rotates = rotary and spec.rotary != "strip"
    total = 0
    for part, tensor in cache.items():
        rotated = rotates and part != "values"
        total += tensor.numel() * (DTYPE_BYTES[teacher.dtype] if rotated else _computed_bytes(spec, teacher))
    return total


def _aligned_cache_bytes(dry: DryRun) -> int:
    """Return the bytes of every teacher's and part's cache after its last stage."""
    last_shapes = {(stage.teacher, stage.part): stage.shape for stage in dry.shapes}
    return sum(prod(shape) * 4 for shape in last_shapes.values())


def _alignment_bytes(dry: DryRun) -> int:
    modules = dry.beside_student
    trained = [parameter for parameter in modules.parameters() if parameter.requires_grad]
    held = tensor_bytes(modules.parameters()) + tensor_bytes(modules.buffers())
    return held + TRAINED_COPIES * tensor_bytes(trained)
