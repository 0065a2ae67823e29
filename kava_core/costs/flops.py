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
from kava_core.kv.capture.geometry import config_key, fake_model
from kava_core.protocols.axes import Cache
from kava_core.protocols.time_map import TimeMap
from kava_core.specfile.sections.models import ModelSpec, StudentSpec
from kava_core.specfile.sections.pipeline import PipelineSpec


class ExtraPasses(NamedTuple):
    """What the student reads in a step beside its whole text, as multiples of that text."""

    jacobi: float
    """In Jacobi passes over latent tokens, in which the language-model head does not run."""
    as_own_teacher: float
    """As its own teacher."""


def extra_passes(spec: PipelineSpec, *, time: int, t_time: int) -> ExtraPasses:
    """Count what the student reads beside its text of ``time`` tokens.

    The first Jacobi pass reads the prompt, each later one only latent tokens that are not final and that a
    later pass looks at (``kava_core.latent.tokens``). As its own teacher the student reads ``t_time`` tokens
    (which cost less if their cross-entropy has no weight).
    """
    if spec.trajectory == "text":
        return ExtraPasses(0.0, 0.0)
    count = spec.latent.count
    passes = min(spec.latent.passes, count)
    prompt = time - count
    keeps_cache = not spec.student.gradient_checkpointing
    jacobi_tokens = 0
    for number in range(passes):
        slots_read = count - passes + number  # no later pass would look at the slots behind them
        cached = prompt + number - 1 if keeps_cache and number > 0 else 0
        jacobi_tokens += prompt + slots_read - cached
    own_teachers = [teacher for teacher in spec.teachers if teacher.itself is not None]
    return ExtraPasses(jacobi_tokens / time, len(own_teachers) * t_time / time)


def step_passes(spec: ModelSpec) -> int:
    """Return a step's work in forward passes: the backward pass costs one for activations, one for weights.

    Adapters are too small to count; checkpointing runs the forward pass twice.
    """
    if not isinstance(spec, StudentSpec) or spec.frozen:
        return 1
    return (2 if spec.lora is not None else 3) + spec.gradient_checkpointing


def forward_flops(config: PreTrainedConfig, time: int, *, head: bool) -> float:
    """Count a forward pass over one example of ``time`` tokens, attention's matrix products included.

    A process counts each once.

    Args:
        config: the model's.
        time: tokens.
        head: whether the language-model head runs; a teacher's does only if its logits are distilled.
    """
    key = config_key(config), time, head
    if key not in _COUNTED:
        _COUNTED[key] = _count_forward_pass(config, time, head)
    return _COUNTED[key]


_COUNTED: dict[tuple[str, int, bool], float] = {}


def _count_forward_pass(config: PreTrainedConfig, time: int, head: bool) -> float:
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        # Eager attention is made of products that the counter sees.
        model: Any = fake_model(config, attn_implementation="eager")
        run = model if head else model.base_model
        ids = torch.zeros(1, time, dtype=torch.long, device=next(model.parameters()).device)
        run(input_ids=ids, use_cache=False)
    return float(counter.get_total_flops())


def alignment_flops(dry: DryRun, teacher: str | None = None) -> float:
    """Count the alignment of one teacher, or of all if none is named, and the student's change of view.

    Fuser and losses are not counted.
    """
    assert dry.pipeline is not None
    total = 0.0
    for aligner in dry.pipeline.teachers if teacher is None else (dry.aligner(teacher),):
        time_map = dry.time_maps[aligner.name]
        for part, tensor in dry.teacher_caches[aligner.name].items():
            total += _part_flops(aligner, tensor, part, time_map)
        total += sum(_student_view_flops(aligner, tensor, part) for part, tensor in dry.student_cache.items())
    return total


def hidden_alignment_flops(dry: DryRun, teacher: str | None = None) -> float:
    """Count the alignment of one teacher's hidden states, or of all; 0 where none are distilled.

    The distance itself is not counted.
    """
    hidden = dry.hidden
    if hidden is None:
        return 0.0
    total = 0.0
    for aligner in hidden.states.teachers:
        if teacher in (None, aligner.name):
            states, time_map = hidden.teachers[aligner.name].any, hidden.time_maps[aligner.name]
            total += _part_flops(aligner, states, "values", time_map)
            total += _student_view_flops(aligner, hidden.student.any, "values")
    return total


def _student_view_flops(aligner: TeacherAligner, tensor: Tensor, part: Part) -> float:
    """Count the change of the student's cache into the losses' view, whose gradient always comes back."""

    def to_view(tensor: Tensor) -> Tensor:
        return aligner.view_of(Cache(**{part: tensor})).any

    return _count_products(to_view, tensor.detach().requires_grad_())[1]


def _part_flops(aligner: TeacherAligner, tensor: Tensor, part: Part, time_map: TimeMap) -> float:
    """Count one part's way through the stages, in the order that the aligner chooses for it."""
    order = aligner.stages(part, tensor.shape[3], time_map)
    tensor, total = _count_products(aligner.layer_map, tensor)
    for stage in order:
        tensor, flops = _stage_flops(aligner, stage, tensor, part, time_map)
        total += flops
    return total


def _stage_flops(
    aligner: TeacherAligner, stage: Stage, tensor: Tensor, part: Part, time_map: TimeMap
) -> tuple[Tensor, float]:
    """Run one stage; return what it gives and its operations."""
    if stage != "time":
        return _count_products(lambda tensor: aligner.apply_stage(stage, tensor, part, time_map), tensor)
    # A time map gathers and weighs, which the counter of matrix products does not see.
    taps = 0 if time_map.identity else time_map.taps
    with torch.no_grad():
        warped = aligner.apply_stage(stage, tensor, part, time_map)
    directions = 2 if tensor.requires_grad else 1
    return warped.requires_grad_(tensor.requires_grad), 2.0 * taps * warped.numel() * directions


def _count_products(change: Callable[[Tensor], Tensor], tensor: Tensor) -> tuple[Tensor, float]:
    """Run ``change`` on the meta device; return its result and the operations of its matrix products.

    The backward pass is counted as well if something before or in ``change`` is trained.
    """
    with FlopCounterMode(display=False) as counter:
        result = change(tensor)
        if result.requires_grad:
            result.backward(torch.empty_like(result))
    return result.detach().requires_grad_(result.requires_grad), float(counter.get_total_flops())
