"""The numbers of a report as CSV: runs, curves, comparisons."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kava_core.experiment.compared_value import BUDGETS
from kava_core.experiment.load_experiment import RunResults
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.pages.display_text import printable_text
from kava_core.experiment.report.sections.compared_settings import HASH

STEERING = ("=", "+", "-", "@")
"""A spreadsheet reads a text that begins so as a formula (OWASP, "CSV Injection")."""

Rows = Iterator[Sequence[Any]]


def csv_texts(founds: Sequence[ExperimentData]) -> dict[str, str]:
    """The text of every file by its name."""
    return {
        "runs.csv": as_csv(_run_rows(founds)),
        "curves.csv": as_csv(_curve_rows(founds)),
        "comparisons.csv": as_csv(_comparison_rows(founds)),
    }


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Numbers as they are, None as an empty cell, texts so that no spreadsheet runs them."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_safe_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _safe_cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = printable_text(value)
    return f"'{text}" if text.lstrip().startswith(STEERING) else text


FACTS = ("experiment", "variant", "seed", "state", "failure", "spec", "device", "threads", "world_size")
DATA = ("train", "validation")


def _run_rows(founds: Sequence[ExperimentData]) -> Rows:
    runs = [(found, run) for found in founds for run in found.experiment.runs]
    results = _all_names(run.results for _, run in runs)
    compute = _all_names(_compute_numbers(run) for _, run in runs)
    shown = [*(f"{split}_sha256" for split in DATA), *(f"compute {one}" for one in compute), *results]
    yield [*FACTS, *shown]
    for found, run in runs:
        spent, reached = _compute_numbers(run), run.results
        facts = [*_run_facts(found, run), *(_short_hash(run, split) for split in DATA)]
        yield [*facts, *map(spent.get, compute), *map(reached.get, results)]


def _all_names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _compute_numbers(run: RunResults) -> dict[str, Any]:
    return {name: value for name, value in run.compute.items() if isinstance(value, int | float)}


def _run_facts(found: ExperimentData, run: RunResults) -> list[Any]:
    said = (run.failure or {}).get("error")
    record = (run.record.get(name) for name in ("spec_digest", "device", "threads", "world_size"))
    return [found.experiment.name, run.variant, run.seed, run.state, said, *record]


def _short_hash(run: RunResults, split: str) -> str | None:
    known = run.record.get("data", {}).get(split, {}).get("sha256")
    return None if known is None else str(known)[:HASH]


def _curve_rows(founds: Sequence[ExperimentData]) -> Rows:
    yield "experiment", "variant", "seed", "step", "metric", "value"
    for found in founds:
        for run in found.experiment.runs:
            for line in run.evaluations:
                for name, value in line.items():
                    if name not in ("step", "epoch") and isinstance(value, int | float):
                        yield found.experiment.name, run.variant, run.seed, line["step"], name, value


def _comparison_rows(founds: Sequence[ExperimentData]) -> Rows:
    tested = (
        "seeds",
        "difference",
        "low",
        "high",
        "p",
        "holm",
        "bonferroni",
        "family",
        "effect",
        "detectable",
    )
    names = ("experiment", "metric", "first", "second", "outcome", "reason", "mean_first", "mean_second")
    budgets = [f"{name}_ratio" for name in BUDGETS]
    yield [*names, *tested, "bootstrap_low", "bootstrap_high", *budgets, "seed: difference"]
    for found in founds:
        for v in found.verdicts:
            t = v.test
            yield [
                *(
                    found.experiment.name,
                    found.compare.metric,
                    v.first,
                    v.second,
                    v.outcome,
                    v.reason,
                    *v.means,
                ),
                *(t.n, t.mean, t.low, t.high, t.p, v.holm, v.bonferroni, v.family, t.effect, t.detectable),
                *(v.resampled or (None, None)),
                *(v.budgets.get(name) for name in BUDGETS),
                "; ".join(f"{seed}: {value:.6g}" for seed, value in v.differences.items()),
            ]
