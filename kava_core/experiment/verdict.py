"""Judge the declared comparisons: one verdict and one sentence for each, corrected over one family."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from kava_core.experiment.compared_value import (
    BUDGETS,
    ComparedValue,
    compared_value,
    evaluation_interval,
    most_spent,
)
from kava_core.experiment.load_experiment import Experiment, LoadedRun
from kava_core.experiment.outcome import Outcome, PairedValues, budgets_text, decide_outcome, limit_finding
from kava_core.experiment.statistics import (
    MOST_ENUMERATED,
    PairedTest,
    bonferroni_correction,
    bootstrap_interval,
    holm_correction,
    paired_test,
)
from kava_core.specfile.sections.compare import TARGET_METRICS, CompareSpec


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
    censored: tuple[int, int]
    """Seeds in which each variant did not meet the target; its mean is then a lower bound."""
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
        parts += self._censored_texts()
        if not math.isnan(test.p):
            flips = "exact" if test.n <= MOST_ENUMERATED else "drawn"
            parts.append(f"{flips} sign-flip p {test.p:.3g}, Holm {self.holm:.3g} of {self.family}")
        if not math.isnan(test.t_p):
            parts.append(f"paired t-test p {test.t_p:.3g}")
        parts.append(f"budgets {budgets_text(self.budgets)}")
        reason = f" ({self.reason})" if self.reason else ""
        return "; ".join(parts) + f": {self.outcome}{reason}"

    def mean_texts(self) -> tuple[str, str]:
        """Return both means; a lower bound is shown as such, ``> 300``."""
        first, second = (f"{mean:.4g}" for mean in self.means)
        return f"> {first}" if self.censored[0] else first, f"> {second}" if self.censored[1] else second

    def _censored_texts(self) -> list[str]:
        texts = []
        for name, count in zip((self.first, self.second), self.censored, strict=True):
            if count:
                texts.append(f"{name} did not meet the target in {count} of {self.test.n} seeds")
        return texts


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


def _test_of_values(values: PairedValues) -> PairedTest | None:
    return paired_test(list(_differences(values).values())) if values else None


def _differences(values: PairedValues) -> dict[int, float]:
    """Return first minus second by seed; two runs that both did not meet the target differ by 0."""
    return {seed: first.value - second.value for seed, (first, second) in values.items()}


def comparisons_without_verdict(experiment: Experiment, verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Return the declared comparisons that have no verdict: no seed is complete in both variants."""
    judged = {(verdict.first, verdict.second) for verdict in verdicts}
    return [pair for pair in declared_comparisons(experiment) if pair not in judged]


def _values_by_seed(
    experiment: Experiment, pair: tuple[str, str], compare: CompareSpec
) -> dict[int, tuple[ComparedValue, ComparedValue]]:
    """Return what both variants reached, by the seeds that both have finished."""
    horizon = _common_horizon(experiment, pair, compare)
    first, second = (_values_of_variant(experiment, name, compare, horizon) for name in pair)
    values = {}
    for seed in sorted(first.keys() & second.keys()):
        values[seed] = (first[seed], second[seed])
    return values


def _values_of_variant(
    experiment: Experiment, variant: str, compare: CompareSpec, horizon: float
) -> dict[int, ComparedValue]:
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
    values: PairedValues,
    test: PairedTest,
    corrected: tuple[float, float],
    family: int,
) -> Verdict:
    runs_of_first, runs_of_second = (_runs_of_seeds(experiment, name, values) for name in pair)
    budgets = _budget_ratios(runs_of_first, runs_of_second)
    missing = _open_runs(experiment, pair) or _data_difference(runs_of_first, runs_of_second)
    holm, bonferroni = corrected
    first_values, second_values = zip(*values.values(), strict=True)
    interval = max(evaluation_interval(run, compare) for run in (*runs_of_first, *runs_of_second))
    outcome, reason = decide_outcome(compare, test, holm, family)
    if outcome in ("better", "worse"):
        outcome, reason = limit_finding(compare, outcome, pair, values, test, interval, budgets)
    if missing:
        outcome, reason = "incomplete", missing
    return Verdict(
        first=pair[0],
        second=pair[1],
        outcome=outcome,
        reason=reason,
        differences=_differences(values),
        means=(mean(one.value for one in first_values), mean(one.value for one in second_values)),
        test=test,
        holm=holm,
        bonferroni=bonferroni,
        family=family,
        censored=(_count_censored(first_values), _count_censored(second_values)),
        resampled=_bootstrapped(compare, runs_of_first, runs_of_second),
        budgets=budgets,
    )


def _runs_of_seeds(experiment: Experiment, variant: str, seeds: Iterable[int]) -> list[LoadedRun]:
    runs = experiment.runs_of_variant(variant)
    return [runs[seed] for seed in seeds]


def _count_censored(values: Iterable[ComparedValue]) -> int:
    return sum(one.censored_at is not None for one in values)


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


def steps_for_equal_flops(experiment: Experiment, verdict: Verdict) -> int | None:
    """Return how many steps the second variant could have trained for the first one's operations."""
    ratio = verdict.budgets.get("flops", 1.0)
    runs = experiment.runs_of_variant(verdict.second).values()
    steps = [run.results["steps"] for run in runs if run.results]
    return round(max(steps) * ratio) if steps and math.isfinite(ratio) else None
