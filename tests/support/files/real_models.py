"""Find the real pretrained models that some tests need; they are in no repository."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "KAVA_REAL_MODELS"
"""Names the folder with ``smollm2-135m`` and ``gemma3-270m`` as transformers folders."""


def real_model(name: str) -> Path:
    """Return the folder of a real model, or skip the test and say why."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} names no folder with real models")
    folder = Path(root) / name
    if not (folder / "config.json").is_file():
        pytest.skip(f"{folder}: no such model")
    return folder


def real_gguf(name: str) -> Path:
    """Return the GGUF file of a real model, ``NAME.gguf`` beside its folder, or skip the test."""
    root = os.environ.get(VARIABLE)
    if not root:
        pytest.skip(f"{VARIABLE} names no folder with real models")
    file = Path(root) / f"{name}.gguf"
    if not file.is_file():
        pytest.skip(f"{file}: no such file")
    return file
