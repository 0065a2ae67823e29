"""Name folders outside run directories, make those that kava is told to write to, and hash files."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from kava_core.errors import KavaError


def cache_folder() -> Path:
    """Return ``$KAVA_CACHE``, or ``kava`` in the user's cache folder.

    It holds trained tokenizers and embedded teachers.
    """
    given = os.environ.get("KAVA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kava"


def make_folder(folder: Path) -> None:
    """Make a folder, with its parents, if it is not there.

    Raises:
        KavaError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error


def file_hash(file: Path) -> str:
    """Return the sha256 of a file, which is read piece by piece."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
