"""Intervals, tests and corrections against scipy, statsmodels and simulations."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from kava_core.experiment.statistics import (
    bonferroni_correction,
    bootstrap_interval,
    detectable_difference,
    holm_correction,
    paired_test,
    sign_flip_p,
    smallest_p,
)

RANDOM = np.random.default_rng(0)
SEEDS = {n: RANDOM.normal(0.3, 1.0, n) for n in (2, 3, 5, 12)}


@pytest.mark.parametrize("n", SEEDS)
def test_a_paired_comparison_is_scipys(n: int) -> None:
    values = SEEDS[n]
    found, test = paired_test(values.tolist()), stats.ttest_1samp(values, 0)
    interval = test.confidence_interval(0.95)
    assert found.t_p == pytest.approx(test.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9)
    assert found.effect == pytest.approx(values.mean() / values.std(ddof=1))
    assert bool(found.note) == (n < 8)


@pytest.mark.parametrize("n", [*SEEDS, 8])
def test_the_sign_flip_test_is_a_count_of_all_changes_of_sign(n: int) -> None:
    """Whole numbers with ties, zeros among them, so that every sum is exact."""
    values = np.random.default_rng(n).integers(-3, 6, n)
    signs = itertools.product((-1, 1), repeat=n)
    count = sum(abs(int(np.dot(sign, values))) >= abs(int(values.sum())) for sign in signs)
    assert sign_flip_p(values) == count / 2**n
    assert sign_flip_p(values * 0.1) == count / 2**n
    assert sign_flip_p(-values) == count / 2**n


@pytest.mark.parametrize("n", [5, 12])
def test_the_sign_flip_test_is_scipys(n: int) -> None:
    test = stats.permutation_test((SEEDS[n],), np.mean, permutation_type="samples", n_resamples=np.inf)
    assert paired_test(SEEDS[n].tolist()).p == pytest.approx(test.pvalue, rel=1e-12)


def test_beyond_twenty_seeds_changes_are_drawn() -> None:
    """Against the exact share, from the distribution of a sum of signs."""
    values = [1.0] * 17 + [-1.0] * 7
    exact = 2 * stats.binom.cdf(7, 24, 0.5)
    assert sign_flip_p(values) == pytest.approx(exact, abs=5 * math.sqrt(exact / 2e5))
    assert sign_flip_p([1.0] * 21) <= 5e-5
    assert sign_flip_p([1.0] * 30) >= smallest_p(30) > 0


@pytest.mark.parametrize("n", [5, 8, 16])
def test_the_smallest_p_is_reached_where_all_seeds_agree(n: int) -> None:
    assert sign_flip_p(np.arange(1, n + 1)) == smallest_p(n) == 2 / 2**n


@pytest.mark.parametrize(("values", "p", "words"), [
    ([0.25], math.nan, "one seed"),
    ([0.0] * 5, 1.0, "no difference in any seed"),
    ([0.5] * 5, 2 / 2**5, "the same difference"),
])  # fmt: skip
def test_what_cannot_be_tested_is_said(values: list[float], p: float, words: str) -> None:
    found = paired_test(values)
    assert found.p == pytest.approx(p, nan_ok=True)
    assert words in found.note


@pytest.mark.parametrize("values", [[], [0.1, math.nan], [math.inf]])
def test_a_missing_number_is_an_error_and_not_0(values: list[float]) -> None:
    with pytest.raises(ValueError, match="finite"):
        paired_test(values)


@pytest.mark.parametrize("n", [3, 5, 10])
def test_what_is_detectable_is_detected_in_four_cases_of_five(n: int) -> None:
    """By simulation; statsmodels agrees."""
    power = pytest.importorskip("statsmodels.stats.power")
    expected = power.TTestPower().solve_power(effect_size=None, nobs=n, alpha=0.05, power=0.8)
    shift = detectable_difference(2.0, n)
    assert shift == pytest.approx(2.0 * expected, rel=1e-3)
    drawn = np.random.default_rng(1).normal(shift, 2.0, (20_000, n))
    assert np.mean(stats.ttest_1samp(drawn, 0, axis=1).pvalue < 0.05) == pytest.approx(0.8, abs=0.015)


@pytest.mark.parametrize("p", [[0.04, 0.01, 0.03], [0.5, 0.9, 0.6, 0.001], [0.2], [0.01] * 4])
def test_corrections_are_statsmodels(p: list[float]) -> None:
    multiple = pytest.importorskip("statsmodels.stats.multitest")
    assert holm_correction(p) == pytest.approx(multiple.multipletests(p, method="holm")[1])
    assert bonferroni_correction(p) == pytest.approx(multiple.multipletests(p, method="bonferroni")[1])


@pytest.mark.parametrize("draws", [250, pytest.param(2000, marks=pytest.mark.release)])
def test_holm_keeps_the_rate_of_false_finds_in_a_family(draws: int) -> None:
    """Four comparisons with the same control, eight seeds, no true difference: at most 5 % of families."""
    random, found = np.random.default_rng(2), 0
    for _ in range(draws):
        control = random.normal(size=8)
        p = [sign_flip_p(random.normal(size=8) - control) for _ in range(4)]
        found += min(holm_correction(p)) < 0.05
    assert found / draws <= 0.05 + 1.645 * math.sqrt(0.05 * 0.95 / draws)


def test_what_was_not_tested_counts_in_the_family() -> None:
    assert holm_correction([0.01, math.nan]) == pytest.approx([0.02, math.nan], nan_ok=True)
    assert bonferroni_correction([0.01, math.nan]) == pytest.approx([0.02, math.nan], nan_ok=True)


def test_the_bootstrap_draws_seeds_and_then_examples() -> None:
    """Against a loop, by its spread; examples alone would give a far narrower interval."""
    random = np.random.default_rng(3)
    rows = [random.choice([-1.0, 0.0, 1.0], 40, p=[0.1, 0.9 - p, p]) for p in (0.1, 0.5, 0.3, 0.8)]
    low, high = bootstrap_interval(rows, draws=20_000)
    loop = []
    for _ in range(4000):
        picked = [rows[i] for i in random.integers(4, size=4)]
        loop.append(np.mean([random.choice(row, len(row)).mean() for row in picked]))
    assert (low, high) == pytest.approx(np.quantile(loop, [0.025, 0.975]), abs=0.02)
    alone = bootstrap_interval([np.concatenate(rows)], draws=20_000)
    assert high - low > 2 * (alone[1] - alone[0])
    assert bootstrap_interval([[0.5], [0.5]]) == (0.5, 0.5)
    assert bootstrap_interval(rows) == bootstrap_interval(rows)
    with pytest.raises(ValueError, match="at least one example"):
        bootstrap_interval([[0.1], []])
