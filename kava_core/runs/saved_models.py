"""Describe models that a run has saved, as a spec would."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from kava_core.runs.folder import Folder
from kava_core.specfile.sections.models import ModelSpec, StudentSpec

Model = TypeVar("Model", bound=ModelSpec)


def model_in_folder(model: Model, folder: Path | str) -> Model:
    """Return the same model and its tokenizer, to be loaded from a folder of its own."""
    place = {"path": str(folder), "tokenizer": str(folder)}
    return model.model_copy(update=place | {"config": None, "pretrain": None, "revision": None})


def trained_student(run: Folder) -> StudentSpec:
    """Return the student as a run saved it, adapters merged and layers cut, to be read and not trained."""
    saved = model_in_folder(run.spec.student, run.student)
    done = {"lora": None, "gradient_checkpointing": False, "frozen": False, "keep_layers": None}
    return saved.model_copy(update=done)
