"""Plan what a step of a run will take: parameters, memory and operations, computed on the meta device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kava_core.costs.divided_memory import memory_of_devices, memory_of_each_process
from kava_core.costs.dry_run import DryRun, dry_run, sized_config
from kava_core.costs.flops import (
    ExtraPasses,
    alignment_flops,
    extra_passes,
    forward_flops,
    hidden_alignment_flops,
    step_passes,
)
from kava_core.costs.kept_activations import kept_by_student
from kava_core.costs.model_cost import ModelCost, model_cost
from kava_core.costs.process_memory import (
    distilled_logits_memory,
    hidden_states_memory,
    memory_alone,
    student_logit_bytes,
    student_pass_memory,
)
from kava_core.costs.store_size import StoreSize, store_size
from kava_core.models.config import model_config
from kava_core.specfile.questions import teachers_to_logits, used_teachers
from kava_core.specfile.sections.models import ModelSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


@dataclass(frozen=True)
class Plan:
    """The answer of ``kava plan``."""

    dry: DryRun
    models: list[ModelCost]
    """The student, then the teachers that run."""
    memory: dict[str, int]
    """Bytes of a process that trains alone, by what they hold."""
    flops: dict[str, float]
    """Operations of one optimizer step, by who does them."""
    store: StoreSize | None = None
    """None unless the spec asks for a store."""
    processes: int = 1
    """How many train together."""
    divided: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes of each of several processes, by what they hold, for DDP and for FSDP2."""
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Bytes of teachers on devices of their own, by device."""


def default_time(spec: PipelineSpec) -> int:
    """Return ``train.max_length``, or the fewest positions of any of the models if that is less."""
    models: dict[str, ModelSpec] = {"student": spec.student}
    models |= {f"teacher {teacher.name!r}": teacher for teacher in used_teachers(spec)}
    lengths = [spec.train.max_length]
    for where, model in models.items():
        config = model_config(model, where=where).get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit:
            lengths.append(limit)
    return min(lengths)


def make_plan(spec: PipelineSpec, *, time: int, t_time: int, processes: int = 1) -> Plan:
    """Plan a step with ``train.batch_size`` examples of these lengths in each process.

    With ``trajectory: latent`` the text before the latent tokens counts as long as it can be.

    Args:
        spec: the run's.
        time: tokens of an example for the student.
        t_time: tokens of an example for the teachers.
        processes: how many train together.
    """
    dry = dry_run(spec, batch=spec.train.batch_size, time=time, t_time=t_time)
    extra = extra_passes(spec, time=time, t_time=t_time)
    student = _student_cost(spec, dry, extra, time)
    teachers = _teacher_costs(spec, dry, t_time)
    models = [student, *teachers]
    student_config = sized_config(spec.student, where="student")
    kept = kept_by_student(spec, student_config, batch=spec.train.batch_size, time=time)
    kept = kept.times(1 + extra.as_own_teacher + extra.jacobi)
    logits = student_logit_bytes(spec, student, time, t_time)
    memory = memory_alone(spec, dry, models, kept, logits)
    memory |= distilled_logits_memory(spec, models, time, t_time)
    memory |= hidden_states_memory(spec, dry)
    divided = {}
    if processes > 1:
        # FSDP2 gathers weights in the dtype of the computation, so autocast copies nothing.
        fsdp_pass = student_pass_memory(spec, kept.without_weight_copies(), logits)
        divided = memory_of_each_process(memory, fsdp_pass, models, spec, processes)
    return Plan(
        dry,
        models,
        memory,
        _step_flops(spec, dry, models),
        store_size(spec, dry, time),
        processes,
        divided,
        memory_of_devices(spec, teachers),
    )


def _student_cost(spec: PipelineSpec, dry: DryRun, extra: ExtraPasses, time: int) -> ModelCost:
    """Count the student, with what it reads beside its whole text."""
    batch = spec.train.batch_size
    cost = model_cost("student", spec.student, batch, time, geometry=str(dry.student), head=True)
    body = forward_flops(sized_config(spec.student, where="student"), time, head=False)
    jacobi = extra.jacobi * body * batch * step_passes(spec.student)
    return replace(cost, flops=cost.flops * (1 + extra.as_own_teacher) + jacobi)


def _teacher_costs(spec: PipelineSpec, dry: DryRun, t_time: int) -> list[ModelCost]:
    """Count every teacher that runs as a model of its own."""
    lengths = _teacher_lengths(dry)
    costs = []
    for teacher in used_teachers(spec):
        if teacher.itself is None and teacher.has_weights:
            cost = model_cost(
                teacher.name,
                teacher,
                spec.train.batch_size,
                lengths.get(teacher.name, t_time),
                geometry=str(dry.teachers[teacher.name]),
                head=teacher.name in teachers_to_logits(spec),
            )
            costs.append(cost)
    return costs


def _teacher_lengths(dry: DryRun) -> Mapping[str, int]:
    """Return the tokens that each teacher read in the dry run."""
    return {name: cache.any.shape[3] for name, cache in dry.teacher_caches.items()}


def _step_flops(spec: PipelineSpec, dry: DryRun, models: list[ModelCost]) -> dict[str, float]:
    """Return the operations of an optimizer step, by who does them."""
    batches = spec.train.accumulate
    flops = {cost.name: cost.flops * batches for cost in models}
    if dry.pipeline is not None:
        flops["alignment"] = alignment_flops(dry) * batches
    if dry.hidden is not None:
        flops["alignment of hidden states"] = hidden_alignment_flops(dry) * batches
    return flops
