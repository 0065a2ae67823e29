"""Load a finished run with latent tokens as it was after its last step."""

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
from kava_core.build.provenance import plugin_code, used_configs
from kava_core.build.time_plans import PlansTime
from kava_core.console import quiet
from kava_core.data.dataset import split_nearly_equal
from kava_core.distill.distiller import Distiller
from kava_core.errors import CheckpointError, SpecError
from kava_core.latent.exported import load_latents
from kava_core.runs import checkpoint
from kava_core.runs.folder import KEPT_LAYERS, Folder
from kava_core.runs.saved_models import model_in_folder, trained_student
from kava_core.specfile.questions import active_losses, used_teachers
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.weights import ALIGNER_FILE

MOST = 64
"""Examples in a forward pass."""


@dataclass(frozen=True)
class LatentRun:
    """The trained student, and the teachers it was compared with if they can still be loaded."""

    spec: PipelineSpec
    data: Data
    distiller: Distiller
    """In evaluation mode, with the trained aligners; without pipeline if ``missing`` names a reason."""
    missing: str | None
    """Why there is no teacher to compare with."""

    def batches(self, examples: int) -> Iterator[dict[str, Any]]:
        """Yield the first validation examples in batches of nearly equal sizes, on the student's device."""
        items = self.data.validation_items.items[:examples]
        collate = PlansTime(self.data.plain_collator, self.distiller.pipeline)
        device = next(self.distiller.parameters()).device
        for batch_items in split_nearly_equal(items, MOST):
            batch = send_to_device(collate(batch_items), device)
            yield batch | {"student": self.distiller.at_curriculum_stage(batch["student"])}


def load_latent_run(path: Path) -> LatentRun:
    """Load the run in a directory.

    Raises:
        SpecError: no finished run with latent tokens; or the data, or a model's folder, are not what they
            were.
        CheckpointError: the run directory is damaged.
    """
    run = Folder(path)
    record = run.finished_record()
    spec = _latent_spec(run)
    run.verify_student()
    last_checkpoint = run.checkpoint_at(record["results"]["steps"])
    missing = _why_no_teacher(spec, record, last_checkpoint)
    if missing is not None:
        spec = spec.model_copy(update={"losses": (), "teachers": (), "codi": None, "logits": None})
    with quiet():
        spec = _with_trained_models(spec, record, run)
        data = make_data(spec)
        if not data.splits.same_as(record["data"]):
            raise SpecError(f"{run}: the data changed since this run ended")
        run.check_plugin_code(plugin_code(used_configs(run.spec)))
        distiller = make_distiller(spec, data, seed=record["seed"])
    assert distiller.latents is not None
    distiller.latents.load_state_dict(load_latents(run.student).state_dict())
    if distiller.pipeline.compared:
        _load_aligners(distiller, last_checkpoint)
    return LatentRun(spec, data, _placed_distiller(distiller, spec), missing)


def _latent_spec(run: Folder) -> PipelineSpec:
    """Read a run's spec; SpecError if it has no latent tokens."""
    spec = run.spec
    if spec.trajectory != "latent":
        raise SpecError(
            f"{run}: a run with trajectory: {spec.trajectory}; only a latent one has latent tokens"
        )
    if spec.latent.count == 0:
        raise SpecError(f"{run}: a run with latent.count: 0; there are no latent tokens to look at")
    return spec


def _why_no_teacher(spec: PipelineSpec, record: dict[str, Any], last_checkpoint: Path) -> str | None:
    """Return why the run's teachers cannot be compared with; None if they can."""
    if not active_losses(spec):
        return "the run compared no teacher's cache (no KV loss)"
    if not last_checkpoint.is_dir():
        return f"{last_checkpoint} is gone, and the trained aligners with it"
    for teacher in used_teachers(spec):
        origin = _model_origin(record, teacher)
        if _was_pretrained(teacher) and not Path(origin).is_dir():
            return f"teacher {teacher.name!r}: its pretrained model is no longer at {origin}"
    return None


def _was_pretrained(teacher: TeacherSpec) -> bool:
    """Return whether its weights are a pretraining's, and not the student's."""
    return teacher.pretrain is not None and teacher.itself is None


def _model_origin(record: dict[str, Any], teacher: TeacherSpec) -> str:
    """Return the folder that the run loaded a teacher from."""
    return str(record.get("models", {}).get(teacher.name, {}).get("origin", "a known place"))


def _with_trained_models(spec: PipelineSpec, record: dict[str, Any], run: Folder) -> PipelineSpec:
    """Return the spec with the trained student as it was saved, and the teachers it had."""
    teachers = []
    for teacher in used_teachers(spec):
        if teacher.itself is not None:
            teacher = model_in_folder(teacher, run.student).model_copy(update={"keep_layers": None})
        elif _was_pretrained(teacher):
            teacher = model_in_folder(teacher, _model_origin(record, teacher))
        teachers.append(_with_recorded_layers(teacher, record))
    return spec.model_copy(update={"student": trained_student(run), "teachers": tuple(teachers)})


def _with_recorded_layers(teacher: TeacherSpec, record: dict[str, Any]) -> TeacherSpec:
    """Return the teacher with the layers that the run kept of it, which it may have measured."""
    kept = record.get(KEPT_LAYERS, {}).get(teacher.name)
    if teacher.keep_layers is None or kept is None:
        return teacher
    return teacher.model_copy(update={"keep_layers": tuple(kept)})


def _load_aligners(distiller: Distiller, checkpoint_folder: Path) -> None:
    checkpoint.verify(checkpoint_folder)
    file = checkpoint_folder / ALIGNER_FILE
    try:
        distiller.pipeline.load_state_dict(load_file(file))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{file}: {str(error).splitlines()[0]}") from error


def _placed_distiller(distiller: Distiller, spec: PipelineSpec) -> Distiller:
    """Move the models to their devices, in evaluation mode."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    distiller.to(device).eval()
    distiller.place_teachers(device, {teacher.name: teacher.placement for teacher in spec.teachers})
    return distiller
