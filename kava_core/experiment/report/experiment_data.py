"""Offer what several sections of a report ask of an experiment: verdicts, values, curves, specs."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeGuard

from kava_core.errors import CheckpointError, KavaError
from kava_core.experiment.compared_value import ComparedValue, compared_value
from kava_core.experiment.load_experiment import Experiment, LoadedRun, load_experiment
from kava_core.experiment.shared_runs import SharedRuns, neighbours, runs_shared_with
from kava_core.experiment.verdict import Verdict, declared_comparisons, judge_comparisons
from kava_core.files import read_json_object
from kava_core.specfile.sections.compare import CompareSpec

Curve = list[tuple[int, float]]
"""Steps and values, in the order of the steps."""


@dataclass(frozen=True)
class ExperimentData:
    """One experiment of a report.

    Args:
        experiment: its runs.
        number: its place among the experiments of the report, from 1.
        several: whether there are others.
        others: other experiments that may share runs with this one.
    """

    experiment: Experiment
    number: int = 1
    several: bool = False
    others: Sequence[Experiment] = ()

    @cached_property
    def _verdicts_or_reason(self) -> tuple[list[Verdict], str]:
        try:
            return judge_comparisons(self.experiment), ""
        except CheckpointError:
            raise
        except KavaError as error:
            return [], str(error)

    @property
    def verdicts(self) -> list[Verdict]:
        """Return the verdicts on the declared comparisons."""
        return self._verdicts_or_reason[0]

    @property
    def why_no_verdicts(self) -> str:
        """Return why there are no verdicts though comparisons are declared; empty if there are."""
        return self._verdicts_or_reason[1]

    @property
    def declared_pairs(self) -> list[tuple[str, str]]:
        """Return the pairs that were to be compared."""
        return declared_comparisons(self.experiment)

    @cached_property
    def compare(self) -> CompareSpec:
        """Return what was declared; else exact match if a run has it, and cross-entropy if none has."""
        if self.experiment.compare is not None:
            return self.experiment.compare
        has_exact_match = any("exact_match" in run.results for run in self.experiment.runs)
        return CompareSpec(metric="exact_match" if has_exact_match else "ce")

    @cached_property
    def shared_runs(self) -> list[SharedRuns]:
        """Return which of this experiment's runs are there several times, here or in other experiments."""
        return runs_shared_with(self.experiment, self.others)

    @property
    def followed_metric(self) -> str:
        """Return the metric whose curve is drawn."""
        return self.compare.metric if self.compare.target is None else self.compare.of

    @property
    def treatment(self) -> str:
        """Return the variant that others are compared with; the first one if nobody declared it."""
        return self.experiment.treatment or self.experiment.variants[0]

    def complete_runs(self, variant: str) -> dict[int, LoadedRun]:
        """Return a variant's complete runs by seed, ascending."""
        return dict(sorted(self.experiment.complete_runs(variant).items()))

    def compared_values(self, variant: str) -> dict[int, ComparedValue]:
        """Return the compared number by seed, of the complete runs that have it."""
        values = {}
        for seed, run in self.complete_runs(variant).items():
            value = self._value_or_reason(run)
            if isinstance(value, ComparedValue):
                values[seed] = value
        return values

    def texts_on_lacking(self) -> list[str]:
        """Return a sentence for every complete run without the compared number."""
        texts = []
        for variant in self.experiment.variants:
            for run in self.complete_runs(variant).values():
                value = self._value_or_reason(run)
                if isinstance(value, str):
                    texts.append(value)
        return texts

    def _value_or_reason(self, run: LoadedRun) -> ComparedValue | str:
        try:
            return compared_value(run, self.compare)
        except CheckpointError:
            raise
        except KavaError as error:
            return str(error)

    @cached_property
    def specs_by_variant(self) -> dict[str, dict[str, Any]]:
        """Return the resolved spec of every variant that has begun."""
        specs = {}
        for variant in self.experiment.variants:
            for run in self.experiment.runs_of_variant(variant).values():
                if run.folder.spec_file.exists():
                    specs[variant] = read_json_object(run.folder.spec_file)
                    break
        return specs

    @cached_property
    def kv_loss_metrics(self) -> list[str]:
        """Return the names of the KV losses in the metrics."""
        losses = set()
        for spec in self.specs_by_variant.values():
            losses |= {loss.get("name") for loss in spec.get("losses") or () if loss}
        # Of several losses of one name, each metric has a number at its end.
        return [
            name for name in self.metric_names() if name in losses or re.sub(r"_\d+$", "", name) in losses
        ]

    def metric_names(self, prefix: str = "") -> list[str]:
        """Return the metrics of all evaluations that begin with ``prefix``, in alphabetical order."""
        names = {name for run in self.experiment.runs for line in run.evaluations for name in line}
        return sorted(name for name in names if name.startswith(prefix))

    def curve_of_run(self, run: LoadedRun, metric: str) -> Curve:
        """Return a run's evaluations of a metric; values that are not finite are left out."""
        points = [(line["step"], line.get(metric)) for line in run.evaluations]
        return sorted((step, float(value)) for step, value in points if _is_finite_number(value))

    def curves_by_variant(self, metric: str) -> dict[str, list[tuple[LoadedRun, Curve]]]:
        """Return every run that has a curve of a metric, by variant."""
        curves: dict[str, list[tuple[LoadedRun, Curve]]] = {}
        for variant in self.experiment.variants:
            for run in self.experiment.runs_of_variant(variant).values():
                curve = self.curve_of_run(run, metric)
                if curve:
                    curves.setdefault(variant, []).append((run, curve))
        return curves

    def unique_name(self, *parts: str) -> str:
        """Return a name for a figure's files that no other has, of ASCII letters and digits."""
        name = "-".join(filter(None, map(slug_of_name, parts)))
        candidates = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        free_name = next(candidate for candidate in candidates if candidate not in self._names_taken)
        self._names_taken.add(free_name)
        return f"{self.number}-{free_name}" if self.several else free_name

    @cached_property
    def _names_taken(self) -> set[str]:
        return set()


LONGEST_SLUG = 40
"""Characters of a part of a file's name."""


def slug_of_name(name: str) -> str:
    """Return a name in lower-case ASCII letters and digits, ``-`` for the rest; several may give the same."""
    kept = "".join(one if one.isascii() and one.isalnum() else "-" for one in name.lower())
    return "-".join(filter(None, kept.split("-")))[:LONGEST_SLUG].strip("-")


def mean_curve(curves: Sequence[tuple[LoadedRun, Curve]]) -> Curve:
    """Return the mean of the complete runs at the steps that all of them have evaluated."""
    complete = [dict(curve) for run, curve in curves if run.state == "complete"]
    if not complete:
        return []
    shared_steps = sorted(set.intersection(*map(set, complete)))
    count = len(complete)
    return [(step, math.fsum(curve[step] for curve in complete) / count) for step in shared_steps]


def load_experiments(folders: Sequence[Path]) -> list[ExperimentData]:
    """Load every folder; errors as for ``load_experiment``."""
    experiments = []
    for folder in folders:
        has_name = folder.name not in ("", "..")
        experiments.append(load_experiment(folder if has_name else folder.resolve()))
    return [
        ExperimentData(
            experiment, number, several=len(folders) > 1, others=_other_experiments(experiment, experiments)
        )
        for number, experiment in enumerate(experiments, 1)
    ]


def _other_experiments(experiment: Experiment, reported: Sequence[Experiment]) -> list[Experiment]:
    """Return those in the same report, and those in folders beside this one's."""
    others = {each.folder.absolute(): each for each in (*neighbours(experiment), *reported)}
    others.pop(experiment.folder.absolute(), None)
    return list(others.values())


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file, one a line; a last line cut off by a kill is left out.

    Raises:
        CheckpointError: another line is damaged.
    """
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            value = json.loads(line.decode("utf-8")) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                return
            raise CheckpointError(f"{file}:{number}: unreadable: {error}") from error
        if isinstance(value, dict):
            yield value


def _is_finite_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
