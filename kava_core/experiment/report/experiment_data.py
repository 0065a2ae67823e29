"""An experiment with all that several sections ask of it: verdicts, values, curves, specs."""

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
from kava_core.experiment.compared_value import compared_value
from kava_core.experiment.load_experiment import Experiment, RunResults, load_experiment
from kava_core.experiment.verdict import Verdict, declared_comparisons, judge_comparisons
from kava_core.json_files import read_json_object
from kava_core.specfile.sections.compare import CompareSpec

Curve = list[tuple[int, float]]
"""Steps and values, in the order of the steps."""


@dataclass(frozen=True)
class ExperimentData:
    """One experiment of a report.

    Args:
        experiment: its runs.
        place: its number among the experiments of the report, from 1.
        several: whether there are others.
    """

    experiment: Experiment
    place: int = 1
    several: bool = False

    @cached_property
    def _judged(self) -> tuple[list[Verdict], str]:
        try:
            return judge_comparisons(self.experiment), ""
        except CheckpointError:
            raise
        except KavaError as error:
            return [], str(error)

    @property
    def verdicts(self) -> list[Verdict]:
        """Of the declared comparisons."""
        return self._judged[0]

    @property
    def problem(self) -> str:
        """Why there are no verdicts though comparisons are declared; empty where there are."""
        return self._judged[1]

    @property
    def declared(self) -> list[tuple[str, str]]:
        """The pairs that were to be compared."""
        return declared_comparisons(self.experiment)

    @cached_property
    def compare(self) -> CompareSpec:
        """What was declared; else exact match where a run has it, and cross-entropy where none has."""
        if self.experiment.compare is not None:
            return self.experiment.compare
        has = any("exact_match" in run.results for run in self.experiment.runs)
        return CompareSpec(metric="exact_match" if has else "ce")

    @property
    def followed(self) -> str:
        """The metric whose curve is drawn."""
        return self.compare.metric if self.compare.target is None else self.compare.of

    @property
    def treatment(self) -> str:
        """What the others are compared with; the first variant where nobody said."""
        return self.experiment.treatment or self.experiment.variants[0]

    def complete(self, variant: str) -> dict[int, RunResults]:
        """A variant's complete runs by seed."""
        runs = self.experiment.runs_of_variant(variant)
        return {seed: runs[seed] for seed in sorted(runs) if runs[seed].state == "complete"}

    def values(self, variant: str) -> dict[int, float]:
        """The compared number by seed, of the complete runs that have it."""
        found = {seed: self._value(run) for seed, run in self.complete(variant).items()}
        return {seed: value for seed, value in found.items() if isinstance(value, float)}

    def lacking(self) -> list[str]:
        """A sentence for every complete run without the compared number."""
        runs = [run for variant in self.experiment.variants for run in self.complete(variant).values()]
        return [found for found in map(self._value, runs) if isinstance(found, str)]

    def _value(self, run: RunResults) -> float | str:
        try:
            return compared_value(run, self.compare)
        except CheckpointError:
            raise
        except KavaError as error:
            return str(error)

    @cached_property
    def specs(self) -> dict[str, dict[str, Any]]:
        """The resolved spec of every variant that has begun."""
        found = {}
        for variant in self.experiment.variants:
            files = (run.folder.spec_file for run in self.experiment.runs_of_variant(variant).values())
            file = next((one for one in files if one.exists()), None)
            if file is not None:
                found[variant] = read_json_object(file)
        return found

    @cached_property
    def kv_terms(self) -> list[str]:
        """The names of the KV losses in the metrics."""
        losses = {
            loss.get("name") for spec in self.specs.values() for loss in spec.get("losses") or () if loss
        }
        return [name for name in self.metrics() if re.sub(r"_\d+$", "", name) in losses or name in losses]

    def metrics(self, prefix: str = "") -> list[str]:
        """The metrics of all evaluations, those that begin with ``prefix``, in alphabetical order."""
        keys = {key for run in self.experiment.runs for line in run.evaluations for key in line}
        return sorted(key for key in keys if key.startswith(prefix))

    def curve(self, run: RunResults, metric: str) -> Curve:
        """A run's evaluations of a metric; values that are not finite are left out."""
        points = [(line["step"], line.get(metric)) for line in run.evaluations]
        return sorted((step, float(value)) for step, value in points if _is_number(value))

    def curves(self, metric: str) -> dict[str, list[tuple[RunResults, Curve]]]:
        """By variant: every run that has such a curve."""
        found = {
            variant: [
                (run, self.curve(run, metric)) for run in self.experiment.runs_of_variant(variant).values()
            ]
            for variant in self.experiment.variants
        }
        return {
            variant: [one for one in those if one[1]]
            for variant, those in found.items()
            if any(curve for _, curve in those)
        }

    def named(self, *parts: str) -> str:
        """A new name for a figure's files, of ASCII letters and digits."""
        name = "-".join(filter(None, map(slug_of_name, parts)))
        tries = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
        own = next(one for one in tries if one not in self._taken)
        self._taken.add(own)
        return f"{self.place}-{own}" if self.several else own

    @cached_property
    def _taken(self) -> set[str]:
        return set()


LONGEST = 40
"""Characters of a part of a file's name."""


def slug_of_name(name: str) -> str:
    """Lower-case ASCII letters and digits with ``-`` for the rest; different names may give the same."""
    kept = "".join(one if one.isascii() and one.isalnum() else "-" for one in name.lower())
    return "-".join(filter(None, kept.split("-")))[:LONGEST].strip("-")


def mean_curve(curves: Sequence[tuple[RunResults, Curve]]) -> Curve:
    """The mean of the complete runs at the steps that all of them have evaluated."""
    done = [dict(curve) for run, curve in curves if run.state == "complete"]
    shared = set.intersection(*map(set, done)) if done else set()
    return [(step, math.fsum(one[step] for one in done) / len(done)) for step in sorted(shared)]


def load_experiments(folders: Sequence[Path]) -> list[ExperimentData]:
    """Gather every folder; errors as ``load_experiment``'s."""
    whole = [folder if folder.name not in ("", "..") else folder.resolve() for folder in folders]
    return [
        ExperimentData(load_experiment(folder), place, len(folders) > 1)
        for place, folder in enumerate(whole, 1)
    ]


def read_json_lines(file: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, one a line; a last line cut off by a kill is left out."""
    lines = file.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            found = json.loads(line.decode("utf-8")) if line.strip() else None
        except ValueError as error:
            if number == len(lines):
                return
            raise CheckpointError(f"{file}:{number}: unreadable: {error}") from error
        if isinstance(found, dict):
            yield found


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
