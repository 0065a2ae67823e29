"""Divide the memory of a step among several processes, and among teachers' own devices."""

from __future__ import annotations

from kava_core.costs.model_cost import ModelCost
from kava_core.costs.process_memory import STUDENT_STATE, TEACHER_WEIGHTS, own_device, unshared_teachers
from kava_core.models.placement import REPLICATED, SHARDED
from kava_core.specfile.sections.pipeline import PipelineSpec

GATHERED_STUDENT = "student: layers gathered to run"
GATHERED_TEACHERS = "teachers: layers gathered to run"


def memory_of_each_process(
    memory: dict[str, int],
    fsdp_pass: dict[str, int],
    models: list[ModelCost],
    spec: PipelineSpec,
    processes: int,
) -> dict[str, dict[str, int]]:
    """Return the bytes that each process holds, by what they hold, for every way to train together.

    Args:
        memory: what a process holds alone.
        fsdp_pass: what the student's pass makes if its weights are gathered in the dtype autocast needs.
        models: the student, then the teachers.
        spec: the run's.
        processes: how many.
    """
    student = models[0]
    common = memory | _teacher_memory(spec, models[1:], processes)
    fsdp_student = {
        STUDENT_STATE: student.held_bytes // processes,
        GATHERED_STUDENT: _gathered_bytes(spec, student),
    }
    return {
        "DDP": common | {"student: gradients on their way": student.trained_bytes},
        "FSDP2": common | fsdp_pass | fsdp_student,
    }


def memory_of_devices(spec: PipelineSpec, teachers: list[ModelCost]) -> dict[str, int]:
    """Return the bytes of the teachers' weights on each device that is a teacher's own."""
    sizes: dict[str, int] = {}
    for cost, teacher in unshared_teachers(spec, teachers):
        device = own_device(teacher)
        if device:
            sizes[device] = sizes.get(device, 0) + cost.held_bytes
    return sizes


def _teacher_memory(spec: PipelineSpec, teachers: list[ModelCost], processes: int) -> dict[str, int]:
    """Return what a process holds of the teachers: replicated ones whole, of sharded ones its share."""
    held = 0
    gathered: list[int] = []
    for cost, teacher in unshared_teachers(spec, teachers):
        if teacher.placement == REPLICATED:
            held += cost.held_bytes
        elif teacher.placement == SHARDED:
            held += cost.held_bytes // processes
            # A layer is gathered while the one before it runs, so two are whole at a time.
            gathered.append(cost.outside_layers_bytes + 2 * cost.largest_layer_bytes)
    memory = {TEACHER_WEIGHTS: held}
    if gathered:
        memory[GATHERED_TEACHERS] = max(gathered)
    return memory


def _gathered_bytes(spec: PipelineSpec, student: ModelCost) -> int:
    """Return the bytes of the student's weights that FSDP2 has gathered at the peak.

    It gathers a layer while the one before it runs, so two are whole at a time; in the backward pass one
    layer's gradient comes on top, which is summed in float32. What is outside the layers stays gathered.
    """
    gathered = 2 * student.outside_layers_bytes + 3 * student.largest_layer_bytes
    if spec.train.precision == "bf16" and spec.student.dtype == "float32":
        return gathered // 2 + student.largest_layer_bytes
    return gathered
