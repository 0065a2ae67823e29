"""Decide what a tested comparison may be called: better, worse, or why not more than that."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from kava_core.experiment.compared_value import ComparedValue
from kava_core.experiment.statistics import FEW, PairedTest, smallest_p
from kava_core.specfile.sections.compare import CompareSpec

SIGNIFICANT = 0.05

TOO_FINE: Literal["less than one evaluation interval"] = "less than one evaluation interval"

Outcome = Literal[
    "better",
    "worse",
    "not shown",
    "less than one evaluation interval",
    "descriptive",
    "unequal budgets",
    "incomplete",
]
"""``not shown``: tested, and no difference found; ``less than one evaluation interval``: found, but smaller
than what the curves resolve; ``descriptive``: too few seeds to test; ``unequal budgets``: found, but one
variant was given more; ``incomplete``: runs are missing or have failed."""

PairedValues = Mapping[int, tuple[ComparedValue, ComparedValue]]
"""By seed: the compared numbers of the first and the second variant."""


def decide_outcome(compare: CompareSpec, test: PairedTest, p: float, family: int) -> tuple[Outcome, str]:
    """Return what the test says, and why it is not more than that.

    Args:
        compare: what was declared.
        test: of the differences.
        p: corrected.
        family: comparisons that it is corrected for.
    """
    if test.n < FEW:
        return "descriptive", f"{test.n} of the {FEW} seeds that a verdict needs"
    if p > SIGNIFICANT:
        return "not shown", _why_not_shown(test, family)
    first_is_lower = test.mean < 0
    return ("better" if first_is_lower == compare.lower_is_better else "worse"), ""


def _why_not_shown(test: PairedTest, family: int) -> str:
    least = smallest_p(test.n) * family
    if least > SIGNIFICANT:
        return f"{test.n} seeds are too few for {family} comparisons: Holm's p cannot go below {least:.3g}"
    if test.note:
        return test.note
    return f"a t-test would find a true difference of {test.detectable:.3g} 4 times of 5"


def limit_finding(
    compare: CompareSpec,
    outcome: Outcome,
    pair: tuple[str, str],
    values: PairedValues,
    test: PairedTest,
    interval: float,
    budgets: Mapping[str, float],
) -> tuple[Outcome, str]:
    """Return a significant outcome, or what else it has to be called, and why.

    Args:
        compare: what was declared.
        outcome: better or worse.
        pair: names of both variants.
        values: of both variants.
        test: of the differences.
        interval: between two evaluations, as ``evaluation_interval`` returns it.
        budgets: first over second.
    """
    unbounded = _why_unbounded(pair, values, first_is_better=outcome == "better")
    if unbounded:
        return "not shown", unbounded
    if abs(test.mean) < interval:
        return TOO_FINE, f"{abs(test.mean):.4g} of {interval:.4g}; evaluate more often"
    inequality = _undeclared_inequality(compare, budgets)
    if inequality:
        return "unequal budgets", f"{inequality}; not declared in compare.unequal"
    return outcome, ""


def _why_unbounded(pair: tuple[str, str], values: PairedValues, *, first_is_better: bool) -> str:
    """Return why the better variant's mean may be anything; empty if it is known.

    The value of a run that did not meet the target is a lower bound. It understates a difference where the
    worse variant has it, and nothing bounds the difference where the better one does and the worse one did
    meet the target.
    """
    better, worse = (0, 1) if first_is_better else (1, 0)
    seeds = 0
    for both in values.values():
        seeds += both[better].censored_at is not None and both[worse].censored_at is None
    if not seeds:
        return ""
    counted = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return f"{pair[better]} did not meet the target in {counted} in which {pair[worse]} did"


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
    return budgets_text(unequal) if unequal else ""


def budgets_text(budgets: Mapping[str, float]) -> str:
    """Return every budget of the first variant over that of the second, in words."""
    texts = (f"{name.replace('_', ' ')} {ratio_text(ratio)}" for name, ratio in budgets.items())
    return ", ".join(texts) or "unknown"


def ratio_text(ratio: float) -> str:
    """Return ``×1.02``, or words if only one of the two has spent anything."""
    return f"×{ratio:.3g}" if math.isfinite(ratio) and ratio else "of one alone"
