"""Write the numbers of a report as CSV: runs, curves, comparisons."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kava_core.experiment.compared_value import BUDGETS
from kava_core.experiment.load_experiment import LoadedRun
from kava_core.experiment.report.experiment_data import ExperimentData
from kava_core.experiment.report.pages.display_text import printable_text
from kava_core.experiment.report.sections.compared_settings import HASH

FORMULA_STARTS = ("=", "+", "-", "@")
"""A spreadsheet reads a text that begins so as a formula (OWASP, "CSV Injection")."""

Rows = Iterator[Sequence[Any]]


def csv_texts(experiments: Sequence[ExperimentData]) -> dict[str, str]:
    """Return the text of every file by its name."""
    return {
        "runs.csv": as_csv(_run_rows(experiments)),
        "curves.csv": as_csv(_curve_rows(experiments)),
        "comparisons.csv": as_csv(_comparison_rows(experiments)),
    }


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Return rows as CSV: numbers as they are, None as an empty cell, texts that no spreadsheet runs."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_safe_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _safe_cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = printable_text(value)
    return f"'{text}" if text.lstrip().startswith(FORMULA_STARTS) else text


FACTS = ("experiment", "variant", "seed", "state", "failure", "spec", "device", "threads", "world_size")
SPLITS = ("train", "validation")


def _run_rows(experiments: Sequence[ExperimentData]) -> Rows:
    results: dict[str, None] = {}
    compute: dict[str, None] = {}
    for data in experiments:
        for run in data.experiment.runs:
            results |= dict.fromkeys(run.results)
            compute |= dict.fromkeys(_compute_numbers(run))
    hashes = [f"{split}_sha256" for split in SPLITS]
    computed = [f"compute {name}" for name in compute]
    yield [*FACTS, "compared_metric", "compared_value", *hashes, *computed, *results]
    for data in experiments:
        for run in data.experiment.runs:
            facts = [*_run_facts(data, run), data.compare.metric, _compared_cell(data, run)]
            facts += [_short_hash(run, split) for split in SPLITS]
            yield [*facts, *map(_compute_numbers(run).get, compute), *map(run.results.get, results)]


def _compute_numbers(run: LoadedRun) -> dict[str, Any]:
    return {name: value for name, value in run.compute.items() if isinstance(value, int | float)}


def _run_facts(data: ExperimentData, run: LoadedRun) -> list[Any]:
    error = (run.failure or {}).get("error")
    recorded = [run.record.get(name) for name in ("spec_digest", "device", "threads", "world_size")]
    return [data.experiment.name, run.variant, run.seed, run.state, error, *recorded]


def _compared_cell(data: ExperimentData, run: LoadedRun) -> float | str | None:
    """Return the number by which a run is compared; None if it has none.

    A target that was not met is a text, ``> 600``, so that nobody takes the bound for a number.
    """
    if run.state != "complete":
        return None
    compared = data.compared_values(run.variant).get(run.seed)
    if compared is None:
        return None
    return compared.value if compared.censored_at is None else f"> {compared.censored_at:.17g}"


def _short_hash(run: LoadedRun, split: str) -> str | None:
    known = run.record.get("data", {}).get(split, {}).get("sha256")
    return None if known is None else str(known)[:HASH]


def _curve_rows(experiments: Sequence[ExperimentData]) -> Rows:
    yield "experiment", "variant", "seed", "step", "metric", "value"
    for data in experiments:
        for run in data.experiment.runs:
            for line in run.evaluations:
                for name, value in line.items():
                    if name not in ("step", "epoch") and isinstance(value, int | float):
                        yield data.experiment.name, run.variant, run.seed, line["step"], name, value


def _comparison_rows(experiments: Sequence[ExperimentData]) -> Rows:
    tested = (
        "seeds",
        "difference",
        "low",
        "high",
        "sign_flip_p",
        "t_test_p",
        "holm",
        "bonferroni",
        "family",
        "effect",
        "detectable",
    )
    names = ("experiment", "metric", "first", "second", "outcome", "reason", "mean_first", "mean_second")
    budgets = [f"{name}_ratio" for name in BUDGETS]
    censored = ["censored_first", "censored_second"]
    yield [*names, *tested, *censored, "bootstrap_low", "bootstrap_high", *budgets, "seed: difference"]
    for data in experiments:
        for v in data.verdicts:
            t = v.test
            yield [
                *(
                    data.experiment.name,
                    data.compare.metric,
                    v.first,
                    v.second,
                    v.outcome,
                    v.reason,
                    *v.means,
                ),
                *(t.n, t.mean, t.low, t.high, t.p, t.t_p),
                *(v.holm, v.bonferroni, v.family, t.effect, t.detectable),
                *v.censored,
                *(v.resampled or (None, None)),
                *(v.budgets.get(name) for name in BUDGETS),
                "; ".join(f"{seed}: {value:.6g}" for seed, value in v.differences.items()),
            ]
