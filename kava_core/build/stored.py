"""Train from a teacher store: find the store that belongs to a run, and put its targets into the batches."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kava_core.build.data import Data
from kava_core.build.layer_maps import wants_measuring
from kava_core.build.pipeline import config_geometries, make_pipeline, student_config_geometry
from kava_core.build.provenance import aligning_configs, models_of, plugin_code, tokenizer_hash
from kava_core.data.collate import Collator, EncodedExample
from kava_core.data.examples import Example
from kava_core.data.splits import split_hash
from kava_core.data.store.index import (
    FORMAT,
    MAPS_FOLDER,
    Ingredients,
    Layout,
    ingredient_differences,
    nearest_store,
    read_index,
    store_digest,
)
from kava_core.data.store.reader import Store
from kava_core.errors import SpecError
from kava_core.files import file_hash
from kava_core.kv.align.aligner import TeacherAligner
from kava_core.kv.compare.pipeline import KVPipeline
from kava_core.protocols.axes import Geometry
from kava_core.runs import checkpoint
from kava_core.specfile.questions import compared_parts, used_components, used_teachers
from kava_core.specfile.sections.models import TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.specfile.sections.training import StoreSpec
from kava_core.versions import distributor, version_of

AGAIN = "run `kava cache` with this spec and these overrides"


class StoredCollator(Collator):
    """Collates the student's side as usual, and in place of the teachers' tokens their targets from a store.

    Targets are passed on as they are stored, so that bf16 and int8 cross to the device narrow.
    """

    def __init__(self, plain: Collator, store: Store) -> None:
        super().__init__(
            plain.student_tokenizer,
            {},
            plain.template,
            plain.loss_on,
            max_length=plain.max_length,
            pad_to_multiple=plain.pad_to_multiple,
        )
        self.store = store

    def __call__(self, batch: Sequence[Example | EncodedExample]) -> dict[str, Any]:
        """Return ``{"student": Side with labels, "teachers": {name: side of the store}, "labels": …}``."""
        collated = super().__call__(batch)
        examples = [entry.example if isinstance(entry, EncodedExample) else entry for entry in batch]
        keys = [example_key(example) for example in examples]
        collated["teachers"] = self.store.batch(keys, collated["student"]["input_ids"].shape[1])
        return collated


def example_key(example: Example) -> str:
    """Return an example's name in a store: a hash of its texts, so the order of the data does not matter."""
    texts = json.dumps([example.prompt, example.reasoning, example.answer, *example.rationales])
    return hashlib.sha256(texts.encode()).hexdigest()[:32]


def with_store(spec: PipelineSpec, data: Data, *, seed: int) -> tuple[PipelineSpec, Data]:
    """Return the spec and data of a run that reads its store; both unchanged if it has none or needs none.

    Args:
        spec: with every model ready to load.
        data: the run's.
        seed: the run's.

    Raises:
        SpecError: nothing is stored for this run, or what is stored was made from something else.
        CheckpointError: the store is damaged.
    """
    if spec.store is None or not used_teachers(spec):
        return spec, data
    store = open_store(spec.store, store_ingredients(spec, data, seed=seed))
    reading = StoredCollator(data.plain_collator, store)
    mapped = with_maps_of(spec, store.folder / MAPS_FOLDER)
    return mapped, replace(data, collator=reading, plain_collator=reading, store=store)


def with_maps_of(spec: PipelineSpec, folder: Path) -> PipelineSpec:
    """Return the spec with the store's map for every layer mapper that would be measured."""
    teachers = tuple(
        _with_stored_map(teacher, folder / f"{teacher.name}.safetensors") for teacher in spec.teachers
    )
    return spec.model_copy(update={"teachers": teachers})


def _with_stored_map(teacher: TeacherSpec, file: Path) -> TeacherSpec:
    mapper = teacher.align.layer_mapper
    if not wants_measuring(mapper):
        return teacher
    mapper = mapper.model_copy(update={"map": str(file.absolute())})
    return teacher.model_copy(update={"align": teacher.align.model_copy(update={"layer_mapper": mapper})})


def store_folder(store: StoreSpec, wanted: Ingredients) -> Path:
    """Return the folder in which the store with these ingredients is or will be."""
    return Path(store.folder) / store_digest(wanted)


def open_store(store: StoreSpec, wanted: Ingredients) -> Store:
    """Open the store with exactly these ingredients; every file's size is checked.

    Its shards' content is checked when they are first read.

    Raises:
        SpecError: there is none; the error names what differs from the nearest one.
        CheckpointError: a file is missing or has another size.
    """
    folder = store_folder(store, wanted)
    if not folder.is_dir():
        raise SpecError(f"store: {_why_absent(folder, wanted)}")
    checkpoint.verify(folder, content=False)
    differing = ingredient_differences(wanted, read_index(folder).ingredients)
    if differing:
        raise SpecError(f"store: {folder}: {'; '.join(differing)}; delete it and {AGAIN}")
    return Store(folder)


def _why_absent(folder: Path, wanted: Ingredients) -> str:
    if unfinished_folder(folder).is_dir():
        return f"{folder}: not finished; {AGAIN}: it goes on where it stopped"
    near = nearest_store(folder.parent, wanted)
    if near is None:
        return f"{folder.parent}: nothing is stored for this spec; {AGAIN} first"
    other, differing = near
    return f"{other} is out of date: {'; '.join(differing)}; to make a new one {AGAIN}"


def unfinished_folder(folder: Path) -> Path:
    """Return the folder in which a store is being made."""
    return folder.with_name(f"{folder.name}.partial")


def store_ingredients(spec: PipelineSpec, data: Data, *, seed: int) -> Ingredients:
    """Return everything that the stored numbers depend on, by a name that a person reads.

    Raises:
        SpecError: a component that makes the target is trained, so there is no fixed target.
    """
    assert spec.store is not None
    pipeline = config_pipeline(spec, data, seed=seed)
    assert_fixed(spec, pipeline)
    shared: dict[str, Any] = {
        "store format": FORMAT,
        "kava": version_of("kava"),
        "store.dtype": spec.store.dtype,
        "student's tokenizer": tokenizer_hash(data.tokenizer),
        "student's geometry": _geometry_text(student_config_geometry(spec, data)),
        "training examples": _set_hash(data.train_items.examples),
        "validation examples": _set_hash(data.validation_items.examples),
        "data.template": spec.data.template.model_dump(mode="json"),
        "train.max_length": spec.train.max_length,
        "train.precision": spec.train.precision,
        "compared layers": list(pipeline.layers),
        "compared parts": list(compared_parts(spec)),
        "rotary": "keep" if spec.rotary == "keep" else "strip",
    }
    if "queries" in compared_parts(spec):
        shared["scale of queries"] = "that of the model's attention"
    plugins = {}
    for kind, config in used_components(spec):
        if kind not in ("fuser", "kv_loss"):
            plugins[f"{kind} {config.name}"] = distributor(type(config).__module__)
    ingredients = shared | {"plugins": plugins}
    for name, digest in plugin_code(aligning_configs(spec)).items():
        ingredients[f"code of plugin {name}"] = digest
    for teacher in spec.teachers:
        ingredients |= _teacher_ingredients(spec, teacher, data)
    if looks_at_data(spec, pipeline):
        ingredients |= _calibration_ingredients(spec, data)
    if depends_on_student(spec, pipeline):
        ingredients |= _student_ingredients(spec, data, seed)
    as_read_from_json: Ingredients = json.loads(json.dumps(ingredients))
    return as_read_from_json


def _geometry_text(geometry: Geometry) -> str:
    return f"{geometry}, {geometry.qhead} query heads"


def config_pipeline(spec: PipelineSpec, data: Data, *, seed: int) -> KVPipeline:
    """Build the run's pipeline from the models' configs alone: no model is loaded."""
    student = student_config_geometry(spec, data)
    return make_pipeline(spec, config_geometries(spec, data), student, seed=seed)


def store_layout(spec: PipelineSpec, pipeline: KVPipeline) -> Layout:
    """Return what is stored for each position: of every teacher and part the extents ``layer head dim``."""
    assert spec.store is not None
    extents = {}
    for aligner in pipeline.teachers:
        extents[aligner.name] = {
            part: _position_extents(aligner.target, part) for part in compared_parts(spec)
        }
    return Layout(spec.store.dtype, extents)


def _position_extents(target: Geometry, part: Any) -> tuple[int, int, int]:
    return target.layer, target.heads(part), target.dim


def _teacher_ingredients(spec: PipelineSpec, teacher: TeacherSpec, data: Data) -> dict[str, Any]:
    whose = f"of teacher {teacher.name!r}"
    weights = dict(models_of(spec, teacher, data)["teacher"])
    tokenizer = weights.pop("tokenizer")
    if teacher.path is None:
        weights["torch"] = torch.__version__  # draws them
    ingredients = {
        f"weights {whose}": weights,
        f"tokenizer {whose}": tokenizer,
        f"text {whose}": [teacher.template and teacher.template.model_dump(mode="json"), teacher.rationale],
        f"alignment {whose}": teacher.align.model_dump(mode="json"),
    }
    map_given = getattr(teacher.align.layer_mapper, "map", None)
    if map_given:
        file = Path(map_given)
        ingredients[f"layer map {whose}"] = file_hash(file) if file.is_file() else None
    return ingredients


def _calibration_ingredients(spec: PipelineSpec, data: Data) -> dict[str, Any]:
    count = min(spec.train.calibration_examples, len(data.train_items))
    return {
        "train.calibration_examples": count,
        "calibration examples": split_hash(data.train_items.examples[:count]),
        "train.batch_size": spec.train.batch_size,
    }


def _student_ingredients(spec: PipelineSpec, data: Data, seed: int) -> dict[str, Any]:
    weights = dict(models_of(spec, spec.teachers[0], data)["student"])
    del weights["tokenizer"]
    return {"student's weights": weights, "seed": seed if spec.student.path is None else None}


def looks_at_data(spec: PipelineSpec, pipeline: KVPipeline) -> bool:
    """Return whether something is computed from the first training examples before the targets."""
    return any(a.wants_calibration for a in pipeline.teachers) or _measures_layers(spec)


def depends_on_student(spec: PipelineSpec, pipeline: KVPipeline) -> bool:
    """Return whether the stored state depends on the student, so that a store belongs to one seed."""
    return _measures_layers(spec) or any(_is_paired(aligner) for aligner in pipeline.teachers)


def _measures_layers(spec: PipelineSpec) -> bool:
    return any(wants_measuring(teacher.align.layer_mapper) for teacher in spec.teachers)


def _is_paired(aligner: TeacherAligner) -> bool:
    """Return whether a projector may look at the student when calibrated; it can set ``paired = False``."""
    return aligner.wants_calibration and (
        aligner.lifts or bool(getattr(aligner.dim_projector, "paired", True))
    )


def assert_fixed(spec: PipelineSpec, pipeline: KVPipeline) -> None:
    """Check that no component between a teacher's cache and its target is trained.

    Raises:
        SpecError: names the first one that is.
    """
    for teacher, aligner in zip(spec.teachers, pipeline.teachers, strict=True):
        for kind, component in _target_components(aligner).items():
            if component is None or not any(p.requires_grad for p in component.parameters()):
                continue
            name = getattr(teacher.align, kind).name
            raise SpecError(
                f"store: {kind} {name!r} of teacher {teacher.name!r} is trained with the student, so its "
                "targets change at every step; choose one that is not (trainable: false, where it has that), "
                "use direction: to_teacher if it is the head adapter or projector, or set store: null"
            )


def _target_components(aligner: TeacherAligner) -> dict[str, Any]:
    """Return the components that a target goes through, by their field in the spec; None if there is none."""
    plan = aligner.time_plan
    components: dict[str, Any] = {
        "layer_mapper": aligner.layer_map,
        "token_warper": plan.token_warper,
        "time_warper": plan.time_warper,
    }
    if not aligner.lifts:
        components |= {"head_adapter": aligner.head_adapter, "dim_projector": aligner.dim_projector}
    return components


def _set_hash(examples: Sequence[Example]) -> str:
    keys = sorted({example_key(example) for example in examples})
    return hashlib.sha256("".join(keys).encode()).hexdigest()
