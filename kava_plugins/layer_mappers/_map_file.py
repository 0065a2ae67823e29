"""Similarities that were measured before: the ``.safetensors`` file and the ``.json`` beside it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kava_core.errors import SpecError
from kava_core.protocols.axes import Geometry

ANEW = "measure again with kava calibrate"


def read_similarity(
    file: str, on: str, *, teacher: Geometry, student: Geometry
) -> Float[Tensor, "layer t_layer"]:
    """The similarities in a map file.

    Raises:
        SpecError: a file is missing or altered, or was measured on other layers or not on ``on``.
    """
    path = Path(file)
    record, raw = _record(path.with_suffix(".json"), path), _bytes(path, path)
    if hashlib.sha256(raw).hexdigest() != record.get("sha256"):
        raise SpecError(f"map: {path}: is not the file that {path.stem}.json describes; {ANEW}")
    if record.get("on") != on:
        raise SpecError(f"map: {path}: was measured on {record.get('on')}, not on {on}; {ANEW}, or set 'on'")
    similarity = _similarity(raw, path)
    if similarity.shape != (student.layer, teacher.layer):
        layers = " × ".join(map(str, similarity.shape))
        raise SpecError(
            f"map: {path}: holds {layers} layers, but the student has {student.layer} and the teacher "
            f"{teacher.layer}; {ANEW}"
        )
    return similarity


def _bytes(file: Path, named: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SpecError(f"map: {named}: cannot read {file.name}: {error.strerror}; {ANEW}") from error


def _record(file: Path, named: Path) -> dict[str, Any]:
    raw = _bytes(file, named)
    try:
        return dict(json.loads(raw))
    except (ValueError, TypeError) as error:
        raise SpecError(f"map: {named}: {file.name} is damaged: {error}; {ANEW}") from error


def _similarity(raw: bytes, path: Path) -> Tensor:
    try:
        return load(raw)["similarity"]
    except (SafetensorError, KeyError) as error:
        raise SpecError(f"map: {path}: holds no similarities: {error}; {ANEW}") from error
