"""Runs are found where they belong: links and paths that lead elsewhere are not followed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from kava_core.errors import SpecError
from kava_core.experiment.load_experiment import load_experiment
from kava_core.experiment.recorded_plan import PLAN_FILE
from kava_core.runs.folder import runs_in

RECORD = {
    **{"name": "x", "variant": "main", "seed": 0, "spec_digest": "0", "status": "complete", "data": {}},
    **{"versions": {}, "world_size": 1, "results": {"steps": 1, "ce": 2.0}},
}


def put_run(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    folder = tmp_path / "runs" / "x"
    folder.mkdir(parents=True)
    return folder


def plan(experiment: Path, run: str) -> None:
    """Record a plan of one run."""
    runs = [{"variant": "main", "seed": 0, "folder": run}]
    fields = {"compare": {}, "treatment": "main", "runs": runs, "declared": "", "earlier": []}
    (experiment / PLAN_FILE).write_text(json.dumps(fields))


@pytest.mark.parametrize("planned", [False, True])
def test_a_link_out_of_the_runs_is_not_followed(experiment: Path, tmp_path: Path, planned: bool) -> None:
    elsewhere = put_run(tmp_path / "elsewhere")
    link = experiment / "main-0-s0"
    link.symlink_to(elsewhere, target_is_directory=True)
    if planned:
        plan(experiment, link.name)
    with pytest.raises(SpecError) as told:
        load_experiment(experiment)
    assert str(told.value) == (
        f"{link}: leads to {elsewhere}, outside of {tmp_path / 'runs'}; move the run there"
    )


@pytest.mark.parametrize("name", ["../../elsewhere", "/etc"])
def test_a_plan_does_not_lead_out_of_the_runs(experiment: Path, tmp_path: Path, name: str) -> None:
    put_run(tmp_path / "elsewhere")
    plan(experiment, name)
    with pytest.raises(SpecError, match="outside of"):
        load_experiment(experiment)


def test_a_link_to_a_run_of_another_experiment_is_followed(experiment: Path) -> None:
    other = put_run(experiment.parent / "y" / "main-0-s0")
    (experiment / "main-0-s0").symlink_to(other, target_is_directory=True)
    assert [run.state for run in load_experiment(experiment).runs] == ["complete"]


def test_all_runs_may_be_on_another_disk(experiment: Path, tmp_path: Path) -> None:
    put_run(experiment / "main-0-s0")
    (tmp_path / "link").symlink_to(experiment.parent, target_is_directory=True)
    assert len(runs_in(tmp_path / "link" / "x")) == 1
    (tmp_path / "one").symlink_to(experiment, target_is_directory=True)
    assert len(runs_in(tmp_path / "one")) == 1
