"""What a run will take: parameters, memory and floating-point operations, computed on the meta device."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from kava_core.config import Part
from kava_core.data.splits import load_splits
from kava_core.dry_run import DryRun, dry_run, sized_config, vocabulary_note
from kava_core.errors import SpecError
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.stage_order import Stage
from kava_core.kv.align.streaming import most_alive
from kava_core.kv.capture.attention_layers import has_rotary
from kava_core.kv.capture.geometry import fake_model
from kava_core.plan_memory import LOGIT_BYTES, Kept, kept_by_losses, kept_by_student, largest_block
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.specfile.questions import active, heard, used_teachers, weights_key
from kava_core.specfile.sections.data import HubData
from kava_core.specfile.sections.models import ModelSpec, StudentSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train import quantize
from kava_core.train.fsdp import blocks
from kava_core.train.models import add_lora, model_config
from kava_core.train.placement import REPLICATED, SHARDED
from kava_core.train.stored import layout_of

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
TRAINED_COPIES = 3
"""Beside a trained weight, in its dtype: the gradient and AdamW's two moments."""


@dataclass(frozen=True)
class ModelCost:
    """One model of the run."""

    name: str
    geometry: str
    parameters: int
    trainable: int
    weights: int
    """Bytes of the weights, and of gradients and AdamW's two moments where trained."""
    flops: float
    """Of one forward pass (teachers) or forward and backward pass (student) over a batch."""
    vocabulary: int
    rotary: bool
    """Whether keys and queries are rotated."""
    note: str = ""
    """Where the vocabulary, and with it every count, is not the run's."""
    block: int = 0
    """Bytes of the largest decoder layer's weights."""
    outside: int = 0
    """Bytes of the weights outside of the decoder layers."""
    trained: int = 0
    """Bytes of the weights that are trained."""


@dataclass(frozen=True)
class StoreSize:
    """What ``kava cache`` would write."""

    token: int
    """Bytes of all teachers' targets at one student position."""
    time: int
    """Student tokens that an example is taken to have."""
    examples: int | None
    """Training and validation examples; None where only reading the data would tell."""


@dataclass(frozen=True)
class Plan:
    """The answer of ``kava plan``."""

    dry: DryRun
    models: list[ModelCost]
    memory: dict[str, int]
    """Bytes of a process that trains alone, by what they hold."""
    flops: dict[str, float]
    """Of one optimizer step, by who does them."""
    store: StoreSize | None = None
    """Where the spec asks for a store."""
    processes: int = 1
    """How many train together."""
    divided: dict[str, dict[str, int]] = field(default_factory=dict)
    """Bytes of each of several processes, likewise, by how they train together: DDP, FSDP2."""
    elsewhere: dict[str, int] = field(default_factory=dict)
    """Bytes of teachers on devices of their own, by device."""


def default_time(spec: PipelineSpec) -> int:
    """``train.max_length``, or the fewest positions any of the models has."""
    models = {"student": spec.student} | (
        {f"teacher {t.name!r}": t for t in spec.teachers} if active(spec) else {}
    )
    configs = [model_config(model, where=where).get_text_config() for where, model in models.items()]
    limits = [getattr(config, "max_position_embeddings", None) for config in configs]
    return min([spec.train.max_length, *(limit for limit in limits if limit)])


def make_plan(spec: PipelineSpec, *, time: int, t_time: int, processes: int = 1) -> Plan:
    """Everything about a step with ``train.batch_size`` examples of these lengths in each process.

    With ``trajectory: latent`` the text before the latent tokens counts as long as it can be.
    """
    batch = spec.train.batch_size
    dry = dry_run(spec, batch=batch, time=time, t_time=t_time)
    student = _model_cost("student", spec.student, batch, time, geometry=str(dry.student), head=True)
    lengths = {name: cache.any.shape[3] for name, cache in dry.caches.items()}
    teachers = [
        _model_cost(
            *(t.name, t, batch, lengths.get(t.name, t_time)),
            geometry=str(dry.teachers[t.name]),
            head=t.name in heard(spec),
        )
        for t in used_teachers(spec)
        if t.itself is None
    ]
    more = readings(spec, time=time, t_time=t_time)
    body = forward_flops(sized_config(spec.student, where="student"), time, head=False)
    jacobi = more.jacobi * body * batch * step_passes(spec.student)
    student = replace(student, flops=student.flops * (1 + more.own) + jacobi)
    steps = spec.train.accumulate
    flops = {cost.name: cost.flops * steps for cost in (student, *teachers)}
    if dry.pipeline is not None:
        flops["alignment"] = alignment_flops(dry) * steps
    kept = kept_by_student(spec, sized_config(spec.student, where="student"), batch=batch, time=time)
    kept = kept.of_passes(1 + more.own + more.jacobi)
    logits = _logits(spec, student, time, t_time)
    memory = _memory(spec, dry, [student, *teachers], kept, logits) | _heard(
        spec, student, teachers, time, t_time
    )
    alive = _alive(spec, kept.without_copies(), logits)
    divided = _divided(memory, alive, [student, *teachers], spec, processes) if processes > 1 else {}
    return Plan(
        dry,
        [student, *teachers],
        memory,
        flops,
        _store_size(spec, dry, time),
        processes,
        divided,
        _elsewhere(spec, teachers),
    )


class Readings(NamedTuple):
    """What the student reads in a step beside its whole text, as multiples of it."""

    jacobi: float
    """In Jacobi passes, whose head does not run."""
    own: float
    """As its own teacher."""


def readings(spec: PipelineSpec, *, time: int, t_time: int) -> Readings:
    """The first Jacobi pass reads the prompt, each later one what is neither final nor too far.

    As its own teacher the student reads ``t_time`` tokens (which cost less where their cross-entropy has no
    weight).
    """
    if spec.trajectory == "text":
        return Readings(0.0, 0.0)
    count, passes = spec.latent.count, min(spec.latent.passes, spec.latent.count)
    prompt, far = time - count, count - passes
    again = spec.student.gradient_checkpointing
    read = [prompt + far + number if again or not number else far + 1 for number in range(passes)]
    own = [t_time for teacher in spec.teachers if teacher.itself is not None]
    return Readings(sum(read) / time, sum(own) / time)


def _model_cost(name: str, spec: ModelSpec, batch: int, time: int, *, geometry: str, head: bool) -> ModelCost:
    config = sized_config(spec, where=name)
    model = _weightless(spec, config)
    learns = isinstance(spec, StudentSpec) and not spec.frozen
    trained = [p for p in model.parameters() if p.requires_grad and learns]
    return ModelCost(
        name,
        geometry,
        parameters=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in trained),
        weights=_held(model, spec) + TRAINED_COPIES * _bytes(trained),
        flops=forward_flops(config, time, head=head) * batch * step_passes(spec),
        vocabulary=int(config.get_text_config().vocab_size),
        rotary=has_rotary(model),
        note=vocabulary_note(spec),
        block=largest_block(model),
        outside=_bytes(model.parameters()) - sum(_bytes(block.parameters()) for block in blocks(model)),
        trained=_bytes(trained),
    )


def _weightless(spec: ModelSpec, config: PreTrainedConfig) -> nn.Module:
    """The model on the meta device with the run's dtypes and adapters; only its parameters are looked at.

    Not made of fake tensors: peft cannot replace their modules' weights.
    """
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        model = fake_model(config, dtype=getattr(torch, spec.dtype))
        if isinstance(spec, StudentSpec) and spec.lora is not None:
            model = add_lora(model, spec.lora, seed=0)
    return model


def step_passes(spec: ModelSpec) -> int:
    """A step's work in forward passes: the backward pass costs one for activations and one for weights.

    Adapters are too small to count; checkpointing runs the forward pass twice.
    """
    if not isinstance(spec, StudentSpec) or spec.frozen:
        return 1
    return (2 if spec.lora is not None else 3) + spec.gradient_checkpointing


def _held(model: nn.Module, spec: ModelSpec) -> int:
    """Bytes of the weights; a quantised teacher's linear layers without their scales (a few percent more)."""
    format = getattr(spec, "quantize", None)
    if format is None:
        return _bytes(model.parameters())
    linear = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    count = sum(weight.numel() for weight in linear)
    return _bytes(model.parameters()) - _bytes(linear) + int(count * quantize.BYTES[format])


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def forward_flops(config: PreTrainedConfig, time: int, *, head: bool) -> float:
    """Of one example, attention's matrix products included (eager attention, so that they are counted).

    ``head``: with the language-model head, which a teacher runs only if its logits are distilled.
    """
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model: Any = fake_model(config, attn_implementation="eager")
        run = model if head else model.base_model
        ids = torch.zeros(1, time, dtype=torch.long, device=next(model.parameters()).device)
        run(input_ids=ids, use_cache=False)
    return float(counter.get_total_flops())


def alignment_flops(dry: DryRun, teacher: str | None = None) -> float:
    """Of one teacher's alignment, or all, and the student's fold; fuser and losses are not counted."""
    assert dry.pipeline is not None
    total = 0.0
    for aligner in dry.pipeline.teachers if teacher is None else (_named(dry, teacher),):
        time_map = dry.maps[aligner.name]
        for part, x in dry.caches[aligner.name].items():
            total += _part_flops(aligner, x, part, time_map)
        total += sum(_fold_flops(aligner, x, part) for part, x in dry.own.items())
    return total


def _named(dry: DryRun, teacher: str) -> TeacherAligner:
    assert dry.pipeline is not None
    return next(aligner for aligner in dry.pipeline.teachers if aligner.name == teacher)


def _fold_flops(aligner: TeacherAligner, x: Tensor, part: Part) -> float:
    """The student's cache in the view the losses see; its gradient always comes back."""
    return _counted(lambda x: aligner.view_of(Cache(**{part: x})).any, x.detach().requires_grad_())[1]


def _part_flops(aligner: TeacherAligner, x: Tensor, part: Part, time_map: TimeMap) -> float:
    """One part's way through the stages in the order the aligner chooses for it."""
    order = aligner.stages(part, x.shape[3], time_map)
    x, total = _counted(aligner.layer_map, x)
    for stage in order:
        x, flops = _stage_flops(aligner, stage, x, part, time_map)
        total += flops
    return total


def _stage_flops(
    aligner: TeacherAligner, stage: Stage, x: Tensor, part: Part, time_map: TimeMap
) -> tuple[Tensor, float]:
    if stage != "time":
        return _counted(lambda x: aligner._stage(stage, x, part, time_map), x)
    taps = 0 if time_map.identity else time_map.taps
    with torch.no_grad():
        y = aligner._stage(stage, x, part, time_map)
    return y.requires_grad_(x.requires_grad), 2.0 * taps * y.numel() * (2 if x.requires_grad else 1)


def _counted(change: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, float]:
    """``change(x)`` on the meta device, and its matrix products: counted as they are called for.

    The backward pass is counted as well where something before or in ``change`` is trained.
    """
    with FlopCounterMode(display=False) as counter:
        y = change(x)
        if y.requires_grad:
            y.backward(torch.empty_like(y))
    return y.detach().requires_grad_(y.requires_grad), float(counter.get_total_flops())


WEIGHTS, STATE = "teachers: weights", "student: weights, gradients, optimizer"


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
    theirs = sum(wide[name] for name in heard(spec)) * t_time
    own = student.vocabulary * _computed_bytes(spec, spec.student) * time
    size = spec.train.batch_size * (theirs + own)
    return {"teachers: logits, and the term's gradient": size} if heard(spec) else {}


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
    found = {weights_key(declared[cost.name]): (cost, declared[cost.name]) for cost in reversed(costs)}
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
    return most_alive(aligner.layer_map.reads)


def _cached(spec: PipelineSpec, teacher: ModelSpec, cache: Cache, rotary: bool) -> int:
    """Bytes of a cache; autocast leaves what is rotated in the dtype of the weights."""
    narrow, wide = _computed_bytes(spec, teacher), BYTES[teacher.dtype]
    rotated = rotary and spec.rotary != "strip"
    return sum(x.numel() * (wide if rotated and part != "values" else narrow) for part, x in cache.items())


def _store_size(spec: PipelineSpec, dry: DryRun, time: int) -> StoreSize | None:
    if spec.store is None or dry.pipeline is None:
        return None
    return StoreSize(layout_of(spec, dry.pipeline).bytes_per_token(), time, _examples(spec))


def _examples(spec: PipelineSpec) -> int | None:
    """Examples of generated data and of files that are here; a hub is not asked."""
    if isinstance(spec.data, HubData):
        return None
    try:
        splits = load_splits(spec.data, root=Path.cwd())
    except SpecError:
        return None
    return len(splits.train) + min(len(splits.validation), spec.evaluate.examples)


def _alignment_bytes(dry: DryRun) -> int:
    if dry.pipeline is None:
        return 0
    trained = [p for p in dry.pipeline.parameters() if p.requires_grad]
    held = _bytes(dry.pipeline.parameters()) + _bytes(dry.pipeline.buffers())
    return held + TRAINED_COPIES * _bytes(trained)


def _targets(dry: DryRun) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shape of every teacher's and part's last stage."""
    return {(s.teacher, s.part): s.shape for s in dry.shapes}
