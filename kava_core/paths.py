"""Where kava keeps things outside run directories."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$KAVA_CACHE``, or ``kava`` in the user's cache folder: trained tokenizers and embedded teachers."""
    given = os.environ.get("KAVA_CACHE")
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(given) if given else base / "kava"
