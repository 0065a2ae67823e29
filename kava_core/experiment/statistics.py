"""Differences between variants over shared seeds: intervals, tests, corrections. Needs the extra ``stats``.

A seed is the unit: what examples of one seed share is no evidence (tests on them find 18 % differences that
are not there, at a nominal 5 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW = 5
"""Fewer shared seeds than this describe, and decide nothing."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class Paired:
    """One comparison over shared seeds. What cannot be known is NaN, and ``note`` says why."""

    n: int
    """Shared seeds."""
    mean: float
    """Mean difference."""
    low: float
    """95 % t-interval of the mean difference."""
    high: float
    p: float
    """Two-sided paired t-test of no difference."""
    effect: float
    """Cohen's d of the differences: their mean over their standard deviation."""
    detectable: float
    """The smallest true difference that such a test finds with 80 % probability, given this spread."""
    note: str = ""


def paired(differences: Sequence[float], *, level: float = 0.95) -> Paired:
    """Compare two variants by their differences on every shared seed.

    Raises:
        ValueError: no difference, or one that is not finite: a missing seed or metric is not 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences must be finite numbers, at least one, not {list(differences)}")
    mean, nan = float(values.mean()), math.nan
    if len(values) < 2:
        return Paired(1, mean, nan, nan, nan, nan, nan, "one seed: no interval, no test")
    spread = float(values.std(ddof=1))
    if spread <= 1e-12 * max(1.0, abs(mean)):
        p, said = (
            (1.0, "no difference in any seed") if mean == 0 else (nan, "the same difference in every seed")
        )
        return Paired(len(values), mean, mean, mean, p, nan, nan, f"{said}: a t-test has no spread to go by")
    note = f"{len(values)} seeds: descriptive" if len(values) < FEW else ""
    return _tested(len(values), mean, spread, level, note)


def _tested(n: int, mean: float, spread: float, level: float, note: str) -> Paired:
    from scipy import stats

    error = spread / math.sqrt(n)
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return Paired(n, mean, mean - half, mean + half, p, mean / spread, detectable(spread, n), note)


def detectable(spread: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The true mean difference that a two-sided paired t-test finds with probability ``power``.

    ``spread``: standard deviation of the differences (noncentral t; Cohen 1988). NaN for two seeds, whose
    noncentral t no library computes far out.
    """
    if n < 3:
        return math.nan
    from scipy import optimize, stats

    critical = stats.t.ppf(1 - alpha / 2, n - 1)

    def missing(shift: float) -> float:
        found = stats.nct.sf(critical, n - 1, shift) + stats.nct.cdf(-critical, n - 1, shift)
        return float(found) - power

    highest = 1.0
    while missing(highest) < 0:
        highest *= 2
    return float(optimize.brentq(missing, 0.0, highest)) * spread / math.sqrt(n)


def holm(p: Sequence[float]) -> list[float]:
    """Holm's corrected p-values (Scandinavian Journal of Statistics 6, 1979), in the order given.

    NaN stays NaN, and counts as a member of the family.
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)  # NaN last
    factors = len(values) - np.arange(len(values))
    raised = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    corrected = np.empty_like(values)
    corrected[order] = raised
    return [float(value) for value in corrected]


def bonferroni(p: Sequence[float]) -> list[float]:
    """Every p-value times their number, at most 1."""
    return [min(1.0, len(p) * value) if value == value else value for value in p]


def bootstrap(
    differences: Sequence[Sequence[float]], *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean difference: seeds are drawn anew, then examples within each.

    Args:
        differences: for every seed the differences of all its examples.
        draws: resamples.
        level: of the interval.
        seed: of the resamples.

    Beside the t-interval, not instead: with few seeds it is too narrow (75 % at three seeds).

    Raises:
        ValueError: a seed without examples, or no seed.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in differences]
    if not rows or not all(len(row) for row in rows):
        raise ValueError("every seed needs at least one example")
    random = np.random.default_rng(seed)
    chosen = random.integers(len(rows), size=(draws, len(rows)))
    means = np.empty(chosen.shape)
    for place, row in enumerate(rows):
        where = np.nonzero(chosen == place)
        means[where] = _means_of_resamples(row, len(where[0]), random)
    low, high = np.quantile(means.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means_of_resamples(row: Numbers, count: int, random: np.random.Generator) -> Numbers:
    """Exact, from how often each distinct difference is drawn: there are few of them, such as −1, 0, 1."""
    values, numbers = np.unique(row, return_counts=True)
    drawn = random.multinomial(len(row), numbers / len(row), size=count)
    found: Numbers = drawn @ values / len(row)
    return found
