"""kill -9 at random moments of a real run: going on ends in the very same bits and the very same metrics.

The runs happen in processes forked from a server that has imported everything once; SIGKILL is as real
there as anywhere.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from kava_core.runs import checkpoint
from kava_core.runs.metrics import read_metrics
from tests.support import quick_python, tiny
from tests.support.repository import ROOT

pytestmark = pytest.mark.slow

SERVER = """
import json, os, sys, time
import torch
torch.set_num_threads(1)
from kava_core.train.run import run
from tests.support import tiny

def attempt(output, changes):
    sys.stderr = open(os.devnull, "w")
    run(tiny.spec(output, **changes), variant="main", seed=1)

for line in sys.stdin:
    pid = os.fork()
    if pid == 0:
        attempt(*json.loads(line))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitpid(pid, 0)[1], flush=True)
"""


def bumpy() -> dict[str, Any]:
    """A run that a careless resume would get wrong; saving, logging and evaluating never coincide."""
    wide, gpt = tiny.fields()["teachers"]
    wide["align"] = {"dim_projector": "linear", "head_adapter": {"name": "structured", "trainable": True}}
    return {
        "student": {"config": tiny.llama(attention_dropout=0.2)},
        "teachers": [wide, gpt],
        "train": {"steps": 11, "batch_size": 8, "accumulate": 3, "log_every": 3, "save_every": 2},
        "evaluate": {"every": 5},
    }


def environment(cache: Path) -> dict[str, str]:
    more = {"KAVA_SHAPE_CHECK": "0", "KAVA_CACHE": str(cache), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return os.environ | more | {"PYTHONPATH": str(ROOT)}


class Server:
    """Starts runs as forked processes."""

    def __init__(self, cache: Path) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(
            [quick_python.executable(), "-c", SERVER], env=environment(cache), **pipes
        )

    def start(self, output: Path) -> int:
        """The process id of a run in ``output``."""
        assert self.process.stdin is not None
        print(json.dumps([str(output), bumpy()]), file=self.process.stdin, flush=True)
        return self._number()

    def end(self) -> int:
        """The wait status of the run that was started last; -9 for one that was killed."""
        return os.waitstatus_to_exitcode(self._number())

    def _number(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def server(cache: Path) -> Iterator[Server]:
    server = Server(cache)
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    server.process.wait()


@pytest.fixture(scope="module")
def whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float, float]:
    """The uninterrupted run, and when its first metrics line and its end came, in seconds from its start."""
    output = tmp_path_factory.mktemp("whole")
    server.start(output)
    begin = time.monotonic()
    while not list(output.glob("*/*/metrics.jsonl")):
        time.sleep(0.005)
    first = time.monotonic() - begin
    assert server.end() == 0
    return folder_of(output), first, time.monotonic() - begin


def folder_of(output: Path) -> Path:
    (folder,) = output.glob("tiny/main-*")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """The files of the last checkpoint's and the final student, and of the aligner."""
    last = checkpoint.newest_intact(folder / "checkpoints")
    assert last is not None
    files = [last / "aligner.safetensors", *last.glob("student/*"), *(folder / "student").iterdir()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files if file.is_file()}


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def assert_equals(folder: Path, whole: Path) -> None:
    found, expected = content(folder), content(whole)
    assert found.keys() == expected.keys()
    assert [name for name in expected if found[name] != expected[name]] == []
    assert timeless(folder) == timeless(whole)
    assert (folder / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    record, reference = (json.loads((path / "run.json").read_text()) for path in (folder, whole))
    assert record["status"] == "complete"
    assert record["results"] == reference["results"]
    assert not (folder / "checkpoints" / checkpoint.STAGING).exists()


def test_the_uninterrupted_run_is_what_it_should_be(whole: tuple[Path, float, float]) -> None:
    """Lines at every third step and the last; evaluations at every fifth and the last; two epochs."""
    lines = timeless(whole[0])
    assert [line["step"] for line in lines if "loss" in line] == [3, 6, 9, 11]
    assert [line["step"] for line in lines if "eval_ce" in line] == [5, 10, 11]
    assert lines[-1]["epoch"] > 2


@pytest.mark.parametrize("count", [3, pytest.param(20, marks=pytest.mark.release)])
def test_random_kills_change_nothing(
    server: Server, whole: tuple[Path, float, float], count: int, tmp_path: Path
) -> None:
    """Uniformly over the time from the first metrics line to the end; a new run whenever one completes."""
    reference, first, end = whole
    draw, kills, runs = random.Random(7), 0, 0
    resumed = set()
    while kills < count:
        output, runs = tmp_path / str(runs), runs + 1
        while True:
            pid = server.start(output)
            if kills < count:
                time.sleep(draw.uniform(first, end))
                with suppress(ProcessLookupError):  # it was faster than the reference
                    os.kill(pid, signal.SIGKILL)
            status = server.end()
            assert status in (0, -9)
            if status == 0:
                break
            kills += 1
            resumed.add(len(checkpoint.checkpoints_by_step(folder_of(output) / "checkpoints")) > 0)
        assert_equals(folder_of(output), reference)
    assert True in resumed, "no kill came after a checkpoint: nothing was tested"


@pytest.mark.parametrize("count", [1, pytest.param(5, marks=pytest.mark.release)])
def test_kills_during_import_change_nothing(
    server: Server, whole: tuple[Path, float, float], cache: Path, count: int, tmp_path: Path
) -> None:
    code = SERVER.partition("for line")[0] + f"attempt({str(tmp_path)!r}, {bumpy()!r})"
    draw = random.Random(1)
    for _ in range(count):
        process = subprocess.Popen([sys.executable, "-c", code], env=environment(cache))
        time.sleep(draw.uniform(0.2, 4))
        process.kill()
        assert process.wait() == -9
    server.start(tmp_path)
    assert server.end() == 0
    assert_equals(folder_of(tmp_path), whole[0])
