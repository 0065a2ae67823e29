"""Find the files behind a model's ``path``: hub name, folder, GGUF file, or PEFT adapter folder."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kava_core.data.pretrained.gguf import gguf_description, is_gguf
from kava_core.errors import KavaError, SpecError
from kava_core.files import assert_folder_or_hub_name, read_json_object

ADAPTER_CONFIG = "adapter_config.json"
"""The file by which a folder is known as a PEFT adapter's."""

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")


@dataclass(frozen=True)
class Origin:
    """Where transformers finds the parts of a model."""

    config: str
    """Folder or hub name of the config; also of the weights, unless there is a GGUF file."""
    tokenizer: str
    """Folder or hub name of the tokenizer."""
    revision: str | None
    """Commit or tag of ``config`` on the hub."""
    tokenizer_revision: str | None
    """Commit or tag of ``tokenizer`` on the hub."""
    gguf: Path | None = None
    """The file with the weights, if they are GGUF."""
    adapter: Path | None = None
    """The folder of an adapter that is merged into the weights."""
    base: str | None = None
    """The path of the adapter's base model, as kava takes any path; None without an adapter."""


def find_origin(path: str, revision: str | None, *, where: str) -> Origin:
    """Return where the parts of a model are.

    The first use of a GGUF file reads its config and tokenizer, and keeps them in the cache.

    Args:
        path: as in the spec.
        revision: as in the spec.
        where: how errors name the section.

    Raises:
        SpecError: there is no such file or folder, or it cannot be read.
    """
    if is_gguf(path):
        file = Path(path)
        folder = str(gguf_description(file, where=where))
        return Origin(folder, folder, None, None, gguf=file)
    assert_folder_or_hub_name(path, where)
    if is_adapter(path):
        return _origin_of_adapter(Path(path), where)
    return Origin(path, path, revision, revision)


def is_adapter(path: str) -> bool:
    """Return whether a path is the folder of a PEFT adapter, and of no whole model."""
    folder = Path(path)
    return (folder / ADAPTER_CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of_adapter(folder: Path, *, where: str) -> tuple[str, str | None]:
    """Return path and revision of the model that an adapter was trained on.

    A relative path counts from the working directory, as peft reads it, or else from the adapter's folder.

    Raises:
        SpecError: the adapter names none, one that is not there, or two folders can be meant.
    """
    fields = _adapter_config(folder, where)
    base = fields.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise SpecError(
            f"{where}: {folder / ADAPTER_CONFIG}: base_model_name_or_path is missing; write the base model's "
            "folder or hub name there"
        )
    candidates = {option.resolve(): str(option) for option in (Path(base), folder / base) if option.exists()}
    if len(candidates) > 1:
        raise SpecError(
            f"{where}: {folder / ADAPTER_CONFIG}: base_model_name_or_path {base!r} can be "
            f"{' or '.join(candidates.values())}; write an absolute path there"
        )
    found = next(iter(candidates.values()), base)
    if is_adapter(found):
        raise SpecError(f"{where}: {folder}: its base model {found} is an adapter too; merge that one first")
    return found, fields.get("revision")


def _origin_of_adapter(folder: Path, where: str) -> Origin:
    base, revision = base_of_adapter(folder, where=where)
    origin = find_origin(base, revision, where=f"{where}: base model of {folder}")
    origin = replace(origin, adapter=folder, base=base)
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        return replace(origin, tokenizer=str(folder), tokenizer_revision=None)
    return origin


def _adapter_config(folder: Path, where: str) -> dict[str, Any]:
    try:
        return read_json_object(folder / ADAPTER_CONFIG)
    except KavaError as error:
        raise SpecError(f"{where}: {error}") from error
