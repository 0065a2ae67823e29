"""What the declared comparisons say: one verdict and one sentence for each, over one family."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any, Literal

from kava_core.experiment.gather import BUDGETS, Experiment, Run, most_spent, value_of
from kava_core.experiment.statistics import FEW, Paired, bonferroni, bootstrap, holm, paired
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
    test: Paired
    holm: float
    bonferroni: float
    family: int
    """How many comparisons the corrections are for."""
    resampled: tuple[float, float] | None
    """Interval of the bootstrap over seeds and examples; None where examples were not kept."""
    budgets: Mapping[str, float]
    """First over second, for every budget that both recorded."""

    def sentence(self, compare: CompareSpec) -> str:
        """Difference, interval, test, n, corrected p, family, budgets, in one line."""
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
        parts.append(f"budgets {_ratios(self.budgets)}")
        told = f" ({self.reason})" if self.reason else ""
        return "; ".join(parts) + f": {self.outcome}{told}"


def comparisons(experiment: Experiment) -> list[tuple[str, str]]:
    """The family: the treatment against each control, then the declared pairs."""
    compare = experiment.compare
    if compare is None:
        return []
    own = [(experiment.treatment, control) for control in compare.controls]
    return list(dict.fromkeys([*own, *compare.pairs]))


def judge(experiment: Experiment) -> list[Verdict]:
    """A verdict for every declared comparison that has a seed to go by, corrected over the whole family.

    Raises:
        KavaError: a complete run lacks the metric.
    """
    compare = experiment.compare
    if compare is None:
        return []
    there = {pair: _values(experiment, pair, compare) for pair in comparisons(experiment)}
    tests = [paired([a - b for a, b in values.values()]) if values else None for values in there.values()]
    p = [math.nan if test is None else test.p for test in tests]
    corrected = zip(holm(p), bonferroni(p), strict=True)
    return [
        _verdict(experiment, compare, pair, values, test, both, family=len(there))
        for (pair, values), test, both in zip(there.items(), tests, corrected, strict=True)
        if test is not None
    ]


def unjudged(experiment: Experiment, verdicts: Sequence[Verdict]) -> list[tuple[str, str]]:
    """Comparisons that were declared and have no verdict: no seed is complete in both variants."""
    judged = {(verdict.first, verdict.second) for verdict in verdicts}
    return [pair for pair in comparisons(experiment) if pair not in judged]


def _values(
    experiment: Experiment, pair: tuple[str, str], compare: CompareSpec
) -> dict[int, tuple[float, float]]:
    """What both variants reached, by the seeds that both have finished."""
    horizon = _horizon(experiment, pair, compare)
    first, second = (
        {seed: value_of(run, compare, horizon) for seed, run in _complete(experiment, name).items()}
        for name in pair
    )
    return {seed: (first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())}


def _complete(experiment: Experiment, name: str) -> dict[int, Run]:
    return {seed: run for seed, run in experiment.of(name).items() if run.state == "complete"}


def _horizon(experiment: Experiment, pair: tuple[str, str], compare: CompareSpec) -> float:
    """Of what is counted up to a target: as much as every run of the pair has spent."""
    runs = [run for name in pair for run in _complete(experiment, name).values()]
    if compare.metric not in TARGET_METRICS or not runs:
        return math.inf
    return min(most_spent(run, compare) for run in runs)


def _verdict(
    experiment: Experiment,
    compare: CompareSpec,
    pair: tuple[str, str],
    values: dict[int, tuple[float, float]],
    test: Paired,
    corrected: tuple[float, float],
    *,
    family: int,
) -> Verdict:
    sides = [[experiment.of(name)[seed] for seed in values] for name in pair]
    budgets = _budgets(*sides)
    missing = _missing(experiment, pair) or _other_data(*sides)
    outcome, reason = _outcome(compare, test, corrected[0], budgets, missing)
    first, second = zip(*values.values(), strict=True)
    return Verdict(
        *pair,
        outcome,
        reason,
        {seed: a - b for seed, (a, b) in values.items()},
        (mean(first), mean(second)),
        test,
        *corrected,
        family,
        _resampled(compare, *sides),
        budgets,
    )


def _outcome(
    compare: CompareSpec, test: Paired, p: float, budgets: Mapping[str, float], missing: str
) -> tuple[Outcome, str]:
    if missing:
        return "incomplete", missing
    if test.n < FEW:
        return "descriptive", f"{test.n} of the {FEW} seeds that a verdict needs"
    if math.isnan(p):
        return "descriptive", test.note
    if p > SIGNIFICANT:
        found = f"a true difference of {test.detectable:.3g} would be found 4 times of 5"
        return "not shown", test.note or found
    if uneven := _uneven(compare, budgets):
        return "unequal budgets", f"{uneven}; not declared in compare.unequal"
    return ("better" if (test.mean < 0) == compare.lower_is_better else "worse"), ""


def _missing(experiment: Experiment, pair: tuple[str, str]) -> str:
    """Runs of the pair that are not complete, failed ones first; empty where there are none."""
    open_runs = [run for name in pair for run in experiment.of(name).values() if run.state != "complete"]
    open_runs.sort(key=lambda run: run.state != "failed")
    return ", ".join(f"{run.variant} seed {run.seed} {run.state}" for run in open_runs)


def _other_data(first: Sequence[Run], second: Sequence[Run]) -> str:
    """Why two runs of a seed did not see and answer the same examples; empty where all did."""
    for one, other in zip(first, second, strict=True):
        for split in ("train", "validation"):
            if _hashes(one, split) != _hashes(other, split):
                return f"seed {one.seed}: {one.variant} and {other.variant} have other {split} examples"
        counts = [len(run.correct) for run in (one, other) if run.correct is not None]
        if len(set(counts)) > 1:
            return (
                f"seed {one.seed}: {one.variant} answered {counts[0]} examples, {other.variant} {counts[1]}"
            )
    return ""


def _hashes(run: Run, split: str) -> tuple[Any, ...]:
    """Of the examples that were given, and of those that were short enough."""
    data = run.record.get("data", {})
    return data.get(split, {}).get("sha256"), data.get("kept", {}).get(split)


def _budgets(first: Sequence[Run], second: Sequence[Run]) -> dict[str, float]:
    """Mean of the first over mean of the second; 0 / 0 is equal."""
    if any(run.compute.get(name) is None for run in (*first, *second) for name in BUDGETS):
        return {}
    spent = [{name: mean(run.compute[name] for run in side) for name in BUDGETS} for side in (first, second)]
    return {name: _ratio(spent[0][name], spent[1][name]) for name in BUDGETS}


def _ratio(first: float, second: float) -> float:
    if first == second:
        return 1.0
    return first / second if second else math.inf


def _uneven(compare: CompareSpec, budgets: Mapping[str, float]) -> str:
    """The budgets that differ though nobody declared it; empty where all is fair."""
    if not budgets:
        return "no record of what the runs cost"
    off = {
        name: ratio
        for name, ratio in budgets.items()
        if name not in compare.unequal and abs(math.log(max(ratio, 1e-9))) > math.log1p(compare.tolerance)
    }
    return _ratios(off) if off else ""


def _ratios(budgets: Mapping[str, float]) -> str:
    told = (f"{name.replace('_', ' ')} {_times(ratio)}" for name, ratio in budgets.items())
    return ", ".join(told) or "unknown"


def _times(ratio: float) -> str:
    return f"×{ratio:.3g}" if math.isfinite(ratio) and ratio else "of one alone"


def _resampled(
    compare: CompareSpec, first: Sequence[Run], second: Sequence[Run]
) -> tuple[float, float] | None:
    """Only what is a mean over examples can be resampled: exact match."""
    if compare.metric != "exact_match":
        return None
    rows = [_by_example(x, y) for x, y in zip(first, second, strict=True)]
    kept = [row for row in rows if row]
    return bootstrap(kept) if len(kept) == len(rows) else None


def _by_example(first: Run, second: Run) -> list[int]:
    """Differences of two runs of a seed; none where one kept no examples, or they answered others."""
    if first.correct is None or second.correct is None or len(first.correct) != len(second.correct):
        return []
    return [a - b for a, b in zip(first.correct, second.correct, strict=True)]


NEEDED: tuple[Control, ...] = ("no_kv", "shuffled_teacher")
"""What KV distillation has to beat before it is said to help."""


def helps(experiment: Experiment, verdicts: Sequence[Verdict]) -> str:
    """One sentence on whether KV distillation helped: only where it beats both controls that could tell."""
    compare = experiment.compare
    if compare is None or not compare.controls:
        return ""
    known = {v.second: v for v in verdicts if v.first == experiment.treatment}
    asked = [name for name in NEEDED if name in compare.controls]
    if len(asked) < len(NEEDED):
        lacking = ", ".join(name for name in NEEDED if name not in asked)
        return f"Whether KV distillation helps is not asked: declare the controls {lacking}."
    beaten = [name for name in NEEDED if name in known and known[name].outcome == "better"]
    if len(beaten) == len(NEEDED):
        return f"KV distillation helps here: {experiment.treatment} beats no_kv and shuffled_teacher."
    open_ = ", ".join(
        f"{name} ({known[name].outcome if name in known else 'no shared seed'})"
        for name in NEEDED
        if name not in beaten
    )
    return f"Not shown that KV distillation helps here: {experiment.treatment} does not beat {open_}."


def steps_for_equal_flops(experiment: Experiment, verdict: Verdict) -> int | None:
    """How many steps the second variant could have trained for the first one's operations."""
    ratio = verdict.budgets.get("flops", 1.0)
    steps = {run.results["steps"] for run in experiment.of(verdict.second).values() if run.results}
    return round(max(steps) * ratio) if steps and math.isfinite(ratio) else None
