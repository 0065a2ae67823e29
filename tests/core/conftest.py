"""Fixtures of several test files. No torch here: the torch-free sessions load it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kava_core.errors import SpecError
from kava_core.specfile.load import load
from kava_core.specfile.variants import resolve_variants

MINIMAL = Path(__file__).parent / "minimal_spec.yaml"


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Resolve the variants of the minimal spec with these lines appended."""
    monkeypatch.chdir(tmp_path)

    def read(more: str, *overrides: str) -> Any:
        Path("s.yaml").write_text(MINIMAL.read_text(encoding="utf-8") + more, encoding="utf-8")
        return resolve_variants(load("s.yaml", overrides))

    return read


@pytest.fixture
def refused(resolve: Any) -> Any:
    """The lines of the error that resolving ends in."""

    def lines(*arguments: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            resolve(*arguments)
        return str(caught.value).splitlines()

    return lines
