"""What a run will take: parameters, memory and floating-point operations, computed on the meta device."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from kava_core.build.stored import store_layout
from kava_core.costs.counted import TRAINED_COPIES, ModelCost, StoreSize, _bytes
from kava_core.costs.divided import _alive, _divided, _elsewhere, _heard, _logits, _memory
from kava_core.costs.dry_run import DryRun, dry_run, sized_config, vocabulary_note
from kava_core.costs.flops import alignment_flops, forward_flops, readings, step_passes
from kava_core.costs.memory import kept_by_student, largest_block
from kava_core.data.splits import load_splits
from kava_core.errors import SpecError
from kava_core.kv.capture.attention_layers import has_rotary
from kava_core.kv.capture.geometry import fake_model
from kava_core.models import quantize
from kava_core.models.config import model_config
from kava_core.models.fsdp import decoder_layers
from kava_core.models.student import add_lora
from kava_core.specfile.questions import active_losses, logit_teachers, used_teachers
from kava_core.specfile.sections.data import HubData
from kava_core.specfile.sections.models import ModelSpec, StudentSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


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
        {f"teacher {t.name!r}": t for t in spec.teachers} if active_losses(spec) else {}
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
            head=t.name in logit_teachers(spec),
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
        outside=_bytes(model.parameters())
        - sum(_bytes(block.parameters()) for block in decoder_layers(model)),
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


def _held(model: nn.Module, spec: ModelSpec) -> int:
    """Bytes of the weights; a quantised teacher's linear layers without their scales (a few percent more)."""
    format = getattr(spec, "quantize", None)
    if format is None:
        return _bytes(model.parameters())
    linear = [m.weight for m in model.base_model.modules() if isinstance(m, nn.Linear)]
    count = sum(weight.numel() for weight in linear)
    return _bytes(model.parameters()) - _bytes(linear) + int(count * quantize.BYTES[format])


def _store_size(spec: PipelineSpec, dry: DryRun, time: int) -> StoreSize | None:
    if spec.store is None or dry.pipeline is None:
        return None
    return StoreSize(store_layout(spec, dry.pipeline).bytes_per_token(), time, _examples(spec))


def _examples(spec: PipelineSpec) -> int | None:
    """Examples of generated data and of files that are here; a hub is not asked."""
    if isinstance(spec.data, HubData):
        return None
    try:
        splits = load_splits(spec.data, root=Path.cwd())
    except SpecError:
        return None
    return len(splits.train) + min(len(splits.validation), spec.evaluate.examples)
