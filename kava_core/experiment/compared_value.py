"""Take from a run the number that is compared: a metric, or what was spent until a target was met."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from kava_core.errors import KavaError
from kava_core.experiment.load_experiment import LoadedRun
from kava_core.runs.record import STORE
from kava_core.specfile.sections.compare import DIRECTIONS, STEPS_TO_TARGET, TARGET_METRICS, CompareSpec

BUDGETS = ("student_tokens", "teacher_tokens", "flops")
"""What two variants should have been given alike."""


@dataclass(frozen=True)
class ComparedValue:
    """The number by which a run is compared."""

    value: float
    """A lower bound of what it would be, if it is censored."""
    censored_at: float | None = None
    """What had been spent when nobody looked any longer, of a run that had not met its target; else None."""


def compared_value(run: LoadedRun, compare: CompareSpec, horizon: float = math.inf) -> ComparedValue:
    """Return the number by which a complete run is compared.

    Args:
        run: complete.
        compare: says which number.
        horizon: as ``spent_to_target`` takes it.

    Raises:
        KavaError: the run has no such number, which is never taken for 0.
    """
    if compare.metric in TARGET_METRICS:
        return spent_to_target(run, compare, horizon)
    value = run.results.get(compare.metric)
    if value is None or not math.isfinite(value):
        there = ", ".join(sorted(name for name in run.results if "/" not in name))
        raise KavaError(f"{run.folder}: its results have no finite {compare.metric!r}; there are {there}")
    return ComparedValue(float(value))


def spent_to_target(run: LoadedRun, compare: CompareSpec, horizon: float = math.inf) -> ComparedValue:
    """Return the steps or operations after which the target is first met.

    A run that does not meet it is censored: it has spent at least one interval between evaluations more than
    the horizon, and that is its value.

    Args:
        run: complete.
        compare: has a target.
        horizon: the most that all compared runs have spent. What one of them reaches later, when others are
            no longer looked at, does not count.
    """
    assert compare.target is not None
    curve = _spending_curve(run, compare)
    lower_is_better = DIRECTIONS[compare.of] == "lower"
    horizon = min(horizon, curve[-1][0])
    for spent, value in curve:
        met = value <= compare.target if lower_is_better else value >= compare.target
        if met and spent <= horizon:
            return ComparedValue(spent)
    before_first_step, _ = _price_of_steps(run, compare)
    interval = curve[0][0] - before_first_step
    return ComparedValue(horizon + interval, censored_at=horizon)


def evaluation_interval(run: LoadedRun, compare: CompareSpec) -> float:
    """Return the most that a run spends between two evaluations, in steps or operations.

    What is read off a curve is known no finer. 0 for a metric that is not read off one.
    """
    if compare.metric not in TARGET_METRICS:
        return 0.0
    before_first_step, _ = _price_of_steps(run, compare)
    spent = [before_first_step, *(spent for spent, _ in _spending_curve(run, compare))]
    return max(later - earlier for earlier, later in pairwise(spent))


def most_spent(run: LoadedRun, compare: CompareSpec) -> float:
    """Return what had been spent when the followed metric was last evaluated."""
    return _spending_curve(run, compare)[-1][0]


def _spending_curve(run: LoadedRun, compare: CompareSpec) -> list[tuple[float, float]]:
    """Return what was spent until every evaluation, and the followed metric there."""
    before_first_step, each_step = _price_of_steps(run, compare)
    lines = [line for line in run.evaluations if compare.of in line]
    if not lines:
        raise KavaError(f"{run.folder}: its evaluations have no {compare.of!r}")
    return [(before_first_step + each_step * line["step"], line[compare.of]) for line in lines]


def _price_of_steps(run: LoadedRun, compare: CompareSpec) -> tuple[float, float]:
    """Return what is spent before the first step and in each step, in steps or operations."""
    if compare.metric == STEPS_TO_TARGET:
        return 0.0, 1.0
    price = price_in_flops(run)
    if price is None:
        raise KavaError(f"{run.folder}: its run.json does not say how many operations it took")
    return price


def price_in_flops(run: LoadedRun) -> tuple[float, float] | None:
    """Return the operations before the first step (of making a store) and of a step, the mean of all.

    None if the run did not count them.
    """
    flops, steps = run.compute.get("flops"), run.results.get("steps")
    if flops is None or not steps:
        return None
    before_first_step = 0.0
    if run.record.get("store"):
        before_first_step = run.compute.get("flops_of", {}).get(STORE, 0.0)
    return before_first_step, (flops - before_first_step) / steps
