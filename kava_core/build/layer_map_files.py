"""Write and read measured layer maps: ``<teacher>.safetensors``, and beside it what was measured as JSON."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from kava_core.build.data import Data
from kava_core.build.provenance import STAND_IN, Subject, models_of, plugin_code
from kava_core.config import ComponentConfig
from kava_core.data.splits import split_hash
from kava_core.errors import SpecError
from kava_core.files import replace_file, write_json
from kava_core.runs.folder import PLUGIN_CODE
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.versions import versions


def measured_from(
    spec: PipelineSpec, teacher: TeacherSpec, config: ComponentConfig, data: Data, *, seed: int
) -> Subject:
    """Return all that a measurement depends on: both models, the examples, and the comparison's settings.

    Args:
        spec: the run's.
        teacher: whose layers are measured.
        config: the layer mapper that measures.
        data: the run's.
        seed: the run's; it counts only if the student has random weights.
    """
    count = min(spec.train.calibration_examples, len(data.train_items))
    settings: Subject = {
        "layer_mapper": config.model_dump(mode="json", exclude={"map"}),
        "token_warper": teacher.align.token_warper and teacher.align.token_warper.model_dump(mode="json"),
        "time_warper": teacher.align.time_warper.model_dump(mode="json"),
        "sinks": teacher.align.sinks,
        "template": (teacher.template or spec.data.template).model_dump(mode="json"),
        "rationale": teacher.rationale,
        "batch_size": spec.train.batch_size,
        "seed": seed if spec.student.path is None else None,
    }
    warpers = (teacher.align.token_warper, teacher.align.time_warper)
    code = plugin_code([config, *(warper for warper in warpers if warper is not None)])
    if code:  # Maps of kava's own components are named as before.
        settings[PLUGIN_CODE] = code
    return {
        **models_of(spec, teacher, data),
        "data": {"examples": count, "sha256": split_hash(data.train_items.examples[:count])},
        "settings": settings,
    }


def is_current(path: Path, subject: Subject) -> bool:
    """Return whether a map file is whole and was measured from exactly this subject."""
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        whole = record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        return bool(whole and record["measured"] == json.loads(json.dumps(subject)))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def assert_same_models(path: Path, models: Subject, *, teacher: str) -> None:
    """Check that a map named in the spec was measured on these models.

    Its examples and settings may be others; a file that is missing or damaged is left to the layer mapper.

    Args:
        path: of the ``.safetensors`` file.
        models: teacher and student, from ``models_of``.
        teacher: the teacher's name, for the error.

    Raises:
        SpecError: it was measured on another teacher or student.
    """
    try:
        measured = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["measured"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for side, now in json.loads(json.dumps(models)).items():
        recorded = measured.get(side, {})
        # A trained teacher has no stand-in among its own facts.
        names = dict.fromkeys([*now, STAND_IN])
        differing = [name for name in names if recorded.get(name) != now.get(name)]
        if differing:
            raise SpecError(
                f"teacher {teacher!r}: layer_mapper.map: {path}: was measured with another {side} "
                f"({', '.join(differing)} differ); measure again with kava calibrate, or leave 'map' out"
            )


def assert_same_code(path: Path, config: ComponentConfig, *, teacher: str) -> None:
    """Check that a map named in the spec was measured by the layer mapper's plugin as it is now.

    Nothing is known of maps that an earlier kava measured.

    Args:
        path: of the ``.safetensors`` file.
        config: the layer mapper that reads it.
        teacher: the teacher's name, for the error.

    Raises:
        SpecError: the plugin's code was another.
    """
    try:
        record = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        measured_by = dict(record["measured"]["settings"][PLUGIN_CODE])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    for name, digest in plugin_code([config]).items():
        if measured_by.get(name, digest) != digest:
            raise SpecError(
                f"teacher {teacher!r}: layer_mapper.map: {path}: the code of plugin {name} changed since it "
                "was measured; measure again with kava calibrate, or leave 'map' out"
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
    replace_file(path, raw)
    record = {
        "sha256": hashlib.sha256(raw).hexdigest(),
        "on": on,
        "examples": examples,
        "layers": _layers_for_reading(weights),
        "measured": subject,
        "versions": {name: version for name, version in versions().items() if version},
    }
    write_json(path.with_suffix(".json"), record)


def choose_layers(weights: Tensor) -> list[list[tuple[int, float]]]:
    """List, for every student layer, the teacher layers it reads with their weights, the heaviest first."""
    chosen = []
    for row in weights.tolist():
        read = [(layer, weight) for layer, weight in enumerate(row) if weight > 0]
        chosen.append(sorted(read, key=lambda layer_and_weight: -layer_and_weight[1]))
    return chosen


def _layers_for_reading(weights: Tensor) -> dict[str, dict[str, float]]:
    layers = {}
    for layer, chosen in enumerate(choose_layers(weights)):
        layers[str(layer)] = {str(t_layer): round(weight, 4) for t_layer, weight in chosen}
    return layers
