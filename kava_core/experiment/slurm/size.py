"""What a run takes, from ``kava plan``: a checkpoint's bytes and a process's memory. Imports torch inside."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.specfile.sections.pipeline import PipelineSpec

MOMENTS = 2
"""AdamW's numbers for each trained weight."""


@dataclass(frozen=True)
class Size:
    """In bytes."""

    disk: int
    """Of a run: checkpoints kept, one being written, and the finished student."""
    memory: int
    """Of one process on its device, at the peak of a step; with several, under DDP."""


def size_of(spec: PipelineSpec, processes: int) -> Size:
    """An estimate without loading anything; KavaError where a model or component cannot be planned."""
    from kava_core.costs.model_cost import TRAINED_COPIES
    from kava_core.costs.plan import default_time, make_plan

    time = default_time(spec)
    plan = make_plan(spec, time=time, t_time=time, processes=processes)
    student = plan.models[0]
    whole = student.held_bytes - TRAINED_COPIES * student.trained_bytes
    saved = whole if spec.student.lora is None else student.trained_bytes
    alignment = plan.memory["alignment: weights, gradients, optimizer"]
    checkpoint = saved + MOMENTS * student.trained_bytes + alignment
    memory = plan.divided.get("DDP", plan.memory)
    return Size((spec.train.keep_checkpoints + 1) * checkpoint + whole, sum(memory.values()))
