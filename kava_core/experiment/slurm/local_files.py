"""Check that the files which a run reads are on this disk, for nodes without a network."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from kava_core.errors import KavaError
from kava_core.specfile.sections.data import HubData
from kava_core.specfile.sections.models import ModelSpec
from kava_core.specfile.sections.pipeline import PipelineSpec

TRUE_WORDS = {"1", "ON", "YES", "TRUE"}


def hub_is_offline() -> bool:
    """Return whether the environment forbids to ask the hub, as huggingface_hub and transformers read it."""
    return any(
        os.environ.get(name, "").upper() in TRUE_WORDS for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def missing_models(specs: Iterable[PipelineSpec]) -> list[str]:
    """Return a line for every model and tokenizer that is named and not whole on this disk."""
    needed: dict[tuple[str, str | None, str], None] = {}
    for spec in specs:
        for model in _models_of_spec(spec):
            needed |= dict.fromkeys(_needed_files(model))
    # Model and tokenizer of one GGUF file have one fault.
    faults = dict.fromkeys(_fault_of_files(*files) for files in needed)
    return [fault for fault in faults if fault]


def missing_data(specs: Iterable[PipelineSpec], root: Path) -> list[str]:
    """Return a line for all data that cannot be read. Hub names are left alone if the hub may be asked."""
    from kava_core.data.splits import load_splits

    faults: dict[str, None] = {}
    for data in {spec.data.model_dump_json(): spec.data for spec in specs}.values():
        if isinstance(data, HubData) and not hub_is_offline() and not Path(data.path).exists():
            continue
        try:
            load_splits(data, root=root)
        except KavaError as error:
            faults[str(error)] = None
    return list(faults)


def _models_of_spec(spec: PipelineSpec) -> tuple[ModelSpec, ...]:
    from kava_core.specfile.questions import used_teachers

    return (spec.student, *used_teachers(spec))


def _needed_files(model: ModelSpec) -> Iterator[tuple[str, str | None, str]]:
    """Yield names or folders, with revision, and ``model`` or ``tokenizer``: what is read of them."""
    if model.path is not None:
        yield from _files_of_path(model.path, model.revision, "model")
    tokenizer = model.tokenizer or model.path
    if isinstance(tokenizer, str):
        revision = model.revision if tokenizer == model.path else None
        yield from _files_of_path(tokenizer, revision, "tokenizer")


def _files_of_path(path: str, revision: str | None, what: str) -> Iterator[tuple[str, str | None, str]]:
    """Yield what is read of a path: of an adapter also its base model, for weights and tokenizer."""
    from kava_core.data.pretrained.origin import base_of_adapter, is_adapter

    if not is_adapter(path):
        yield path, revision, what
        return
    if what == "model":
        yield path, None, "adapter"
    elif _tokenizer_fault(Path(path)) is None:
        yield path, None, "tokenizer"
        return
    yield (*base_of_adapter(Path(path), where=path), what)


def _fault_of_files(name: str, revision: str | None, what: str) -> str | None:
    from kava_core.data.pretrained.gguf import is_gguf

    folder = Path(name)
    if is_gguf(name):
        return None if folder.is_file() else f"{name}: no such file"
    if not folder.is_dir():
        if not hub_is_offline():
            return None
        cached = _cached_folder(name, revision, "config.json" if what == "model" else "tokenizer_config.json")
        if cached is None:
            return f"{name}: {what} not in the hub's cache, and HF_HUB_OFFLINE is set"
        folder = cached
    fault = _FAULTS[what](folder)
    return fault and f"{name}: {fault}"


def _cached_folder(name: str, revision: str | None, file: str) -> Path | None:
    """Return the cached folder of a hub name if it holds this file."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file, revision=revision)
    except HFValidationError:
        return None
    return Path(cached).parent if isinstance(cached, str) else None


def _model_fault(folder: Path) -> str | None:
    if not (folder / "config.json").exists():
        return "no config.json"
    index = folder / "model.safetensors.index.json"
    if not index.exists():
        return None if any(folder.glob("*.safetensors")) else "no safetensors file"
    try:
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        return f"{index.name}: unreadable: {error}"
    absent = sorted(file for file in files if not (folder / file).exists())
    return f"no {', '.join(absent)}" if absent else None


def _tokenizer_fault(folder: Path) -> str | None:
    names = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "tokenizer.model", "vocab.txt")
    return None if any((folder / name).exists() for name in names) else "no tokenizer"


def _adapter_fault(folder: Path) -> str | None:
    file = "adapter_model.safetensors"
    return None if (folder / file).exists() else f"no {file}"


_FAULTS = {"model": _model_fault, "tokenizer": _tokenizer_fault, "adapter": _adapter_fault}
