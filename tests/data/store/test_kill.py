"""kill -9 at every border of writing a store: it never looks complete, and going on completes it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from kava_core.data.store.index import INDEX_FILE
from kava_core.runs import checkpoint
from tests.support import quick_python
from tests.support.repository import ROOT

pytestmark = pytest.mark.slow

BORDERS = {
    "a shard without its record": "writer.write_json = die",
    "a shard with its record": "writer.StoreWriter._begin_shard = die_at(2, writer.StoreWriter._begin_shard)",
    "half a shard": "writer.save_file = die_at(2, writer.save_file)",
    "a whole index, not sealed": "cache.drop_records = die",
    "records gone, not sealed": "checkpoint.seal = die",
    "sealed in all but name": "checkpoint.discard = die",
}

WRITER = """
import os, signal, sys
from pathlib import Path
from kava_core.data.store import writer
from kava_core.jobs import cache
from kava_core.runs import checkpoint
from tests.support import tiny

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def die_at(call, function):
    left = [call]
    def counting(*given, **named):
        left[0] -= 1
        return function(*given, **named) if left[0] > 0 else die()
    return counting

def attempt(folder, border):
    class Small(writer.StoreWriter):
        def __init__(self, *given, **named):
            super().__init__(*given, **named)
            self.limit = 4000
    cache.StoreWriter = Small
    exec(border)
    made = tiny.spec(store={"folder": folder, "dtype": "bfloat16"}, data={"train": 24})
    cache.write_store(made, seed=0)

attempt(*sys.argv[1:])
"""


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path, str], int]:
    """Write a store into a folder, dying at a border; the exit code."""
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    more["KAVA_CACHE"] = str(tmp_path_factory.mktemp("tokenizers"))

    def attempt(folder: Path, border: str) -> int:
        command = [quick_python.executable(), "-c", WRITER, str(folder), border]
        return subprocess.run(command, env=os.environ | more, capture_output=True).returncode

    return attempt


@pytest.fixture(scope="module")
def whole(attempt: Callable[[Path, str], int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that nobody disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert attempt(folder, "pass") == 0
    return folder


def sealed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and ".partial" not in path.name]


def contents(folder: Path) -> dict[str, bytes]:
    [store] = sealed(folder)
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != checkpoint.MANIFEST}


@pytest.mark.parametrize("border", BORDERS)
def test_a_killed_writer_leaves_no_complete_store_and_going_on_makes_the_same(
    attempt: Callable[[Path, str], int], whole: Path, border: str, tmp_path: Path
) -> None:
    assert attempt(tmp_path, BORDERS[border]) == -9
    assert not sealed(tmp_path)
    assert attempt(tmp_path, "pass") == 0
    [store] = sealed(tmp_path)
    checkpoint.verify(store)
    found, expected = contents(tmp_path), contents(whole)
    assert found.keys() == expected.keys()
    assert {INDEX_FILE, "shard-00001.safetensors"} <= found.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(tmp_path.glob("*.partial"))
