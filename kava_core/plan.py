"""What a run will take: parameters, memory and floating-point operations, computed on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from kava_core.dry_run import DryRun, dry_run, sized_config
from kava_core.kv.probe import fake_model
from kava_core.spec.model import ModelSpec, PipelineSpec, StudentSpec
from kava_core.train.models import add_lora

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


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
    """Of one step's forward pass (teachers) or forward and backward pass (student)."""


@dataclass(frozen=True)
class Plan:
    """The answer of ``kava plan``."""

    dry: DryRun
    models: list[ModelCost]
    memory: dict[str, int]
    """Bytes, by what they hold."""
    flops: dict[str, float]
    """Of one optimizer step, by who does them."""


def make_plan(spec: PipelineSpec, *, time: int, t_time: int) -> Plan:
    """Everything about a step with ``train.batch_size`` examples of these lengths."""
    batch = spec.train.batch_size
    dry = dry_run(spec, batch=batch, time=time, t_time=t_time)
    student = _model_cost("student", spec.student, batch, time, geometry=str(dry.student))
    teachers = [
        _model_cost(t.name, t, batch, t_time, geometry=str(dry.teachers[t.name]))
        for t in spec.teachers
        if dry.pipeline
    ]
    steps = spec.train.accumulate
    flops = {cost.name: cost.flops * steps for cost in (student, *teachers)}
    if dry.pipeline is not None:
        flops["alignment"] = _alignment_flops(dry, spec) * steps
    return Plan(dry, [student, *teachers], _memory(spec, dry, [student, *teachers], batch, time), flops)


def _model_cost(name: str, spec: ModelSpec, batch: int, time: int, *, geometry: str) -> ModelCost:
    training = isinstance(spec, StudentSpec)
    with FakeTensorMode():
        model: Any = fake_model(sized_config(spec, where=name), attn_implementation="eager")
        flops = _forward_flops(model if training else model.base_model, time) * batch
        if isinstance(spec, StudentSpec) and spec.lora is not None:
            model = add_lora(model, spec.lora, seed=0)
    parameters = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad) if training else 0
    weights = parameters * BYTES[spec.dtype] + trainable * (BYTES[spec.dtype] + 8)
    return ModelCost(name, geometry, parameters, trainable, weights, flops * (3 if training else 1))


def _forward_flops(model: nn.Module, time: int) -> float:
    """Of one example, attention's matrix products included (eager attention, so that they are counted)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(
            input_ids=torch.zeros(1, time, dtype=torch.long, device=next(model.parameters()).device),
            use_cache=False,
        )
    return float(counter.get_total_flops())


def _alignment_flops(dry: DryRun, spec: PipelineSpec) -> float:
    """Multiply-adds × 2 of the stages, from the shapes they pass through, backward pass not needed."""
    total = 0.0
    for before, after in zip(dry.shapes, dry.shapes[1:], strict=False):
        if before.teacher == after.teacher and before.part == after.part and before.shape != after.shape:
            changed = [
                axis for axis, (a, b) in enumerate(zip(before.shape, after.shape, strict=True)) if a != b
            ]
            total += 2 * prod(after.shape) * prod(before.shape[axis] for axis in changed)
    return total


def _memory(
    spec: PipelineSpec, dry: DryRun, models: list[ModelCost], batch: int, time: int
) -> dict[str, int]:
    student = dry.student
    wide = 2 if spec.train.precision != "fp32" else BYTES[spec.student.dtype]
    logits = batch * time * _vocabulary(spec.student) * (wide + 4)
    activations = (
        17
        * batch
        * time
        * student.hidden
        * wide
        * (1 if spec.student.gradient_checkpointing else student.layer)
    )
    captured = sum(
        prod(s.shape) * BYTES[_dtype(spec, s.teacher)] for s in dry.shapes if s.stage == "captured"
    )
    aligned = sum(prod(shape) * 4 for shape in _targets(dry).values())
    return {
        "student: weights, gradients, optimizer": models[0].weights,
        "student: activations (about)": activations,
        "student: logits and their gradient": logits,
        "teachers: weights": sum(model.weights for model in models[1:]),
        "teachers: captured caches": captured,
        "teachers: aligned caches (fp32)": aligned,
    }


def _targets(dry: DryRun) -> dict[tuple[str, str], tuple[int, ...]]:
    """Shape of every teacher's and part's last stage."""
    return {(s.teacher, s.part): s.shape for s in dry.shapes}


def _dtype(spec: PipelineSpec, teacher: str) -> str:
    return next(t.dtype for t in spec.teachers if t.name == teacher)


def _vocabulary(spec: ModelSpec) -> int:
    return int(sized_config(spec, where="student").vocab_size)
