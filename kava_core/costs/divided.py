"""Divide memory among what is alive together, devices and processes."""

from __future__ import annotations

from math import prod

from kava_core.costs.counted import BYTES, STATE, TRAINED_COPIES, WEIGHTS, ModelCost, _bytes
from kava_core.costs.dry_run import DryRun
from kava_core.costs.flops import _named
from kava_core.costs.memory import LOGIT_BYTES, Kept, kept_by_losses
from kava_core.kv.align.streaming import most_layers_alive
from kava_core.models.placement import REPLICATED, SHARDED
from kava_core.protocols.axes import Cache
from kava_core.specfile.questions import logit_teachers, shared_weights_key
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


def _memory(
    spec: PipelineSpec, dry: DryRun, models: list[ModelCost], kept: Kept, logits: int
) -> dict[str, int]:
    held = [cost for cost, teacher in _apart(spec, models[1:]) if not _on(teacher)]
    return {
        STATE: models[0].weights,
        **_alive(spec, kept, logits),
        WEIGHTS: sum(cost.weights for cost in held),
        "teachers: captured cache (the largest)": _captured(spec, dry, models[1:]),
        "teachers: aligned caches (fp32)": sum(prod(shape) * 4 for shape in _targets(dry).values()),
        "KV losses: kept for the backward pass": kept_by_losses(dry),
        "alignment: weights, gradients, optimizer": _alignment_bytes(dry),
    }


def _heard(
    spec: PipelineSpec, student: ModelCost, teachers: list[ModelCost], time: int, t_time: int
) -> dict[str, int]:
    """Logits that are distilled: all teachers' wait for the student's, and the term keeps its gradient."""
    declared = {teacher.name: teacher for teacher in spec.teachers}
    wide = {t.name: t.vocabulary * _computed_bytes(spec, declared[t.name]) for t in teachers}
    theirs = sum(wide[name] for name in logit_teachers(spec)) * t_time
    own = student.vocabulary * _computed_bytes(spec, spec.student) * time
    size = spec.train.batch_size * (theirs + own)
    return {"teachers: logits, and the term's gradient": size} if logit_teachers(spec) else {}


def _logits(spec: PipelineSpec, student: ModelCost, time: int, t_time: int) -> int:
    """Of the student's text, and of what it reads as its own teacher: both wait for the backward pass."""
    own = [t_time for t in spec.teachers if t.itself is not None and t.itself.cross_entropy]
    return spec.train.batch_size * (time + sum(own)) * student.vocabulary * LOGIT_BYTES


def _alive(spec: PipelineSpec, kept: Kept, logits: int) -> dict[str, int]:
    """What the student's pass makes. Autocast copies no frozen weights ahead."""
    if not spec.student.gradient_checkpointing:
        return {"student: activations": kept.total, "student: logits and their gradient": logits}
    copies = 0 if spec.student.lora is not None else kept.copies
    return {
        "student: activations": kept.checkpointed,
        "student: logits, or a layer made again": max(logits + copies, *kept.layers),
    }


def _apart(spec: PipelineSpec, costs: list[ModelCost]) -> list[tuple[ModelCost, TeacherSpec]]:
    """Teachers with weights of their own, each with its declaration."""
    declared = {teacher.name: teacher for teacher in spec.teachers}
    found = {shared_weights_key(declared[cost.name]): (cost, declared[cost.name]) for cost in reversed(costs)}
    return list(reversed(found.values()))


def _on(teacher: TeacherSpec) -> str | None:
    """The device of its own that a teacher is placed on."""
    return None if teacher.placement in (REPLICATED, SHARDED) else teacher.placement


def _elsewhere(spec: PipelineSpec, costs: list[ModelCost]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for cost, teacher in _apart(spec, costs):
        if device := _on(teacher):
            sizes[device] = sizes.get(device, 0) + cost.weights
    return sizes


def _divided(
    memory: dict[str, int],
    alive: dict[str, int],
    models: list[ModelCost],
    spec: PipelineSpec,
    processes: int,
) -> dict[str, dict[str, int]]:
    """What each process holds.

    Args:
        memory: what a process holds alone.
        alive: what the student's pass makes where its weights are gathered as autocast needs them.
        models: the student, then the teachers.
        processes: how many.
    """
    teachers = [one for one in _apart(spec, models[1:]) if not _on(one[1])]
    sharded = [cost for cost, teacher in teachers if teacher.placement == SHARDED]
    whole = sum(cost.weights for cost, teacher in teachers if teacher.placement == REPLICATED)
    common = memory | {WEIGHTS: whole + sum(cost.weights // processes for cost in sharded)}
    if sharded:
        common["teachers: layers gathered to run"] = max(cost.outside + 2 * cost.block for cost in sharded)
    student = models[0]
    fsdp = {STATE: student.weights // processes, "student: layers gathered to run": _gathered(spec, student)}
    return {
        "DDP": common | {"student: gradients on their way": student.trained},
        "FSDP2": common | alive | fsdp,
    }


def _gathered(spec: PipelineSpec, student: ModelCost) -> int:
    """FSDP2 gathers a layer while the one before it runs, so two at a time, and in the backward pass one
    layer's gradient, which is summed in float32. What stands outside of the layers stays gathered."""
    gathered = 2 * student.outside + 3 * student.block
    if spec.train.precision == "bf16" and spec.student.dtype == "float32":
        return gathered // 2 + student.block
    return gathered


def _computed_bytes(spec: PipelineSpec, model: ModelSpec) -> int:
    """Width of a number in a model's forward pass."""
    return 2 if spec.train.precision != "fp32" else BYTES[model.dtype]


def _captured(spec: PipelineSpec, dry: DryRun, teachers: list[ModelCost]) -> int:
    """Teachers run one after the other, and a raw cache is let go once it is aligned.

    With ``train.stream`` as many layers are there as one student layer reads.
    """
    declared = {teacher.name: teacher for teacher in spec.teachers}
    sizes = [0]
    for teacher in teachers if dry.pipeline is not None else ():
        cache = dry.caches[teacher.name]
        size = _cached(spec, declared[teacher.name], cache, teacher.rotary)
        sizes.append(size * _read_at_once(spec, dry, teacher.name) // cache.any.shape[1])
    return max(sizes)


def _read_at_once(spec: PipelineSpec, dry: DryRun, teacher: str) -> int:
    """Teacher layers whose raw caches are alive together."""
    assert dry.pipeline is not None
    aligner = _named(dry, teacher)
    if not spec.train.stream:
        return len(aligner.sources)
    return most_layers_alive(aligner.layer_map.reads)


def _cached(spec: PipelineSpec, teacher: ModelSpec, cache: Cache, rotary: bool) -> int:
    """Bytes of a cache; autocast leaves what is rotated in the dtype of the weights."""
    narrow, wide = _computed_bytes(spec, teacher), BYTES[teacher.dtype]
    rotated = rotary and spec.rotary != "strip"
    return sum(x.numel() * (wide if rotated and part != "values" else narrow) for part, x in cache.items())


def _alignment_bytes(dry: DryRun) -> int:
    if dry.pipeline is None:
        return 0
    trained = [p for p in dry.pipeline.parameters() if p.requires_grad]
    held = _bytes(dry.pipeline.parameters()) + _bytes(dry.pipeline.buffers())
    return held + TRAINED_COPIES * _bytes(trained)


def _targets(dry: DryRun) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shape of every teacher's and part's last stage."""
    return {(s.teacher, s.part): s.shape for s in dry.shapes}
