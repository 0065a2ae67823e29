"""From ``kava launch`` to finished runs, through a fake scheduler that preempts and queues again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.experiment.slurm.fake_slurm import Slurm, wait_for
from tests.support import quick_python, tiny
from tests.support.repository import ROOT

KAVA = ("-m", "kava_core")

HOSTILE = "out $(touch escaped) 'q\" \n`x`"
"""A folder's name."""


def environment(slurm: Slurm) -> dict[str, str]:
    more = {"OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1"}
    return os.environ | more | slurm.environment | {"PYTHONPATH": str(ROOT)}


def kava(slurm: Slurm, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [quick_python.executable(), *KAVA, *words],
        cwd=folder,
        env=environment(slurm),
        text=True,
        capture_output=True,
        timeout=240,
    )


def write_spec(folder: Path, **changes: Any) -> None:
    (folder / "spec.yaml").write_text(json.dumps(tiny.fields(**changes)))


def states(slurm: Slurm, folder: Path, *words: str) -> dict[str, dict[str, Any]]:
    """Rows of ``kava status`` by variant."""
    done = kava(slurm, folder, "status", "spec.yaml", *words, "--format", "json")
    assert done.returncode == 0, done.stderr
    return {row["variant"]: row for row in json.loads(done.stdout)}


def student(output: Path) -> dict[str, bytes]:
    """The finished student's files."""
    (folder,) = output.glob("tiny/kv-*/student")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def run_environment(slurm: Slurm) -> dict[str, str]:
    return {name: value for name, value in environment(slurm).items() if os.environ.get(name) != value}


@pytest.mark.release
@pytest.mark.slow
def test_preempted_runs_go_on_bit_for_bit_and_failures_are_told(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm")
    output = f"output={json.dumps(HOSTILE)}"
    variants: dict[str, Any] = {"kv": {}, "bad": {"train.learning_rate": 1e30}}
    train = {"steps": 80, "save_every": 50}
    one = {"teachers": tiny.fields()["teachers"][:1], "losses": [{"name": "relation"}]}
    write_spec(tmp_path, variants=variants, train=train, evaluate={"every": 40}, **one)
    whole = subprocess.Popen(
        [quick_python.executable(), *KAVA, "train", "spec.yaml", "--variant", "kv", "output=whole"],
        cwd=tmp_path,
        env=environment(slurm),
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    sent = kava(slurm, tmp_path, "launch", "spec.yaml", output, "--gpus", "0")
    assert sent.returncode == 0, sent.stderr + sent.stdout
    assert list(slurm.jobs()) == ["100_0", "100_1"]
    assert {row["slurm"] for row in states(slurm, tmp_path, output).values()} == {
        "PENDING 100_0",
        "PENDING 100_1",
    }

    slurm.start("100_0", **run_environment(slurm))
    metrics = tmp_path / HOSTILE
    wait_for(lambda: len(lines_of(metrics)) > 5)
    slurm.signal_step("100_0", signal.SIGUSR2)
    assert slurm.end("100_0") == 75
    stopped = states(slurm, tmp_path, output)["kv"]
    assert (stopped["state"], stopped["slurm"]) == ("stopped", "PENDING 100_0")
    assert 5 < stopped["step"] < 80
    assert stopped["seconds_left"] > 0
    assert slurm.jobs()["100_0"]["restarts"] == 1

    slurm.start("100_0", **run_environment(slurm))
    assert slurm.end("100_0") == 0
    slurm.start("100_1", **run_environment(slurm))
    assert slurm.end("100_1") == 4
    failed = states(slurm, tmp_path, output)["bad"]
    assert (failed["state"], failed["exit_code"], failed["slurm"]) == ("failed", 4, None)
    assert "not finite" in failed["reason"] or "gradient norm is" in failed["reason"]

    assert whole.wait() == 0
    assert student(tmp_path / HOSTILE) == student(tmp_path / "whole")
    again = kava(slurm, tmp_path, "launch", "spec.yaml", output, "variants={kv: {}}", "--gpus", "0")
    assert (again.returncode, again.stdout) == (0, "nothing to submit: 1 of 1 runs are complete\n")
    assert not (tmp_path / "escaped").exists()
    assert len(slurm.calls("scontrol")) == 1


@pytest.mark.slow
def test_a_run_of_several_processes_stops_together_and_goes_on(tmp_path: Path) -> None:
    slurm = Slurm(tmp_path / "slurm")
    write_spec(tmp_path, train={"steps": 60, "save_every": 50, "batch_size": 4}, teachers=[], losses=[])
    sent = kava(slurm, tmp_path, "launch", "spec.yaml", "variants={kv: {}}", "--gpus", "2")
    assert sent.returncode == 0, sent.stderr + sent.stdout
    slurm.start("100_0", **run_environment(slurm))
    wait_for(lambda: len(lines_of(tmp_path / "runs")) > 2)
    slurm.signal_step("100_0", signal.SIGUSR2)
    assert slurm.end("100_0") == 75
    assert states(slurm, tmp_path, "variants={kv: {}}")["kv"]["state"] == "stopped"
    slurm.start("100_0", **run_environment(slurm))
    assert slurm.end("100_0") == 0
    (record,) = (tmp_path / "runs").glob("tiny/kv-*/run.json")
    found = json.loads(record.read_text())
    assert (found["status"], found["world_size"]) == ("complete", 2)


def lines_of(output: Path) -> list[str]:
    """What the preempted run has logged so far."""
    found = list(output.glob("tiny/kv-*/metrics.jsonl"))
    return found[0].read_text().splitlines() if found else []
