"""Fixtures of several rooms. Shape checking is on unless ``KAVA_SHAPE_CHECK=0``. No torch here."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("KAVA_SHAPE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

from kava_core.errors import SpecError
from kava_core.specfile.load import load_spec
from kava_core.specfile.variants import resolve_variants
from tests.support.repository import MINIMAL_SPEC, SHARED_DATA


def pytest_collection_finish() -> None:
    """Keep the garbage collector from looking at every import again: each run calls it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained tokenizers and teachers are shared by the tests of one session, and by nobody else."""
    of_session = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        of_session = of_session.parent
    monkeypatch.setenv("KAVA_CACHE", str(of_session / "cache"))


@pytest.fixture(autouse=True, scope="session")
def _processes_begin_unchecked() -> Iterator[None]:
    """Shapes are checked in the tests' own process; another one would take longer to begin."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KAVA_SHAPE_CHECK", "0")
        yield


@pytest.fixture
def shared_data() -> Path:
    """The real data beside the checkout; the test is skipped where it is absent."""
    if not SHARED_DATA.is_dir():
        pytest.skip(f"no real data at {SHARED_DATA} (set KAVA_SHARED_DATA)")
    return SHARED_DATA


@pytest.fixture
def resolve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Resolve the variants of the minimal spec with these lines appended."""
    monkeypatch.chdir(tmp_path)

    def read(more: str, *overrides: str) -> Any:
        Path("s.yaml").write_text(MINIMAL_SPEC.read_text(encoding="utf-8") + more, encoding="utf-8")
        return resolve_variants(load_spec("s.yaml", overrides))

    return read


@pytest.fixture
def refused(resolve: Any) -> Any:
    """The lines of the error that resolving ends in."""

    def lines(*arguments: str) -> list[str]:
        with pytest.raises(SpecError) as caught:
            resolve(*arguments)
        return str(caught.value).splitlines()

    return lines
