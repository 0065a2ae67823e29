"""Measured layer maps on disk: ``<teacher>.safetensors``, and ``<teacher>.json`` saying what was measured."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from kava_core.config import ComponentConfig
from kava_core.data.splits import split_hash
from kava_core.errors import KavaError, SpecError
from kava_core.runs.folder import write_json
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.train.assemble import Data
from kava_core.train.facts import model_facts
from kava_core.versions import versions

Subject = dict[str, Any]
"""What a measurement depends on; measured again where any of it differs."""


def subject_of(
    spec: PipelineSpec, teacher: TeacherSpec, config: ComponentConfig, data: Data, *, seed: int
) -> Subject:
    """Both models, the examples, and the settings that decide what is compared with what."""
    count = min(spec.train.calibration_examples, len(data.train_items))
    settings = {
        "layer_mapper": config.model_dump(mode="json", exclude={"map"}),
        "token_warper": teacher.align.token_warper and teacher.align.token_warper.model_dump(mode="json"),
        "time_warper": teacher.align.time_warper.model_dump(mode="json"),
        "template": (teacher.template or spec.data.template).model_dump(mode="json"),
        "rationale": teacher.rationale,
        "batch_size": spec.train.batch_size,
        "seed": seed if spec.student.path is None else None,
    }
    return {
        **models_of(spec, teacher, data),
        "data": {"examples": count, "sha256": split_hash(data.train_items.examples[:count])},
        "settings": settings,
    }


def models_of(spec: PipelineSpec, teacher: TeacherSpec, data: Data) -> Subject:
    """What tells the teacher and the student from others."""
    return {
        "teacher": _identity(teacher, data.teacher_tokenizers[teacher.name]),
        "student": _identity(spec.student, data.tokenizer),
    }


NAMES = {"name", "path", "revision", "tokenizer", "pretrain"}
HARMLESS = {"align", "attention", "lora", "gradient_checkpointing", "template", "rationale", "placement"}


def _identity(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Subject:
    """Weights by hash or commit, not by the folder's name, which may change; and how they are loaded."""
    known = model.model_dump(mode="json", exclude=NAMES | HARMLESS) | {"tokenizer": tokenizer_hash(tokenizer)}
    if model.path is None:
        return known
    found = model_facts(model)
    return known | {"weights": found.get("sha256") or found.get("commit") or model.path}


def tokenizer_hash(tokenizer: Any) -> str:
    """sha256 of what decides which tokens a text becomes."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def is_current(path: Path, subject: Subject) -> bool:
    """Whether the file is whole and holds the measurement of exactly this subject."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        whole = record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        return bool(whole and record["measured"] == json.loads(json.dumps(subject)))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def assert_same_models(path: Path, models: Subject, *, teacher: str) -> None:
    """SpecError where a map the spec names was measured on another teacher or student.

    Its examples and settings may be others; a file that is missing or damaged is left to the layer mapper.
    """
    try:
        measured = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError, TypeError):
        return
    for side, now in json.loads(json.dumps(models)).items():
        if differing := [key for key in now if measured.get(side, {}).get(key) != now[key]]:
            raise SpecError(
                f"teacher {teacher!r}: layer_mapper.map: {path}: was measured with another {side} "
                f"({', '.join(differing)} differ); measure again with kava calibrate, or leave 'map' out"
            )


def write_map(
    path: Path, state: dict[str, Tensor], weights: Tensor, *, on: str, examples: int, subject: Subject
) -> None:
    """Write both files, the record last: it describes the other file, so half of a map is never taken.

    Args:
        path: of the ``.safetensors`` file.
        state: the mapper's ``state_dict()``.
        weights: ``layer t_layer``, for the list that a person reads.
        on: what was compared.
        examples: how many were looked at.
        subject: what was measured.

    Raises:
        KavaError: the folder cannot be written.
    """
    raw = save({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()})
    _replace(path, raw)
    record = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "on": on,
        "examples": examples,
        "layers": {str(i): {str(j): round(w, 4) for j, w in row} for i, row in enumerate(chosen(weights))},
        "measured": subject,
        "versions": {name: found for name, found in versions().items() if found},
    }
    write_json(path.with_suffix(".json"), record)


def chosen(weights: Tensor) -> list[list[tuple[int, float]]]:
    """For every student layer the teacher layers it reads, heaviest first, with their weights."""
    rows = [[(j, w) for j, w in enumerate(row) if w > 0] for row in weights.tolist()]
    return [sorted(row, key=lambda one: -one[1]) for row in rows]


def _replace(path: Path, raw: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise KavaError(f"{path}: cannot be written: {error.strerror}") from error
