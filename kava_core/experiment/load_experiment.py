"""Load everything that finished, failed and missing runs of an experiment have left on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kava_core.errors import SpecError
from kava_core.experiment.recorded_plan import PLAN_FILE, read_plan
from kava_core.files import read_json
from kava_core.runs.folder import Folder, State, assert_inside, runs_in
from kava_core.runs.metrics import read_metrics
from kava_core.specfile.sections.compare import CompareSpec


@dataclass(frozen=True)
class LoadedRun:
    """What one run of an experiment has come to."""

    variant: str
    seed: int
    folder: Folder
    state: State
    record: dict[str, Any] = field(default_factory=dict)
    """``run.json``; empty if there is none."""

    @property
    def failure(self) -> dict[str, Any] | None:
        """Return exit code and reason of a failed run, None for another."""
        return self.folder.failure() if self.state == "failed" else None

    @property
    def results(self) -> dict[str, float]:
        """Return the numbers of the last evaluation, none if the run is not complete."""
        return dict(self.record["results"]) if self.state == "complete" else {}

    @property
    def compute(self) -> dict[str, Any]:
        """Return what training cost, nothing for runs of a version that did not count."""
        return dict(self.record.get("compute", {}))

    @cached_property
    def metric_lines(self) -> list[dict[str, Any]]:
        """Return all lines of ``metrics.jsonl``, none if there is no such file."""
        file = self.folder.metrics
        return read_metrics(file) if file.exists() else []

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """Return the lines with validation metrics, whose names lose the prefix ``eval_``."""
        evaluations = []
        for line in self.metric_lines:
            if "eval_ce" in line:
                evaluations.append({name.removeprefix("eval_"): value for name, value in line.items()})
        return evaluations

    @cached_property
    def correct_answers(self) -> list[int] | None:
        """Return 1 or 0 for every validation example of the last evaluation, None if it wrote no answers."""
        file = self.folder.correct
        return list(read_json(file)) if file.exists() else None


@dataclass(frozen=True)
class Experiment:
    """Runs side by side, and what was asked of them."""

    name: str
    folder: Path
    runs: list[LoadedRun]
    compare: CompareSpec | None = None
    """None if no comparison was declared."""
    treatment: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Plans that were recorded before this one."""

    @property
    def variants(self) -> list[str]:
        """Return the variants in the order of the spec."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """Return all seeds that any variant has, ascending."""
        return sorted({run.seed for run in self.runs})

    def runs_of_variant(self, variant: str) -> dict[int, LoadedRun]:
        """Return a variant's runs by seed."""
        return {run.seed: run for run in self.runs if run.variant == variant}

    def complete_runs(self, variant: str) -> dict[int, LoadedRun]:
        """Return a variant's complete runs by seed."""
        runs = self.runs_of_variant(variant)
        return {seed: run for seed, run in runs.items() if run.state == "complete"}

    def count_runs(self, state: State) -> int:
        """Count the runs in a state."""
        return sum(run.state == state for run in self.runs)


def load_experiment(folder: Path) -> Experiment:
    """Load all runs of an experiment's folder (``runs/NAME``), planned ones that are missing too.

    Raises:
        SpecError: there is no run, or one is a link to somewhere outside.
        CheckpointError: a file of a run is damaged.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder}: no such folder; give one that kava train or kava experiment wrote")
    if (folder / PLAN_FILE).exists():
        return _load_planned(folder)
    runs = [_load_results(run, run.variant, run.seed) for run in runs_in(folder)]
    if not runs:
        raise SpecError(f"{folder}: holds no runs; give a folder such as runs/NAME")
    _check_one_spec_each(runs)
    return Experiment(folder.name, folder, sorted(runs, key=lambda run: (run.variant, run.seed)))


def _load_planned(folder: Path) -> Experiment:
    plan = read_plan(folder)
    runs = []
    for entry in plan["runs"]:
        run = Folder(folder / entry["folder"])
        assert_inside(run.path, folder)
        runs.append(_load_results(run, entry["variant"], entry["seed"]))
    compare = CompareSpec.model_validate(plan["compare"])
    return Experiment(folder.name, folder, runs, compare, plan["treatment"], plan["earlier"])


def _load_results(folder: Folder, variant: str, seed: int) -> LoadedRun:
    return LoadedRun(variant, seed, folder, folder.state(), folder.record())


def _check_one_spec_each(runs: Iterable[LoadedRun]) -> None:
    """Raise a SpecError if a variant's runs have several specs: its seeds would not be comparable."""
    digests: dict[str, str] = {}
    for run in runs:
        digest = run.record["spec_digest"]
        known = digests.setdefault(run.variant, digest)
        if known != digest:
            raise SpecError(
                f"{run.folder.path.parent}: variant {run.variant!r} has runs of two specs ({known} and "
                f"{digest}); run kava experiment, which says which belong together"
            )
