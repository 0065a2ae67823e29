"""Where kava keeps things outside run directories, and folders that it is told to write to."""

from __future__ import annotations

import os
from pathlib import Path

from kava_core.errors import KavaError


def cache_folder() -> Path:
    """``$KAVA_CACHE``, or ``kava`` in the user's cache folder: trained tokenizers and embedded teachers."""
    given = os.environ.get("KAVA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kava"


def make_folder(folder: Path) -> None:
    """Make the folder if it is not there; KavaError where it cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise KavaError(f"{folder}: cannot be written: {error.strerror}") from error
