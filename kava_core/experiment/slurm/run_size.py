"""Estimate what a run takes, as ``kava plan`` does: a checkpoint's bytes and a process's memory."""

from __future__ import annotations

from dataclasses import dataclass

from kava_core.specfile.sections.pipeline import PipelineSpec

MOMENTS = 2
"""AdamW's numbers for each trained weight."""


@dataclass(frozen=True)
class RunSize:
    """What a run takes, in bytes."""

    disk: int
    """Of a run: checkpoints kept, one being written, and the finished student."""
    memory: int
    """Of one process on its device, at the peak of a step; with several, under DDP."""


def estimate_size(spec: PipelineSpec, processes: int) -> RunSize:
    """Estimate a run's size without loading a model.

    Args:
        spec: of the run.
        processes: that the run is divided among.

    Raises:
        KavaError: a model or component cannot be planned.
    """
    # Planning needs torch, which the other files of this folder do without.
    from kava_core.costs.model_cost import TRAINED_COPIES
    from kava_core.costs.plan import default_time, make_plan

    time = default_time(spec)
    plan = make_plan(spec, time=time, t_time=time, processes=processes)
    student = plan.models[0]
    finished_student = student.held_bytes - TRAINED_COPIES * student.trained_bytes
    saved_weights = finished_student if spec.student.lora is None else student.trained_bytes
    alignment = plan.memory["alignment: weights, gradients, optimizer"]
    checkpoint = saved_weights + MOMENTS * student.trained_bytes + alignment
    checkpoints = (spec.train.keep_checkpoints + 1) * checkpoint
    memory = plan.divided.get("DDP", plan.memory)
    return RunSize(disk=checkpoints + finished_student, memory=sum(memory.values()))
