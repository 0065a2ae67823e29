"""An experiment in a terminal: means of every variant, and a sentence for every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import mean, stdev

from rich.table import Table

from kava_core.experiment.gather import BUDGETS, Experiment, Run, value_of
from kava_core.experiment.verdict import helps, judge, steps_for_equal_flops, unjudged
from kava_core.specfile.sections.compare import CompareSpec


def means(experiment: Experiment) -> Table:
    """A row for every variant: how many of its runs are there, the metric, what they cost."""
    compare = experiment.compare or CompareSpec()
    shown = Table(title=f"{experiment.name}: {compare.metric.replace('_', ' ')}")
    for name in ("variant", "complete", "failed", "mean", "± SD", "each seed", *BUDGETS, "seconds"):
        shown.add_column(name.replace("_", " "), justify="left" if name == "variant" else "right")
    for variant in experiment.variants:
        shown.add_row(variant, *_cells(list(experiment.of(variant).values()), compare))
    return shown


def _cells(runs: list[Run], compare: CompareSpec) -> Iterator[str]:
    done = [run for run in runs if run.state == "complete"]
    values = [value_of(run, compare) for run in done]
    yield f"{len(done)} of {len(runs)}"
    yield str(sum(run.state == "failed" for run in runs))
    yield number(mean(values)) if values else "–"
    yield number(stdev(values)) if len(values) > 1 else "–"
    yield " ".join(map(number, values))
    for budget in (*BUDGETS, "seconds"):
        yield number(average(run.compute.get(budget) for run in done))


def average(values: Iterable[float | None]) -> float:
    """The mean; NaN where one is unknown, or there is none."""
    found = list(values)
    there = [value for value in found if value is not None]
    return mean(there) if there and len(there) == len(found) else math.nan


def number(value: float) -> str:
    """Short, with large numbers in powers of ten."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def told(experiment: Experiment) -> Iterator[str]:
    """What the comparisons say, one line each."""
    compare = experiment.compare
    if compare is None or not (compare.controls or compare.pairs):
        yield "no comparison is declared: add compare to the spec (docs/experiments.md)"
        return
    verdicts = judge(experiment)
    for verdict in verdicts:
        yield verdict.sentence(compare)
        if verdict.outcome == "unequal budgets" and (steps := steps_for_equal_flops(experiment, verdict)):
            yield f"  for the same FLOPs, {verdict.second} could train {steps} steps"
    for first, second in unjudged(experiment, verdicts):
        yield f"{first} − {second}: incomplete: no seed is complete in both"
    if sentence := helps(experiment, verdicts):
        yield sentence
    for before in experiment.earlier:
        yield (
            f"the experiment was changed on the way: what was declared {before['declared']} was replaced "
            f"when {before['complete']} of its runs were complete"
        )
