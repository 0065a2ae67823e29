"""Judge the declared comparisons: one verdict and one sentence for each, corrected over one family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from kava_core.experiment.compared_value import BUDGETS, compared_value, most_spent
from kava_core.experiment.load_experiment import Experiment, LoadedRun
from kava_core.experiment.statistics import (
    FEW,
    PairedTest,
    bonferroni_correction,
    bootstrap_interval,
    holm_correction,
    paired_test,
)
from kava_core.specfile.sections.compare import TARGET_METRICS, CompareSpec, Control

SIGNIFICANT = 0.05

Outcome = Literal["better", "worse", "not shown", "descriptive", "unequal budgets", "incomplete"]
"""``not shown``: tested, and no difference found; ``descriptive``: too few seeds to test; ``unequal
budgets``: tested, but one variant was given more; ``incomplete``: runs are missing or have failed."""


@dataclass(frozen=True)
class Verdict:
    """First minus second, over the seeds that both have finished."""

    first: str
    second: str
    outcome: Outcome
    reason: str
    """Why it is not more than that; empty for a plain result."""
    differences: Mapping[int, float]
    """By seed."""
    means: tuple[float, float]
    """Of both variants over these seeds."""
    test: PairedTest
    holm: float
    bonferroni: float
    family: int
    """How many comparisons the corrections are for."""
    resampled: tuple[float, float] | None
    """Interval of the bootstrap over seeds and examples; None if examples were not kept."""
    budgets: Mapping[str, float]
    """First over second, for every budget that both recorded."""

    def sentence(self, compare: CompareSpec) -> str:
        """Return difference, interval, test, n, corrected p, family and budgets in one line."""
        test, unit = self.test, compare.metric.replace("_", " ")
        parts = [f"{self.first} − {self.second}: {test.mean:+.4g} {unit}"]
        if not math.isnan(test.low):
            parts.append(f"95 % t-interval {test.low:+.4g} … {test.high:+.4g}")
        if self.resampled is not None:
            low, high = self.resampled
            parts.append(f"bootstrap over seeds and examples {low:+.4g} … {high:+.4g}")
        parts.append(f"{test.n} shared {'seed' if test.n == 1 else 'seeds'}")
        if not math.isnan(test.p):
            parts.append(f"paired t-test p {test.p:.3g}, Holm {self.holm:.3g} of {self.family}")
        parts.append(f"budgets {_budgets_text(self.budgets)}")
        reason = f" ({self.reason})" if self.reason else ""
        return "; ".join(parts) + f": {self.outcome}{reason}"


def declared_comparisons(experiment: Experiment) -> list[tuple[str, str]]:
    """Return the family: the treatment against each control, then the declared pairs."""
    compare = experiment.compare
    if compare is None:
        return []
    with_controls = [(experiment.treatment, control) for control in compare.controls]
    return list(dict.fromkeys([*with_controls, *compare.pairs]))


def judge_comparisons(experiment: Experiment) -> list[Verdict]:
    """Return a verdict for every declared comparison that has a seed to go by.

    P-values are corrected over the whole family, comparisons without a seed included.

    Raises:
        KavaError: a complete run lacks the metric.
    """
    compare = experiment.compare
    if compare is None:
        return []
    pairs = declared_comparisons(experiment)
    values_of_pairs = [_values_by_seed(experiment, pair, compare) for pair in pairs]
    tests = [_test_of_values(values) for values in values_of_pairs]
    p_values = [math.nan if test is None else test.p for test in tests]
    holm, bonferroni = holm_correction(p_values), bonferroni_correction(p_values)
    verdicts = []
    for place, (pair, values, test) in enumerate(zip(pairs, values_of_pairs, tests, strict=True)):
        if test is not None:
            corrected = holm[place], bonferroni[place]
            verdicts.append(_make_verdict(experiment, compare, pair, values, test, corrected, len(pairs)))
    return verdicts


def _test_of_values(values: Mapping[int, tuple[float, float]]) -> PairedTest | None:
    return paired_test([first - second for first, second in values.values()]) if values else None


def comparisons_without_verdict(experiment: Experiment, verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Return the declared comparisons that have no verdict: no seed is complete in both variants."""
    judged = {(verdict.first, verdict.second) for verdict in verdicts}
    return [pair for pair in declared_comparisons(experiment) if pair not in judged]


def _values_by_seed(
    experiment: Experiment, pair: tuple[str, str], compare: CompareSpec
) -> dict[int, tuple[float, float]]:
    """Return what both variants reached, by the seeds that both have finished."""
    horizon = _common_horizon(experiment, pair, compare)
    first, second = (_values_of_variant(experiment, name, compare, horizon) for name in pair)
    values = {}
    for seed in sorted(first.keys() & second.keys()):
        values[seed] = (first[seed], second[seed])
    return values


def _values_of_variant(
    experiment: Experiment, variant: str, compare: CompareSpec, horizon: float
) -> dict[int, float]:
    runs = experiment.complete_runs(variant)
    return {seed: compared_value(run, compare, horizon) for seed, run in runs.items()}


def _common_horizon(experiment: Experiment, pair: tuple[str, str], compare: CompareSpec) -> float:
    """Return what every run of the pair has spent, if the metric is counted up to a target."""
    horizon = math.inf
    if compare.metric in TARGET_METRICS:
        for variant in pair:
            for run in experiment.complete_runs(variant).values():
                horizon = min(horizon, most_spent(run, compare))
    return horizon


def _make_verdict(
    experiment: Experiment,
    compare: CompareSpec,
    pair: tuple[str, str],
    values: dict[int, tuple[float, float]],
    test: PairedTest,
    corrected: tuple[float, float],
    family: int,
) -> Verdict:
    runs_of_first, runs_of_second = (_runs_of_seeds(experiment, name, values) for name in pair)
    budgets = _budget_ratios(runs_of_first, runs_of_second)
    missing = _open_runs(experiment, pair) or _data_difference(runs_of_first, runs_of_second)
    holm, bonferroni = corrected
    outcome, reason = _decide_outcome(compare, test, holm, budgets, missing)
    first_values, second_values = zip(*values.values(), strict=True)
    return Verdict(
        first=pair[0],
        second=pair[1],
        outcome=outcome,
        reason=reason,
        differences={seed: first - second for seed, (first, second) in values.items()},
        means=(mean(first_values), mean(second_values)),
        test=test,
        holm=holm,
        bonferroni=bonferroni,
        family=family,
        resampled=_bootstrapped(compare, runs_of_first, runs_of_second),
        budgets=budgets,
    )


def _runs_of_seeds(experiment: Experiment, variant: str, seeds: Iterable[int]) -> list[LoadedRun]:
    runs = experiment.runs_of_variant(variant)
    return [runs[seed] for seed in seeds]


def _decide_outcome(
    compare: CompareSpec, test: PairedTest, p: float, budgets: Mapping[str, float], missing: str
) -> tuple[Outcome, str]:
    """Return the outcome and why it is not more than that.

    Args:
        compare: what was declared.
        test: of the differences.
        p: corrected.
        budgets: first over second.
        missing: why the comparison is incomplete; empty if it is not.
    """
    if missing:
        return "incomplete", missing
    if test.n < FEW:
        return "descriptive", f"{test.n} of the {FEW} seeds that a verdict needs"
    if math.isnan(p):
        return "descriptive", test.note
    if p > SIGNIFICANT:
        detectable = f"a true difference of {test.detectable:.3g} would be found 4 times of 5"
        return "not shown", test.note or detectable
    inequality = _undeclared_inequality(compare, budgets)
    if inequality:
        return "unequal budgets", f"{inequality}; not declared in compare.unequal"
    first_is_lower = test.mean < 0
    return ("better" if first_is_lower == compare.lower_is_better else "worse"), ""


def _open_runs(experiment: Experiment, pair: tuple[str, str]) -> str:
    """Return the runs of the pair that are not complete, failed ones first; empty if there are none."""
    failed, others = list[str](), list[str]()
    for variant in pair:
        for run in experiment.runs_of_variant(variant).values():
            text = f"{variant} seed {run.seed} {run.state}"
            if run.state == "failed":
                failed.append(text)
            elif run.state != "complete":
                others.append(text)
    return ", ".join([*failed, *others])


def _data_difference(first: Sequence[LoadedRun], second: Sequence[LoadedRun]) -> str:
    """Return why two runs of a seed did not see and answer the same examples; empty if all did."""
    for one, other in zip(first, second, strict=True):
        for split in ("train", "validation"):
            if _data_hashes(one, split) != _data_hashes(other, split):
                return f"seed {one.seed}: {one.variant} and {other.variant} have other {split} examples"
        if one.correct_answers is None or other.correct_answers is None:
            continue
        answered, answered_by_other = len(one.correct_answers), len(other.correct_answers)
        if answered != answered_by_other:
            return (
                f"seed {one.seed}: {one.variant} answered {answered} examples, "
                f"{other.variant} {answered_by_other}"
            )
    return ""


def _data_hashes(run: LoadedRun, split: str) -> tuple[Any, ...]:
    """Return the hashes of the examples that were given, and of those that were short enough."""
    data = run.record.get("data", {})
    return data.get(split, {}).get("sha256"), data.get("kept", {}).get(split)


def _budget_ratios(first: Sequence[LoadedRun], second: Sequence[LoadedRun]) -> dict[str, float]:
    """Return the mean of the first over the mean of the second; nothing if a run did not record it."""
    ratios = {}
    for name in BUDGETS:
        spent_by_first: list[Any] = [run.compute.get(name) for run in first]
        spent_by_second: list[Any] = [run.compute.get(name) for run in second]
        if None in spent_by_first or None in spent_by_second:
            return {}
        ratios[name] = _quotient(mean(spent_by_first), mean(spent_by_second))
    return ratios


def _quotient(first: float, second: float) -> float:
    """Return first / second; 0 / 0 is equal."""
    if first == second:
        return 1.0
    return first / second if second else math.inf


def _undeclared_inequality(compare: CompareSpec, budgets: Mapping[str, float]) -> str:
    """Return the budgets that differ though nobody declared it; empty if all is fair."""
    if not budgets:
        return "no record of what the runs cost"
    tolerance = math.log1p(compare.tolerance)
    unequal = {}
    for name, ratio in budgets.items():
        differs = abs(math.log(max(ratio, 1e-9))) > tolerance
        if differs and name not in compare.unequal:
            unequal[name] = ratio
    return _budgets_text(unequal) if unequal else ""


def _budgets_text(budgets: Mapping[str, float]) -> str:
    texts = (f"{name.replace('_', ' ')} {ratio_text(ratio)}" for name, ratio in budgets.items())
    return ", ".join(texts) or "unknown"


def ratio_text(ratio: float) -> str:
    """Return ``×1.02``, or words if only one of the two has spent anything."""
    return f"×{ratio:.3g}" if math.isfinite(ratio) and ratio else "of one alone"


def _bootstrapped(
    compare: CompareSpec, first: Sequence[LoadedRun], second: Sequence[LoadedRun]
) -> tuple[float, float] | None:
    """Return the bootstrap's interval of exact match, which alone is a mean over examples."""
    if compare.metric != "exact_match":
        return None
    rows = [_example_differences(one, other) for one, other in zip(first, second, strict=True)]
    return bootstrap_interval(rows) if all(rows) else None


def _example_differences(first: LoadedRun, second: LoadedRun) -> list[int]:
    """Return the differences of two runs of a seed; none if one kept no examples, or they answered others."""
    right_first, right_second = first.correct_answers, second.correct_answers
    if right_first is None or right_second is None or len(right_first) != len(right_second):
        return []
    return [one - other for one, other in zip(right_first, right_second, strict=True)]


NEEDED_CONTROLS: tuple[Control, ...] = ("no_kv", "shuffled_teacher")
"""What KV distillation has to beat before it is said to help."""


def sentence_on_distillation(experiment: Experiment, verdicts: Sequence[Verdict]) -> str:
    """Return a sentence on whether KV distillation helped: only if it beats both controls that can show it.

    Empty if no control is declared.
    """
    compare = experiment.compare
    if compare is None or not compare.controls:
        return ""
    undeclared = [name for name in NEEDED_CONTROLS if name not in compare.controls]
    if undeclared:
        return f"Whether KV distillation helps is not asked: declare the controls {', '.join(undeclared)}."
    outcomes = {v.second: v.outcome for v in verdicts if v.first == experiment.treatment}
    unbeaten = []
    for name in NEEDED_CONTROLS:
        outcome = outcomes.get(name, "no shared seed")
        if outcome != "better":
            unbeaten.append(f"{name} ({outcome})")
    if not unbeaten:
        return f"KV distillation helps here: {experiment.treatment} beats no_kv and shuffled_teacher."
    return (
        f"Not shown that KV distillation helps here: {experiment.treatment} does not beat "
        f"{', '.join(unbeaten)}."
    )


def steps_for_equal_flops(experiment: Experiment, verdict: Verdict) -> int | None:
    """Return how many steps the second variant could have trained for the first one's operations."""
    ratio = verdict.budgets.get("flops", 1.0)
    runs = experiment.runs_of_variant(verdict.second).values()
    steps = [run.results["steps"] for run in runs if run.results]
    return round(max(steps) * ratio) if steps and math.isfinite(ratio) else None
