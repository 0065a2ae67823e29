"""kill -9 at every border of writing a store: it never looks complete, and going on completes it."""

from __future__ import annotations

import os
import subprocess
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
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[list[int], Path, bool]]:
    """For every border: how both attempts ended, the folder, and whether the first left a complete store."""
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    more["KAVA_CACHE"] = str(tmp_path_factory.mktemp("tokenizers"))

    def attempt(folder: Path, border: str) -> int:
        command = [quick_python.executable(), "-c", WRITER, str(folder), border]
        return subprocess.run(command, env=os.environ | more, capture_output=True).returncode

    found = {}
    for name, border in BORDERS.items():
        folder = tmp_path_factory.mktemp("stores")
        killed = attempt(folder, border)
        complete = bool(sealed(folder))
        found[name] = ([killed, attempt(folder, "pass")], folder, complete)
    whole = tmp_path_factory.mktemp("stores")
    found["never"] = ([attempt(whole, "pass")], whole, False)
    return found


def sealed(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_dir() and ".partial" not in path.name]


def contents(folder: Path) -> dict[str, bytes]:
    [store] = sealed(folder)
    return {path.name: path.read_bytes() for path in store.iterdir() if path.name != checkpoint.MANIFEST}


@pytest.mark.parametrize("border", BORDERS)
def test_a_killed_writer_leaves_no_complete_store(outcomes: dict, border: str) -> None:
    [killed, _], _, complete = outcomes[border]
    assert killed == -9
    assert not complete


@pytest.mark.parametrize("border", BORDERS)
def test_going_on_ends_in_the_very_same_store(outcomes: dict, border: str) -> None:
    [_, again], folder, _ = outcomes[border]
    assert again == 0
    [store] = sealed(folder)
    checkpoint.verify(store)
    found, expected = contents(folder), contents(outcomes["never"][1])
    assert found.keys() == expected.keys()
    assert {INDEX_FILE, "shard-00001.safetensors"} <= found.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert not list(folder.glob("*.partial"))
