"""Count floating-point operations of models and of every stage of an alignment."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from kava_core.config import Part
from kava_core.costs.dry_run import DryRun
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.align.stage_order import Stage
from kava_core.kv.capture.geometry import fake_model
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.specfile.sections.models import ModelSpec, StudentSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


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


def step_passes(spec: ModelSpec) -> int:
    """A step's work in forward passes: the backward pass costs one for activations and one for weights.

    Adapters are too small to count; checkpointing runs the forward pass twice.
    """
    if not isinstance(spec, StudentSpec) or spec.frozen:
        return 1
    return (2 if spec.lora is not None else 3) + spec.gradient_checkpointing


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
        return _counted(lambda x: aligner.apply_stage(stage, x, part, time_map), x)
    taps = 0 if time_map.identity else time_map.taps
    with torch.no_grad():
        y = aligner.apply_stage(stage, x, part, time_map)
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
