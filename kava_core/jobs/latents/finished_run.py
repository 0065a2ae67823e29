"""A finished run with latent tokens, put together again as it was after its last step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors import SafetensorError
from safetensors.torch import load_file

from kava_core.build.data import Data, make_data
from kava_core.build.distiller import make_distiller
from kava_core.build.time_plans import PlansTime
from kava_core.console import quiet
from kava_core.data.dataset import split_nearly_equal
from kava_core.distill.distiller import Distiller
from kava_core.errors import CheckpointError, SpecError
from kava_core.latent.exported import load_latents
from kava_core.runs import checkpoint
from kava_core.runs.folder import Folder
from kava_core.runs.saved_models import model_in_folder, trained_student
from kava_core.specfile.questions import active_losses, used_teachers
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.weights import ALIGNER_FILE

MOST = 64
"""Examples in a forward pass."""


@dataclass(frozen=True)
class FinishedRun:
    """The trained student, and the teachers it was compared with where they can still be had."""

    spec: PipelineSpec
    data: Data
    distiller: Distiller
    """In evaluation mode, with the trained aligners; without pipeline where ``missing`` says why."""
    missing: str | None
    """Why there is no teacher to compare with."""

    def batches(self, examples: int) -> Iterator[dict[str, Any]]:
        """The first validation examples in batches of nearly equal sizes, on the student's device."""
        items = self.data.validation_items.items[:examples]
        collate = PlansTime(self.data.plain_collator, self.distiller.pipeline)
        device = next(self.distiller.parameters()).device
        for some in split_nearly_equal(items, MOST):
            made = send_to_device(collate(some), device)
            yield made | {"student": self.distiller.at_curriculum_stage(made["student"])}


def finished_run(path: Path) -> FinishedRun:
    """Load a run from its directory.

    Raises:
        SpecError: no finished run with latent tokens; or the data, or a model's folder, are not what they
            were.
        CheckpointError: the run directory is damaged.
    """
    run = Folder(path)
    record = run.finished_record()
    spec = _spec(run)
    run.verify_student()
    last = run.checkpoint_at(record["results"]["steps"])
    missing = _missing(spec, record, last)
    if missing is not None:
        spec = spec.model_copy(update={"losses": (), "teachers": (), "codi": None, "logits": None})
    with quiet():
        spec = _with_models(spec, record, run)
        data = make_data(spec)
        if not data.splits.same_as(record["data"]):
            raise SpecError(f"{run}: the data changed since this run ended")
        distiller = make_distiller(spec, data, seed=record["seed"])
    assert distiller.latents is not None
    distiller.latents.load_state_dict(load_latents(run.student).state_dict())
    if distiller.pipeline.compared:
        _load_aligners(distiller, last)
    return FinishedRun(spec, data, _placed(distiller, spec), missing)


def _spec(run: Folder) -> PipelineSpec:
    spec = run.spec
    if spec.trajectory != "latent":
        raise SpecError(
            f"{run}: a run with trajectory: {spec.trajectory}; only a latent one has latent tokens"
        )
    if spec.latent.count == 0:
        raise SpecError(f"{run}: a run with latent.count: 0; there are no latent tokens to look at")
    return spec


def _missing(spec: PipelineSpec, record: dict[str, Any], last: Path) -> str | None:
    if not active_losses(spec):
        return "the run compared no teacher's cache (no KV loss)"
    if not last.is_dir():
        return f"{last} is gone, and the trained aligners with it"
    for teacher in used_teachers(spec):
        if _was_trained(teacher) and not Path(_origin(record, teacher)).is_dir():
            return (
                f"teacher {teacher.name!r}: its pretrained model is no longer at {_origin(record, teacher)}"
            )
    return None


def _was_trained(teacher: TeacherSpec) -> bool:
    """Whether its weights are a pretraining's, and not the student's."""
    return teacher.pretrain is not None and teacher.itself is None


def _origin(record: dict[str, Any], teacher: TeacherSpec) -> str:
    """The folder that the run loaded a teacher from."""
    return str(record.get("models", {}).get(teacher.name, {}).get("origin", "a known place"))


def _with_models(spec: PipelineSpec, record: dict[str, Any], run: Folder) -> PipelineSpec:
    """The spec with the trained student as it was saved, and the teachers it had."""
    teachers = tuple(_teacher(teacher, record, run.student) for teacher in used_teachers(spec))
    return spec.model_copy(update={"student": trained_student(run), "teachers": teachers})


def _teacher(teacher: TeacherSpec, record: dict[str, Any], student: Path) -> TeacherSpec:
    if teacher.itself is not None:
        return model_in_folder(teacher, student)
    return model_in_folder(teacher, _origin(record, teacher)) if _was_trained(teacher) else teacher


def _load_aligners(distiller: Distiller, last: Path) -> None:
    checkpoint.verify(last)
    try:
        distiller.pipeline.load_state_dict(load_file(last / ALIGNER_FILE))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{last / ALIGNER_FILE}: {str(error).splitlines()[0]}") from error


def _placed(distiller: Distiller, spec: PipelineSpec) -> Distiller:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller.to(device).eval()
    distiller.place_teachers(device, {teacher.name: teacher.placement for teacher in spec.teachers})
    return distiller
