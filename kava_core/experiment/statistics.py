"""Test differences between variants over shared seeds: intervals, tests, corrections.

The extra ``stats`` is needed.

A seed is the unit: what examples of one seed share is no evidence (tests on them find 18 % differences that
are not there, at a nominal 5 %).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

FEW = 8
"""Fewer shared seeds than this describe, and decide nothing: an exact test of 5 cannot go below 0.0625."""

MOST_ENUMERATED = 20
"""Seeds up to which all changes of sign are tried, a million at most; beyond, some are drawn."""

DRAWN_FLIPS = 199_999
"""Changes of sign that are drawn where there are too many to try all."""

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class PairedTest:
    """One comparison over shared seeds. What cannot be known is NaN, and ``note`` says why."""

    n: int
    """Shared seeds."""
    mean: float
    """Mean difference."""
    low: float
    """95 % t-interval of the mean difference."""
    high: float
    p: float
    """Two-sided sign-flip test of no difference, exact up to 20 seeds. It decides."""
    t_p: float
    """Two-sided paired t-test of no difference, which is shown beside it."""
    effect: float
    """Cohen's d of the differences: their mean over their standard deviation."""
    detectable: float
    """The smallest true difference that such a test finds with 80 % probability, given this spread."""
    note: str = ""


def paired_test(differences: Sequence[float], *, level: float = 0.95) -> PairedTest:
    """Compare two variants by their differences on every shared seed.

    The exact sign-flip test decides; the paired t-test and its interval stand beside it.

    Args:
        differences: first minus second, one for every seed.
        level: of the interval.

    Raises:
        ValueError: no difference, or one that is not finite: a missing seed or metric is not 0.
    """
    values = np.asarray(differences, dtype=np.float64)
    if not len(values) or not np.isfinite(values).all():
        raise ValueError(f"differences must be finite numbers, at least one, not {list(differences)}")
    mean = float(values.mean())
    if len(values) < 2:
        return _untested(1, mean, note="one seed: no interval, no test")
    p = sign_flip_p(values)
    spread = float(values.std(ddof=1))
    if spread <= 1e-12 * max(1.0, abs(mean)):
        return _without_spread(len(values), mean, p)
    note = f"{len(values)} seeds: descriptive" if len(values) < FEW else ""
    return _with_t_test(len(values), mean, spread, p, level, note)


def sign_flip_p(differences: Sequence[float] | Numbers, *, seed: int = 0) -> float:
    """Return the two-sided p-value of the sign-flip test, whose statistic is the mean difference.

    If variants differ by nothing, a difference is as likely as its negative, whatever its distribution. The
    p-value is the share of all 2^n changes of sign whose mean is at least as far from 0 as the one seen. For
    more than 20 seeds 200,000 changes are drawn, the one seen among them.

    Args:
        differences: finite, one for every seed.
        seed: of the draws beyond 20 seeds.

    Source: Fisher, "The Design of Experiments" (1935), chapter 3; Phipson and Smyth, "Permutation p-values
    should never be zero" (2010), for drawn changes.
    """
    values = np.asarray(differences, dtype=np.float64)
    if len(values) > MOST_ENUMERATED:
        return _drawn_sign_flip_p(values, seed)
    sums = values[:1]  # changing every sign changes no distance from 0, so the first one may stay
    for value in values[1:]:
        sums = np.concatenate([sums + value, sums - value])
    # Sums that are equal in truth differ in their last digits, by the order in which they were added.
    rounding = 1e-12 * float(np.abs(values).sum())
    return float(np.mean(np.abs(sums) >= abs(values.sum()) - rounding))


def _drawn_sign_flip_p(values: Numbers, seed: int) -> float:
    from scipy import stats

    random = np.random.default_rng(seed)
    test = stats.permutation_test(
        (values,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=DRAWN_FLIPS,
        batch=DRAWN_FLIPS // 10,
        rng=random,
    )
    return float(test.pvalue)


def smallest_p(n: int) -> float:
    """Return the smallest p-value that the sign-flip test of ``n`` seeds can give."""
    return 2.0 / 2.0**n if n <= MOST_ENUMERATED else 2.0 / (DRAWN_FLIPS + 1)


def _without_spread(n: int, mean: float, p: float) -> PairedTest:
    finding = "the same difference in every seed" if mean else "no difference in any seed"
    note = f"{finding}: a t-test has no spread to go by"
    return _untested(n, mean, low=mean, high=mean, p=p, note=note)


def _untested(
    n: int, mean: float, *, low: float = math.nan, high: float = math.nan, p: float = math.nan, note: str
) -> PairedTest:
    return PairedTest(n, mean, low, high, p, t_p=math.nan, effect=math.nan, detectable=math.nan, note=note)


def _with_t_test(n: int, mean: float, spread: float, p: float, level: float, note: str) -> PairedTest:
    from scipy import stats

    standard_error = spread / math.sqrt(n)
    half_width = float(stats.t.ppf((1 + level) / 2, n - 1)) * standard_error
    return PairedTest(
        n=n,
        mean=mean,
        low=mean - half_width,
        high=mean + half_width,
        p=p,
        t_p=float(2 * stats.t.sf(abs(mean) / standard_error, n - 1)),
        effect=mean / spread,
        detectable=detectable_difference(spread, n),
        note=note,
    )


def detectable_difference(spread: float, n: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the true mean difference that a two-sided paired t-test finds with probability ``power``.

    NaN for two seeds, whose noncentral t no library computes far out.

    Args:
        spread: standard deviation of the differences.
        n: seeds.
        alpha: level of the test.
        power: probability of finding the difference.

    Source: Cohen, "Statistical Power Analysis" (1988), by the noncentral t distribution.
    """
    return math.nan if n < 3 else _detectable_shift(n, alpha, power) * spread / math.sqrt(n)


@cache
def _detectable_shift(n: int, alpha: float, power: float) -> float:
    """Return the mean difference in standard errors that is found with probability ``power``."""
    from scipy import optimize, stats

    critical = stats.t.ppf(1 - alpha / 2, n - 1)

    def excess_power(shift: float) -> float:
        above = stats.nct.sf(critical, n - 1, shift)
        below = stats.nct.cdf(-critical, n - 1, shift)
        return float(above + below) - power

    highest_shift = 1.0
    while excess_power(highest_shift) < 0:
        highest_shift *= 2
    return float(optimize.brentq(excess_power, 0.0, highest_shift))


def holm_correction(p: Sequence[float]) -> list[float]:
    """Return Holm's corrected p-values, in the order given. NaN stays NaN, and counts as one of the family.

    Source: Holm, Scandinavian Journal of Statistics 6 (1979).
    """
    values = np.asarray(p, dtype=np.float64)
    order = np.argsort(values)  # NaN last
    factors = len(values) - np.arange(len(values))
    raised = np.minimum(np.maximum.accumulate(values[order] * factors), 1.0)
    corrected = np.empty_like(values)
    corrected[order] = raised
    return [float(value) for value in corrected]


def bonferroni_correction(p: Sequence[float]) -> list[float]:
    """Return every p-value times their number, at most 1. NaN stays NaN."""
    return [value if math.isnan(value) else min(1.0, len(p) * value) for value in p]


def bootstrap_interval(
    differences: Sequence[Sequence[float]], *, draws: int = 10_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Return the percentile interval of the mean difference: seeds are drawn anew, then examples within each.

    It goes beside the t-interval, not instead: with few seeds it is too narrow (75 % at three seeds).

    Args:
        differences: for every seed the differences of all its examples.
        draws: resamples.
        level: of the interval.
        seed: of the resamples.

    Raises:
        ValueError: a seed without examples, or no seed.
    """
    rows = [np.asarray(row, dtype=np.float64) for row in differences]
    if not rows or not all(len(row) for row in rows):
        raise ValueError("every seed needs at least one example")
    random = np.random.default_rng(seed)
    drawn_seeds = random.integers(len(rows), size=(draws, len(rows)))
    means = np.empty(drawn_seeds.shape)
    for index, row in enumerate(rows):
        places = np.nonzero(drawn_seeds == index)
        means[places] = _means_of_resamples(row, len(places[0]), random)
    low, high = np.quantile(means.mean(1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _means_of_resamples(row: Numbers, count: int, random: np.random.Generator) -> Numbers:
    """Return the means of ``count`` resamples of a row.

    They are exact, from how often each distinct difference is drawn: there are few, such as −1, 0, 1.
    """
    values, frequencies = np.unique(row, return_counts=True)
    drawn = random.multinomial(len(row), frequencies / len(row), size=count)
    means: Numbers = drawn @ values / len(row)
    return means
