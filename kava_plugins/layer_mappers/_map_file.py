"""Read similarities that were measured before: the ``.safetensors`` file and the ``.json`` beside it."""

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

MEASURE_AGAIN = "measure again with kava calibrate"


def read_similarity(
    file: str, on: str, *, teacher: Geometry, student: Geometry
) -> Float[Tensor, "layer t_layer"]:
    """Read the similarities in a map file.

    Raises:
        SpecError: a file is missing or altered, or was measured on other layers or not on ``on``.
    """
    path = Path(file)
    record = _read_record(path.with_suffix(".json"), path)
    raw = _read_bytes(path, path)
    if hashlib.sha256(raw).hexdigest() != record.get("sha256"):
        raise SpecError(f"map: {path}: is not the file that {path.stem}.json describes; {MEASURE_AGAIN}")
    if record.get("on") != on:
        raise SpecError(
            f"map: {path}: was measured on {record.get('on')}, not on {on}; {MEASURE_AGAIN}, or set 'on'"
        )
    similarity = _similarity_tensor(raw, path)
    if similarity.shape != (student.layer, teacher.layer):
        layers = " × ".join(map(str, similarity.shape))
        raise SpecError(
            f"map: {path}: holds {layers} layers, but the student has {student.layer} and the teacher "
            f"{teacher.layer}; {MEASURE_AGAIN}"
        )
    return similarity


def _read_bytes(file: Path, map_path: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise SpecError(
            f"map: {map_path}: cannot read {file.name}: {error.strerror}; {MEASURE_AGAIN}"
        ) from error


def _read_record(file: Path, map_path: Path) -> dict[str, Any]:
    raw = _read_bytes(file, map_path)
    try:
        return dict(json.loads(raw))
    except (ValueError, TypeError, RecursionError) as error:
        raise SpecError(f"map: {map_path}: {file.name} is damaged: {error}; {MEASURE_AGAIN}") from error


def _similarity_tensor(raw: bytes, path: Path) -> Tensor:
    try:
        return load(raw)["similarity"]
    except (SafetensorError, KeyError) as error:
        raise SpecError(f"map: {path}: holds no similarities: {error}; {MEASURE_AGAIN}") from error
