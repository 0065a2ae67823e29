"""What a finished run's directory says of its spec, and the models it left."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from kava_core.errors import CheckpointError, SpecError
from kava_core.registry import Registry
from kava_core.runs import checkpoint
from kava_core.runs.folder import RECORD, read_record
from kava_core.specfile.bind import bind_spec_model
from kava_core.specfile.sections.models import ModelSpec, StudentSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

M = TypeVar("M", bound=ModelSpec)


def finished_spec(run: Path) -> PipelineSpec:
    """The resolved spec of a run; CheckpointError where it is damaged or its plugins are gone."""
    file = run / "spec.json"
    try:
        text = file.read_text(encoding="utf-8")
        return bind_spec_model(Registry.build()).model_validate_json(text, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{file}: {_first(error)}") from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: unreadable: {error}") from error


def _first(error: ValidationError) -> str:
    """One line of what is wrong, and where."""
    found = error.errors()[0]
    return f"{'.'.join(map(str, found['loc']))}: {found['msg']}".removeprefix(": ")


def from_folder(model: M, folder: Path | str) -> M:
    """The same model and its tokenizer, from a folder of its own."""
    where = {"path": str(folder), "tokenizer": str(folder)}
    return model.model_copy(update=where | {"config": None, "pretrain": None, "revision": None})


def trained_student(spec: PipelineSpec, run: Path) -> StudentSpec:
    """The student as the run saved it, adapters merged, to be read and not trained."""
    trained = from_folder(spec.student, run / "student")
    return trained.model_copy(update={"lora": None, "gradient_checkpointing": False, "frozen": False})


def verify_student(student: Path) -> None:
    """CheckpointError where the student is not what training saved."""
    if not student.is_dir():
        raise CheckpointError(f"{student}: missing, though the run is complete")
    checkpoint.verify(student)


def finished_record(run: Path) -> dict[str, Any]:
    """The record of a finished run; SpecError where it is none."""
    file = run / RECORD
    if not file.is_file():
        raise SpecError(f"{run}: not a run directory (no {RECORD})")
    record = read_record(file)
    if record.get("status") != "complete":
        raise SpecError(f"{run}: the run is not finished; train it to its end first")
    return record
