"""Every test runs with shape checking on, unless the environment says ``KAVA_SHAPE_CHECK=0``."""

import os
from pathlib import Path

os.environ.setdefault("KAVA_SHAPE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trained tokenizers and teachers are shared by the tests of one session, and by nobody else."""
    cache = tmp_path_factory.getbasetemp() / "cache"
    monkeypatch.setenv("KAVA_CACHE", str(cache))


@pytest.fixture
def shared_data() -> Path:
    """The real data beside the checkout; the test is skipped where it is absent."""
    folder = Path(os.environ.get("KAVA_SHARED_DATA") or Path(__file__).parents[2] / "shared" / "data")
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder} (set KAVA_SHARED_DATA)")
    return folder
