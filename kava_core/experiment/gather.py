"""Everything that finished, failed and missing runs of an experiment have left on disk."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from kava_core.errors import KavaError, SpecError
from kava_core.experiment import declared
from kava_core.json_files import read_json
from kava_core.runs.folder import Folder, State, runs_in
from kava_core.runs.metrics import read_metrics
from kava_core.runs.record import STORE
from kava_core.specfile.sections.compare import DIRECTIONS, STEPS_TO_TARGET, TARGET_METRICS, CompareSpec

BUDGETS = ("student_tokens", "teacher_tokens", "flops")


@dataclass(frozen=True)
class Run:
    """One variant and seed as it lies on disk."""

    variant: str
    seed: int
    folder: Folder
    state: State
    record: dict[str, Any] = field(default_factory=dict)
    """``run.json``; empty where there is none."""

    @property
    def failure(self) -> dict[str, Any] | None:
        """Exit code and reason of a failed run."""
        return self.folder.failure() if self.state == "failed" else None

    @property
    def results(self) -> dict[str, float]:
        """The numbers of the last evaluation; none where the run is not complete."""
        return dict(self.record["results"]) if self.state == "complete" else {}

    @property
    def compute(self) -> dict[str, Any]:
        """What training cost; empty for runs of a version that did not count."""
        return dict(self.record.get("compute", {}))

    @cached_property
    def evaluations(self) -> list[dict[str, Any]]:
        """The lines of ``metrics.jsonl`` with validation metrics, without the prefix ``eval_``."""
        return [
            {name.removeprefix("eval_"): value for name, value in line.items()}
            for line in self.lines
            if "eval_ce" in line
        ]

    @cached_property
    def lines(self) -> list[dict[str, Any]]:
        """All lines of ``metrics.jsonl``; none where there is no such file."""
        return read_metrics(self.folder.metrics) if self.folder.metrics.exists() else []

    @cached_property
    def correct(self) -> list[int] | None:
        """1 or 0 for every validation example of the last evaluation; None where none wrote answers."""
        if not self.folder.correct.exists():
            return None
        return list(read_json(self.folder.correct))


@dataclass(frozen=True)
class Experiment:
    """Runs side by side, and what was asked of them."""

    name: str
    folder: Path
    runs: list[Run]
    compare: CompareSpec | None = None
    """None where nobody declared a comparison."""
    treatment: str = ""
    earlier: list[dict[str, Any]] = field(default_factory=list)
    """Comparisons that were declared before these."""

    @property
    def variants(self) -> list[str]:
        """In the order of the spec."""
        return list(dict.fromkeys(run.variant for run in self.runs))

    @property
    def seeds(self) -> list[int]:
        """All that any variant has."""
        return sorted({run.seed for run in self.runs})

    def of(self, variant: str) -> dict[int, Run]:
        """A variant's runs by seed."""
        return {run.seed: run for run in self.runs if run.variant == variant}

    def count(self, state: State) -> int:
        """Runs in a state."""
        return sum(run.state == state for run in self.runs)


def gather(folder: Path) -> Experiment:
    """All runs of an experiment's folder (``runs/NAME``), planned ones that are missing too.

    Raises:
        SpecError: there is no run.
        CheckpointError: a file of a run is damaged.
    """
    if not folder.is_dir():
        raise SpecError(f"{folder}: no such folder; give one that kava train or kava experiment wrote")
    if (folder / declared.FILE).exists():
        asked = declared.read(folder)
        runs = [_run(Folder(folder / one["folder"]), one["variant"], one["seed"]) for one in asked["runs"]]
        compare = CompareSpec.model_validate(asked["compare"])
        return Experiment(folder.name, folder, runs, compare, asked["treatment"], asked["earlier"])
    runs = [_run(run, run.variant, run.seed) for run in runs_in(folder)]
    if not runs:
        raise SpecError(f"{folder}: holds no runs; give a folder such as runs/NAME")
    _assert_one_spec_each(runs)
    return Experiment(folder.name, folder, sorted(runs, key=lambda run: (run.variant, run.seed)))


def _run(folder: Folder, variant: str, seed: int) -> Run:
    return Run(variant, seed, folder, folder.state(), folder.record())


def _assert_one_spec_each(runs: Iterable[Run]) -> None:
    """SpecError where a variant's name stands for several specs: its seeds would not be comparable."""
    digests: dict[str, str] = {}
    for run in runs:
        known = digests.setdefault(run.variant, run.record["spec_digest"])
        if known != run.record["spec_digest"]:
            raise SpecError(
                f"{run.folder.path.parent}: variant {run.variant!r} has runs of two specs ({known} and "
                f"{run.record['spec_digest']}); run kava experiment, which says which belong together"
            )


def value_of(run: Run, compare: CompareSpec, horizon: float = math.inf) -> float:
    """The number that is compared; KavaError where a complete run has none: it is never taken for 0."""
    if compare.metric in TARGET_METRICS:
        return spent_to_target(run, compare, horizon)
    found = run.results.get(compare.metric)
    if found is None or not math.isfinite(found):
        there = ", ".join(sorted(name for name in run.results if "/" not in name))
        raise KavaError(f"{run.folder}: its results have no finite {compare.metric!r}; there are {there}")
    return float(found)


def spent_to_target(run: Run, compare: CompareSpec, horizon: float = math.inf) -> float:
    """The steps or operations after which the target is first met, or one interval past the ``horizon``.

    The horizon is the most that all compared runs have spent: what one of them reaches later, when others are
    no longer looked at, does not count.
    """
    assert compare.target is not None
    curve = _curve(run, compare)
    lower = DIRECTIONS[compare.of] == "lower"
    horizon = min(horizon, curve[-1][0])
    for spent, value in curve:
        if spent <= horizon and (value <= compare.target if lower else value >= compare.target):
            return spent
    return horizon + curve[0][0] - _price(run, compare)[0]


def most_spent(run: Run, compare: CompareSpec) -> float:
    """What had been spent when the followed metric was last evaluated."""
    return _curve(run, compare)[-1][0]


def _curve(run: Run, compare: CompareSpec) -> list[tuple[float, float]]:
    before, each = _price(run, compare)
    lines = [line for line in run.evaluations if compare.of in line]
    if not lines:
        raise KavaError(f"{run.folder}: its evaluations have no {compare.of!r}")
    return [(before + each * line["step"], line[compare.of]) for line in lines]


def _price(run: Run, compare: CompareSpec) -> tuple[float, float]:
    """Of what is counted up to the target: before the first step, and of each step."""
    if compare.metric == STEPS_TO_TARGET:
        return 0.0, 1.0
    found = flops_price(run)
    if found is None:
        raise KavaError(f"{run.folder}: its run.json does not say how many operations it took")
    return found


def flops_price(run: Run) -> tuple[float, float] | None:
    """Operations before the first step (of making a store) and of a step, the mean of all."""
    flops, trained = run.compute.get("flops"), run.results.get("steps")
    if flops is None or not trained:
        return None
    before = run.compute.get("flops_of", {}).get(STORE, 0.0) if run.record.get("store") else 0.0
    return before, (flops - before) / trained
