"""Collect what ``run.json`` records about the models and plugins of a run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from importlib.metadata import Distribution
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from kava_core.build.data import Data
from kava_core.config import ComponentConfig
from kava_core.data.pretrained.gguf import gguf_hash, is_gguf
from kava_core.data.pretrained.origin import base_of_adapter, is_adapter
from kava_core.files import file_hash
from kava_core.models.config import whole_config
from kava_core.registry import BUILT_IN
from kava_core.runs.folder import LAYER_MAPS, PLUGIN_CODE, Folder
from kava_core.specfile.questions import used_components
from kava_core.specfile.sections.models import ModelSpec, TeacherSpec
from kava_core.specfile.sections.pipeline import PipelineSpec
from kava_core.versions import distribution_of, distributor, plugin_code_hash


def run_provenance(spec: PipelineSpec) -> dict[str, Any]:
    """Return where every model and component comes from, with hashes, and which layer maps are used."""
    teachers = {teacher.name: _teacher_facts(teacher) for teacher in spec.teachers}
    return {
        "models": {"student": model_facts(spec.student)} | teachers,
        "plugins": plugin_facts(spec),
        PLUGIN_CODE: plugin_code(used_configs(spec)),
        LAYER_MAPS: map_facts(spec),
    }


def _teacher_facts(teacher: TeacherSpec) -> dict[str, Any]:
    """Return where a teacher comes from; a control in its place has none of its results."""
    facts = model_facts(teacher)
    if teacher.stand_in is None:
        return facts
    known = {name: value for name, value in facts.items() if name != "results"}
    return known | {STAND_IN: teacher.stand_in.model_dump(mode="json")}


def model_facts(model: ModelSpec) -> dict[str, Any]:
    """Return where a model comes from.

    For a folder: sha256 of its configs and weights; for a GGUF file its own; for a hub model: its commit;
    else that its weights are random. For an adapter also the facts of its ``base``. For a student that kava
    trained also its last ``results``: how good a teacher it can be.
    """
    if model.path is None:
        return {"origin": "random weights"}
    folder = Path(model.path)
    if is_gguf(model.path):
        return {"origin": model.path, "sha256": {folder.name: gguf_hash(folder)}}
    if not folder.is_dir():
        commit = getattr(whole_config(model, where=model.path), "_commit_hash", None)
        return {"origin": model.path, "commit": commit}
    files = sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    hashes = {file.name: file_hash(file) for file in files}
    facts = {"origin": model.path, "sha256": hashes, **_teacher_results(Folder(folder.parent))}
    if is_adapter(model.path):
        base, revision = base_of_adapter(folder, where=model.path)
        facts["base"] = model_facts(ModelSpec(path=base, revision=revision))
    return facts


def _teacher_results(run: Folder) -> dict[str, Any]:
    """Return the results of a finished run of kava's; empty for any other folder."""
    record = run.record() if run.record_file.is_file() else {}
    return {"results": record["results"]} if record.get("status") == "complete" else {}


def map_facts(spec: PipelineSpec) -> dict[str, str]:
    """Return the sha256 of every teacher's layer map, by the teacher's name."""
    hashes = {}
    for teacher in spec.teachers:
        file = getattr(teacher.align.layer_mapper, "map", None)
        if file is not None:
            hashes[teacher.name] = file_hash(Path(file))
    return hashes


def plugin_facts(spec: PipelineSpec) -> dict[str, str | None]:
    """Map ``kind name`` of every component to ``distribution version``."""
    return {
        f"{kind} {config.name}": distributor(type(config).__module__)
        for kind, config in used_components(spec)
    }


def used_configs(spec: PipelineSpec) -> list[ComponentConfig]:
    """Return the declaration of every component that a run of this spec builds."""
    fusers = [spec.fuser] if spec.teachers else []
    return [*aligning_configs(spec), *fusers, *spec.losses]


def aligning_configs(spec: PipelineSpec) -> list[ComponentConfig]:
    """Return the declarations of the components that bring teachers' caches to their targets."""
    configs = []
    for teacher in spec.teachers:
        fields = [getattr(teacher.align, name) for name in type(teacher.align).model_fields]
        configs += [field for field in fields if isinstance(field, ComponentConfig)]
    return configs


def plugin_code(configs: Iterable[ComponentConfig]) -> dict[str, str]:
    """Return the sha256 of the code of every third-party plugin behind these declarations.

    Releases of kava itself are told apart by their version.

    Args:
        configs: declarations of components.

    Returns:
        By the distribution's name; by the package's, if no distribution brought it.

    Raises:
        PluginError: a file of a plugin cannot be read.
    """
    modules: dict[str, set[str]] = {}
    owners: dict[str, Distribution | None] = {}
    for config in configs:
        declared_in, implemented_in = type(config).__module__, type(config).component.partition(":")[0]
        owner = distribution_of(declared_in)
        name = declared_in.partition(".")[0] if owner is None else owner.name
        if name != BUILT_IN:
            owners[name] = owner
            modules.setdefault(name, set()).update((declared_in, implemented_in))
    return {name: plugin_code_hash(owners[name], found) for name, found in sorted(modules.items())}


STAND_IN = "stand_in"
"""What records call the control in a teacher's place; absent if there is none."""

Subject = dict[str, Any]
"""What a measurement depends on; measured again where any of it differs."""


def models_of(spec: PipelineSpec, teacher: TeacherSpec, data: Data) -> Subject:
    """Return what distinguishes the teacher and the student from other models."""
    return {
        "teacher": model_identity(teacher, data.teacher_tokenizers[teacher.name]),
        "student": model_identity(spec.student, data.tokenizer),
    }


NAMES = {"name", "path", "revision", "tokenizer", "pretrain"}


HARMLESS = {"align", "attention", "lora", "gradient_checkpointing", "template", "rationale", "placement"}


def model_identity(model: ModelSpec, tokenizer: PreTrainedTokenizerBase) -> Subject:
    """Return how a model is loaded, and its weights by hash or commit: the folder's name may change."""
    known = model.model_dump(mode="json", exclude=NAMES | HARMLESS) | {"tokenizer": tokenizer_hash(tokenizer)}
    if model.path is None:
        return known
    facts = model_facts(model)
    return known | {"weights": _weights_of(facts)}


def _weights_of(facts: dict[str, Any]) -> Any:
    """Return hashes, or commit, or only the name of where weights come from, with those of the base model."""
    own = facts.get("sha256") or facts.get("commit") or facts["origin"]
    return [own, _weights_of(facts["base"])] if "base" in facts else own


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the sha256 of what decides which tokens a text becomes."""
    parts = json.loads(tokenizer.backend_tokenizer.to_str())
    kept = {name: part for name, part in parts.items() if name not in ("padding", "truncation")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()
