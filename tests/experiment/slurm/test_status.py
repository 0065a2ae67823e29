"""``kava status``: the state, the pace and the table of runs, from their folders and a fake scheduler."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from kava_core.experiment.slurm.mapping import elements_of_runs, job_name, launches_folder, mapping_text
from kava_core.experiment.slurm.scheduler import QueuedElement
from kava_core.experiment.slurm.status import RunStatus, run_statuses, seconds_per_step, status_of_run
from kava_core.experiment.slurm.status_text import show_status, status_table
from kava_core.runs.folder import Folder
from kava_core.runs.planned import planned_runs
from tests.experiment.slurm.fake_slurm import Slurm
from tests.support import tiny

RECORD = {"name": "tiny", "seed": 0, "spec_digest": "d", "data": {}, "versions": {}, "world_size": 1}


def planned_run(output: Path, status: str | None = None, lines: list[dict[str, Any]] | None = None) -> Folder:
    """A run of ten steps, as far as it has come."""
    (made,) = planned_runs({"kv": tiny.spec(output, train={"steps": 10})})
    made.path.mkdir(parents=True)
    if status is not None:
        results = {"results": {"steps": 10}} if status == "complete" else {}
        record = RECORD | {"variant": "kv", "status": status} | results
        made.record_file.write_text(json.dumps(record))
    if lines is not None:
        made.metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return made


@pytest.mark.parametrize(
    ("status", "state"),
    [(None, "missing"), ("running", "interrupted"), ("stopped", "stopped"), ("complete", "complete")],
)
def test_state_by_what_the_record_says(tmp_path: Path, status: str | None, state: str) -> None:
    assert status_of_run(planned_run(tmp_path, status)).state == state


def test_a_run_whose_lock_is_held_is_running(tmp_path: Path) -> None:
    run = planned_run(tmp_path, "running")
    with run.lock_file.open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        assert status_of_run(run).state == "running"
    assert status_of_run(run).state == "interrupted"


def test_a_failure_is_shown_with_code_and_reason(tmp_path: Path) -> None:
    run = planned_run(tmp_path, "running")
    run.note_failure(4, "step 3: ce not finite\nmore")
    row = status_of_run(run)
    assert (row.state, row.exit_code, row.reason) == ("failed", 4, "step 3: ce not finite")


def test_a_job_that_ended_without_a_word_is_told_by_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest launch alone counts."""
    monkeypatch.setenv("PATH", "/nowhere")
    run = planned_run(tmp_path, "running")
    first, second = (launches_folder(run.spec) / name for name in ("20260101-000000", "20260102-000000"))
    for folder in (first, second):
        folder.mkdir(parents=True)
        (folder / "array.jsonl").write_text(mapping_text(elements_of_runs([run])))
    (first / "0.exit").write_text("1\n")
    assert run_statuses([run])[0].reason is None
    (second / "0.exit").write_text("137\n")
    (row,) = run_statuses([run])
    assert (row.state, row.exit_code, row.reason) == ("interrupted", 137, f"see {second}/0.log")


@pytest.mark.parametrize(("word", "state"), [("RUNNING", "running"), ("PENDING", "interrupted")])
def test_slurm_knows_of_runs_on_other_machines(tmp_path: Path, word: str, state: str) -> None:
    row = status_of_run(planned_run(tmp_path, "running"), QueuedElement("7_0", word))
    assert (row.state, row.slurm) == (state, f"{word} 7_0")


def test_a_damaged_record_spoils_no_other_row(tmp_path: Path) -> None:
    run = planned_run(tmp_path)
    run.record_file.write_text("{")
    row = status_of_run(run)
    assert (row.state, row.exit_code) == ("damaged", 5)
    assert "unreadable" in str(row.reason)


def test_pace_and_time_left(tmp_path: Path) -> None:
    lines = [{"step": 1, "seconds": 5.0}, {"step": 2, "seconds": 7.0}, {"step": 4, "seconds": 11.0}]
    row = status_of_run(planned_run(tmp_path, "stopped", lines))
    assert (row.step, row.steps) == (4, 10)
    assert row.seconds_per_step == pytest.approx(2.0)
    assert row.seconds_left == pytest.approx(12.0)


@pytest.mark.parametrize("steps", [[], [3], [3, 3]])
def test_no_pace_from_one_step(steps: list[int]) -> None:
    assert seconds_per_step([{"step": step, "seconds": 1.0} for step in steps]) is None


def test_nothing_is_left_of_a_complete_run(tmp_path: Path) -> None:
    lines = [{"step": 1, "seconds": 5.0}, {"step": 10, "seconds": 7.0}]
    assert status_of_run(planned_run(tmp_path, "complete", lines)).seconds_left is None


def test_the_newest_evaluation_is_the_metric(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "ce": 4.0},
        {"step": 2, "eval_ce": 3.0, "eval_exact_match": 0.0},
        {"step": 4, "eval_exact_match": 0.25},
        {"step": 5, "ce": 2.0},
    ]
    row = status_of_run(planned_run(tmp_path, "stopped", lines))
    assert (row.metric, row.value) == ("exact_match", 0.25)


def test_damaged_metrics_and_half_a_line_are_survived(tmp_path: Path) -> None:
    run = planned_run(tmp_path, "stopped", [{"step": 3, "ce": 1.5}])
    with run.metrics.open("a") as stream:
        stream.write('{"step": 4, "c')
    assert status_of_run(run).step == 3
    run.metrics.write_text("no\nlines\n")
    assert (status_of_run(run).step, status_of_run(run).metric) == (0, None)


def test_json_has_no_nan(tmp_path: Path) -> None:
    row = status_of_run(planned_run(tmp_path, "stopped", [{"step": 1, "ce": float("nan")}]))
    assert json.loads(json.dumps(row.as_json(), allow_nan=False))["value"] is None
    assert "ce nan" in shown([row])


def shown(rows: list[RunStatus]) -> str:
    console = Console(width=200, record=True, quiet=False, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(status_table(rows))
    return console.export_text()


def test_the_table_shows_markup_as_it_is(tmp_path: Path) -> None:
    run = planned_run(tmp_path, "running", [{"step": 4, "seconds": 3700.0, "eval_ce": 1.23456}])
    run.note_failure(3, "kv_loss 'x' [bold]: no [/]")
    text = shown([status_of_run(run)])
    assert "failed (3): kv_loss 'x' [bold]: no [/]" in text
    assert "4/10" in text
    assert "ce 1.235" in text


def test_watching_ends_when_all_is_complete(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, rounds = planned_run(tmp_path, "running"), 0

    def rows() -> list[RunStatus]:
        nonlocal rounds
        rounds += 1
        if rounds == 3:
            record = json.loads(run.record_file.read_text())
            done = record | {"status": "complete", "results": {"steps": 10}}
            run.record_file.write_text(json.dumps(done))
        return [status_of_run(run)]

    show_status(rows, 0.01)
    assert rounds == 3
    assert "complete" in capsys.readouterr().out


@pytest.fixture
def queued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Slurm, list[Folder]]:
    """Two runs, of which the scheduler knows the second."""
    slurm = Slurm(tmp_path / "slurm")
    for name, value in slurm.environment.items():
        monkeypatch.setenv(name, value)
    runs = planned_runs({"kv": tiny.spec(tmp_path / "runs", seeds=[0, 1])})
    folder = launches_folder(runs[0].spec) / "20261122-010203"
    folder.mkdir(parents=True)
    (folder / "array.jsonl").write_text(mapping_text(elements_of_runs(runs)))
    element = {"id": "100_1", "name": job_name("tiny", folder), "index": 1, "state": "RUNNING"}
    (slurm.home / "jobs" / "100_1.json").write_text(json.dumps(element))
    return slurm, runs


def test_squeue_tells_which_run_an_element_is(queued: tuple[Slurm, list[Folder]]) -> None:
    rows = run_statuses(queued[1])
    assert [(row.seed, row.state, row.slurm) for row in rows] == [
        (0, "missing", None),
        (1, "running", "RUNNING 100_1"),
    ]


def test_a_silent_squeue_is_said_and_survived(
    queued: tuple[Slurm, list[Folder]], capsys: pytest.CaptureFixture[str]
) -> None:
    slurm, runs = queued
    (slurm.home / "squeue-is-down").touch()
    assert [row.slurm for row in run_statuses(runs)] == [None, None]
    assert capsys.readouterr().err.startswith("squeue: slurm_load_jobs error")


def test_the_command_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text(json.dumps(tiny.fields(seeds=[0, 1])))
    code = (
        "import sys\nfrom kava_core.cli.app import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n    assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    for words in (["status", "spec.yaml", "--format", "json"], ["launch", "spec.yaml", "--dry-run"]):
        command = [sys.executable, "-c", code, *words]
        settings = os.environ | {"KAVA_SHAPE_CHECK": "0"}
        done = subprocess.run(command, cwd=tmp_path, env=settings, text=True, capture_output=True, timeout=60)
        assert done.stdout.splitlines()[-1] == "[]", done.stderr
