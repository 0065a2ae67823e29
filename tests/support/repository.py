"""Places in the repository, and the real data beside it."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MINIMAL_SPEC = Path(__file__).with_name("minimal_spec.yaml")
SHARED_DATA = Path(os.environ.get("KAVA_SHARED_DATA") or ROOT.parent / "shared" / "data")


def real_model(name: str) -> Path:
    """Return a real model's folder below ``KAVA_REAL_MODELS``; skip the test where it is absent."""
    folder = os.environ.get("KAVA_REAL_MODELS")
    if folder is None:
        pytest.skip("no real models: KAVA_REAL_MODELS names no folder")
    path = Path(folder) / name
    if not (path / "config.json").is_file():
        pytest.skip(f"no real model at {path}")
    return path
