"""Read and write small files: folders outside run directories, hashes, JSON that is replaced in one step."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kava_core.errors import CheckpointError, KavaError, SpecError


def cache_folder() -> Path:
    """Return ``$KAVA_CACHE``, or ``kava`` in the user's cache folder.

    It holds trained tokenizers and embedded teachers.
    """
    given = os.environ.get("KAVA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kava"


def assert_folder_or_hub_name(path: str, where: str) -> None:
    """Refuse a path that is no folder, and can be no name on the hub either.

    Args:
        path: a folder, or a name such as ``organisation/model``.
        where: how the error names the field.

    Raises:
        SpecError: there is no such folder.
    """
    if Path(path).is_dir():
        return
    if Path(path).exists():
        raise SpecError(f"{where}: {path}: is a file; give the folder that holds it")
    looks_like_path = path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/")
    if looks_like_path:
        hint = "; '~' is not expanded here" if path.startswith("~") else ""
        raise SpecError(f"{where}: {path}: no such folder{hint}")


def make_folder(folder: Path) -> None:
    """Make a folder, with its parents, if it is not there.

    Raises:
        KavaError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let one process of several run the block at a time, also on a shared disk that has locks.

    Args:
        file: made if it is not there, in a folder that is; what it holds does not matter.
    """
    with file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def file_hash(file: Path) -> str:
    """Return the sha256 of a file, which is read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def replace_file(path: Path, raw: bytes) -> None:
    """Replace a file in one step, readable for whom the umask allows; its folder is made if need be.

    ``safetensors.torch.save_file`` would write files that only their owner can read.

    Raises:
        KavaError: it cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            stream.write(raw)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise KavaError(f"{path}: cannot be written: {error.strerror}") from error


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file in one step, so that nobody ever reads half of it.

    Raises:
        KavaError: the file cannot be written.
    """
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            json.dump(value, stream, indent=1, ensure_ascii=False)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    except OSError as error:
        raise KavaError(f"{path}: cannot be written: {error.strerror}") from error


def read_json(file: Path) -> Any:
    """Return the value in a JSON file.

    Raises:
        CheckpointError: the file is missing or is not JSON.
    """
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: unreadable: {error}") from error


def read_json_object(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is not JSON, or holds something else than an object.
    """
    value = read_json(file)
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, not an object")
    return value


def finite_or_null(value: Any) -> Any:
    """Return a copy of nested values with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, Mapping):
        return {name: finite_or_null(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite_or_null(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
