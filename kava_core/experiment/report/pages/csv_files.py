"""The numbers of a report as CSV: runs, curves, comparisons."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from kava_core.experiment.gather import BUDGETS, Run
from kava_core.experiment.report.experiment_data import Found
from kava_core.experiment.report.pages.text import plain
from kava_core.experiment.report.sections.compared import HASH

STEERING = ("=", "+", "-", "@")
"""A spreadsheet reads a text that begins so as a formula (OWASP, "CSV Injection")."""

Rows = Iterator[Sequence[Any]]


def files(founds: Sequence[Found]) -> dict[str, str]:
    """The text of every file by its name."""
    return {
        "runs.csv": as_csv(_runs(founds)),
        "curves.csv": as_csv(_curves(founds)),
        "comparisons.csv": as_csv(_comparisons(founds)),
    }


def as_csv(rows: Iterable[Sequence[Any]]) -> str:
    """Numbers as they are, None as an empty cell, texts so that no spreadsheet runs them."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([_cell(value) for value in row] for row in rows)
    return stream.getvalue()


def _cell(value: Any) -> Any:
    if value is None or isinstance(value, int | float):
        return value
    text = plain(value)
    return f"'{text}" if text.lstrip().startswith(STEERING) else text


FACTS = ("experiment", "variant", "seed", "state", "failure", "spec", "device", "threads", "world_size")
DATA = ("train", "validation")


def _runs(founds: Sequence[Found]) -> Rows:
    runs = [(found, run) for found in founds for run in found.experiment.runs]
    results = _names(run.results for _, run in runs)
    compute = _names(_numbers(run) for _, run in runs)
    shown = [*(f"{split}_sha256" for split in DATA), *(f"compute {one}" for one in compute), *results]
    yield [*FACTS, *shown]
    for found, run in runs:
        spent, reached = _numbers(run), run.results
        facts = [*_facts(found, run), *(_hash(run, split) for split in DATA)]
        yield [*facts, *map(spent.get, compute), *map(reached.get, results)]


def _names(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def _numbers(run: Run) -> dict[str, Any]:
    return {name: value for name, value in run.compute.items() if isinstance(value, int | float)}


def _facts(found: Found, run: Run) -> list[Any]:
    said = (run.failure or {}).get("error")
    record = (run.record.get(name) for name in ("spec_digest", "device", "threads", "world_size"))
    return [found.experiment.name, run.variant, run.seed, run.state, said, *record]


def _hash(run: Run, split: str) -> str | None:
    known = run.record.get("data", {}).get(split, {}).get("sha256")
    return None if known is None else str(known)[:HASH]


def _curves(founds: Sequence[Found]) -> Rows:
    yield "experiment", "variant", "seed", "step", "metric", "value"
    for found in founds:
        for run in found.experiment.runs:
            for line in run.evaluations:
                for name, value in line.items():
                    if name not in ("step", "epoch") and isinstance(value, int | float):
                        yield found.experiment.name, run.variant, run.seed, line["step"], name, value


def _comparisons(founds: Sequence[Found]) -> Rows:
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
