"""Two processes under torchrun (gloo, CPU): the same training as one, the same bits after a stop."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kava_core.errors import SpecError
from kava_core.runs import checkpoint
from kava_core.runs.folder import Folder
from kava_core.runs.metrics import read_metrics
from kava_core.train.pretrain import pretraining_name, pretraining_spec
from kava_core.train.run import run
from kava_core.train.weights import ALIGNER_FILE
from tests.support import quick_python, tiny
from tests.support.repository import ROOT

pytestmark = pytest.mark.slow

WORKER = """
import json, os, signal, sys
from pathlib import Path
import torch
from transformers import TrainerCallback
from kava_core.errors import KavaError
from kava_core.train import run as run_module
from kava_core.processes import leave
from kava_core.train.run import run
from tests.support import tiny

class Signal(TrainerCallback):
    def on_step_begin(self, args, state, control, **_):
        if int(os.environ["RANK"]) in ranks and state.global_step == 2:
            signal.raise_signal(signal.SIGTERM)

output, log, changes, ranks = (json.loads(argument) for argument in sys.argv[1:])
written, code = [], 0

def note(event, arguments):
    if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR) or event in ("os.rename", "os.mkdir"):
        written.append(str(arguments[0]))

sys.addaudithook(note)
if ranks:
    run_module.ShowProgress = lambda title: Signal()
try:
    run(tiny.spec(output, **changes), variant="main", seed=1)
except KavaError as error:
    print(error, file=sys.stderr)
    code = error.exit_code
facts = {"written": [path for path in written if path.startswith(output)], "code": code}
Path(f"{log}-{os.environ['RANK']}.json").write_text(json.dumps(facts))
leave(0)
"""


def torchrun(
    folder: Path, name: str, changes: dict[str, Any], ranks: Sequence[int] = ()
) -> list[dict[str, Any]]:
    """Run in two processes, of which ``ranks`` get SIGTERM in step 3; what each wrote, and its exit code."""
    script = folder / "worker.py"
    script.write_text(WORKER)
    more = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    more |= {"KAVA_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
    arguments = [
        json.dumps(value) for value in (str(folder / name), str(folder / f"{name}-log"), changes, list(ranks))
    ]
    launcher = [
        quick_python.executable(),
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        str(script),
    ]
    done = subprocess.run(
        [*launcher, *arguments], env=os.environ | more, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{name}-log-{rank}.json").read_text()) for rank in range(2)]


def folder_of(output: Path) -> Path:
    (folder,) = output.glob("tiny/main-*")
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    last = checkpoint.newest_intact(folder / "checkpoints")
    assert last is not None
    return load_file(last / "student" / "model.safetensors") | load_file(last / ALIGNER_FILE)


def timeless(folder: Path) -> list[dict[str, Any]]:
    lines = read_metrics(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if name != "seconds"} for line in lines]


def bumpy() -> dict[str, Any]:
    """Dropout, two epochs, accumulation, a trained aligner, a teacher that is pretrained first; and one
    validation example, so that the second process has none."""
    wide, gpt = tiny.fields()["teachers"]
    wide["align"] = {"dim_projector": "linear"}
    gpt["pretrain"] = {"steps": 3, "batch_size": 4}
    return {
        "student": {"config": tiny.llama(attention_dropout=0.2)},
        "teachers": [wide, gpt],
        "train": {"steps": 7, "batch_size": 6, "accumulate": 2, "log_every": 2, "save_every": 5},
        "evaluate": {"every": 3, "examples": 1},
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The uninterrupted run of two processes, and what each of them did."""
    folder = tmp_path_factory.mktemp("two")
    facts = torchrun(folder, "whole", bumpy())
    return folder, facts


def test_only_the_first_process_writes(whole: tuple[Path, list[dict[str, Any]]]) -> None:
    """The other writes its own random state and means into the staging folder, and nothing else."""
    folder, (first, second) = whole
    assert (first["code"], second["code"]) == (0, 0)
    assert any("metrics.jsonl" in path for path in first["written"])
    assert [path for path in second["written"] if "/checkpoints/staging" not in path] == []
    run_folder = folder_of(folder / "whole")
    assert [line["step"] for line in timeless(run_folder) if "loss" in line] == [2, 4, 6, 7]
    assert len((run_folder / "samples.jsonl").read_text().splitlines()) == 1


def test_both_processes_pretrain_the_teacher_together_and_once(
    whole: tuple[Path, list[dict[str, Any]]],
) -> None:
    (record,) = (whole[0] / "cache" / "pretrained").glob("*/run.json")
    assert json.loads(record.read_text())["status"] == "complete"
    assert json.loads(record.read_text())["world_size"] == 2


@pytest.mark.parametrize("ranks", [pytest.param((0, 1), marks=pytest.mark.release), (1,)])
def test_a_signal_to_any_process_saves_once_and_resuming_is_bit_exact(
    whole: tuple[Path, list[dict[str, Any]]], ranks: tuple[int, ...]
) -> None:
    folder, name = whole[0], f"signal{len(ranks)}"
    facts = torchrun(folder, name, bumpy(), ranks)
    assert [each["code"] for each in facts] == [75, 75]
    run_folder = folder_of(folder / name)
    assert list(checkpoint.checkpoints_by_step(run_folder / "checkpoints")) == [3]
    assert json.loads((run_folder / "run.json").read_text())["status"] == "stopped"
    assert [each["code"] for each in torchrun(folder, name, bumpy())] == [0, 0]
    found, expected = weights(run_folder), weights(folder_of(folder / "whole"))
    assert found.keys() == expected.keys()
    assert [key for key in expected if not torch.equal(found[key], expected[key])] == []
    assert timeless(run_folder) == timeless(folder_of(folder / "whole"))


def test_two_processes_equal_one_with_twice_the_batch(tmp_path: Path) -> None:
    """The same examples in every step; sums are taken in another order, so only nearly the same bits."""
    two = {"steps": 4, "batch_size": 4, "accumulate": 2}
    terms: dict[str, Any] = {"hidden": {"weight": 0.2}, "cross_logits": {"weight": 0.2}}
    torchrun(tmp_path, "two", {"train": two} | terms)
    one = run(tiny.spec(tmp_path / "one", train=two | {"batch_size": 8}, **terms), variant="main", seed=1)
    found, expected = timeless(folder_of(tmp_path / "two")), timeless(one.folder)
    assert len(found) == len(expected) > 4
    for line, reference in zip(found, expected, strict=True):
        assert line == pytest.approx(reference, rel=1e-4, abs=1e-6)
    for name, tensor in weights(one.folder).items():
        torch.testing.assert_close(weights(folder_of(tmp_path / "two"))[name], tensor, rtol=1e-3, atol=2e-5)


def test_a_model_that_another_run_is_pretraining_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in an array of jobs that share a teacher."""
    monkeypatch.setenv("KAVA_CACHE", str(tmp_path / "cache"))
    teacher = tiny.fields()["teachers"][1] | {"pretrain": {"steps": 2, "batch_size": 4}}
    spec = tiny.spec(tmp_path, teachers=[teacher], train={"steps": 1})
    plan, name = pretraining_spec(spec, spec.teachers[0]), pretraining_name(spec, spec.teachers[0])
    folder, held = Folder.planned(plan, name, 0), ExitStack()
    held.enter_context(folder.lock())
    begin, release = time.monotonic(), threading.Timer(1.5, held.close)
    release.start()
    run(spec, variant="main", seed=0)
    assert time.monotonic() - begin > 1.5
    assert folder.complete


def test_another_number_of_processes_is_refused(
    whole: tuple[Path, list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = folder_of(whole[0] / "whole").parents[1]
    record = folder_of(output) / "run.json"
    unfinished = json.loads(record.read_text()) | {"status": "running"}
    record.write_text(json.dumps(unfinished))
    monkeypatch.setenv("KAVA_CACHE", str(whole[0] / "cache"))
    changes = bumpy()
    with pytest.raises(SpecError, match="begun by 2 processes, now 1: the batches would differ"):
        run(tiny.spec(output, **changes), variant="main", seed=1)
