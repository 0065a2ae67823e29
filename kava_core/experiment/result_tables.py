"""Show an experiment in a terminal: means of every variant, and a sentence for every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from statistics import mean, stdev

from rich.table import Table

from kava_core.experiment.compared_value import BUDGETS, ComparedValue, compared_value
from kava_core.experiment.distillation_claim import sentence_on_distillation
from kava_core.experiment.load_experiment import Experiment
from kava_core.experiment.shared_runs import neighbours, runs_shared_with
from kava_core.experiment.verdict import (
    comparisons_without_verdict,
    judge_comparisons,
    steps_for_equal_flops,
)
from kava_core.specfile.sections.compare import CompareSpec


def table_of_means(experiment: Experiment) -> Table:
    """Return a table with a row for every variant: its runs, the metric, what they cost."""
    compare = experiment.compare or CompareSpec()
    table = Table(title=f"{experiment.name}: {compare.metric.replace('_', ' ')}")
    for name in ("variant", "complete", "failed", "mean", "± SD", "each seed", *BUDGETS, "seconds"):
        table.add_column(name.replace("_", " "), justify="left" if name == "variant" else "right")
    for variant in experiment.variants:
        table.add_row(variant, *_cells_of_variant(experiment, variant, compare))
    return table


def _cells_of_variant(experiment: Experiment, variant: str, compare: CompareSpec) -> Iterator[str]:
    runs = experiment.runs_of_variant(variant).values()
    complete = experiment.complete_runs(variant).values()
    compared = [compared_value(run, compare) for run in complete]
    values = [each.value for each in compared]
    bound = "> " if any(each.censored_at is not None for each in compared) else ""
    yield f"{len(complete)} of {len(runs)}"
    yield str(sum(run.state == "failed" for run in runs))
    yield bound + number_text(mean(values)) if values else "–"
    yield number_text(stdev(values)) if len(values) > 1 and not bound else "–"
    yield ", ".join(map(compared_text, compared))
    for budget in (*BUDGETS, "seconds"):
        yield number_text(mean_if_all_known(run.compute.get(budget) for run in complete))


def mean_if_all_known(values: Iterable[float | None]) -> float:
    """Return the mean; NaN if one value is unknown, or there is none."""
    known: list[float] = []
    for value in values:
        if value is None:
            return math.nan
        known.append(value)
    return mean(known) if known else math.nan


def number_text(value: float) -> str:
    """Return a number with three digits, large ones in powers of ten; a dash for NaN."""
    return "–" if math.isnan(value) else f"{value:.3g}"


def compared_text(compared: ComparedValue) -> str:
    """Return a run's number with three digits; ``> 600`` for a target that was not met within 600 steps."""
    if compared.censored_at is not None:
        return f"> {number_text(compared.censored_at)}"
    return number_text(compared.value)


def comparison_lines(experiment: Experiment) -> Iterator[str]:
    """Yield what the comparisons show, one line each."""
    compare = experiment.compare
    if compare is None or not (compare.controls or compare.pairs):
        yield "no comparison is declared: add compare to the spec (docs/guide/experiments.md)"
        return
    verdicts = judge_comparisons(experiment)
    for verdict in verdicts:
        yield verdict.sentence(compare)
        steps = steps_for_equal_flops(experiment, verdict)
        if verdict.outcome == "unequal budgets" and steps:
            yield f"  for the same FLOPs, {verdict.second} could train {steps} steps"
    for first, second in comparisons_without_verdict(experiment, verdicts):
        yield f"{first} − {second}: incomplete: no seed is complete in both"
    sentence = sentence_on_distillation(experiment, verdicts)
    if sentence:
        yield sentence
    for shared in runs_shared_with(experiment, neighbours(experiment)):
        yield shared.sentence(experiment.name)
    for plan in experiment.earlier:
        yield (
            f"the experiment was changed on the way: what was declared {plan['declared']} was replaced "
            f"when {plan['complete']} of its runs were complete"
        )
