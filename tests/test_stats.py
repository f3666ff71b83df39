"""Intervals that mean what they say: coverage measured, strata kept apart, and no interval where there are too few units."""

import math

import numpy as np
import pytest
from scipy.stats import norm

from paretune import stats
from paretune.seeds import generator


def covered(n, trials=400):
    """Share of trials where the 95 % interval of a normal mean contains 0, built here without the guard."""
    rng = generator(0, "test coverage", n)
    hits = 0
    for trial in range(trials):
        values = rng.normal(size=n)
        low, high = np.quantile(values[rng.integers(n, size=(500, n))].mean(1), [0.025, 0.975])
        hits += low <= 0 <= high
        del trial
    return hits / trials


def test_why_there_is_no_interval_below_ten():
    """The numbers in the module's docstring: 82 % at n = 5, 90 % at n = 10 (400 trials: 2 standard errors are .04 and .03)."""
    assert covered(5) == pytest.approx(0.82, abs=0.04)
    assert covered(10) == pytest.approx(0.90, abs=0.03)


def test_interval_agrees_with_the_normal_one():
    values = generator(0, "test normal").normal(3, 2, size=400)
    got = stats.estimate(values, seed=1)
    half = norm.ppf(0.975) * values.std() / 20
    assert (got.value, got.n) == (pytest.approx(values.mean()), 400)
    assert (got.low, got.high) == (pytest.approx(values.mean() - half, abs=0.03), pytest.approx(values.mean() + half, abs=0.03))
    assert got == stats.estimate(values, seed=1), "the seed is all the randomness there is"
    assert got.low != stats.estimate(values, seed=2).low


def test_units_are_resampled_within_their_stratum():
    """Strata far apart, nearly no spread within: resampling across would give an interval of about +-0.7."""
    strata = np.repeat(["a", "b"], 10)
    values = np.where(strata == "a", 0.0, 3.0) + generator(0, "test strata").normal(0, 0.01, 20)
    inside, across = stats.estimate(values, seed=0, strata_N=strata), stats.estimate(values, seed=0)
    assert inside.high - inside.low < 0.02
    assert across.high - across.low > 1.0
    assert inside.value == pytest.approx(across.value)


@pytest.mark.parametrize("strata", [None, ["x"] * 9, ["x"] * 10 + ["y"] * 9])
def test_too_few_units_have_a_value_and_no_interval(strata):
    values = np.arange(9.0 if strata is None else len(strata))
    got = stats.estimate(values, seed=0, strata_N=strata)
    assert got.value == values.mean()
    assert got.n == len(values)
    assert math.isnan(got.low)
    assert math.isnan(got.high)


def test_nan_and_nothing_are_unknown():
    for values in ([], [1.0] * 11 + [math.nan]):
        for statistic in ("mean", "iqm", "median"):
            got = stats.estimate(values, seed=0, statistic=statistic)
            assert math.isnan(got.value), statistic
            assert math.isnan(got.low), statistic
    assert math.isnan(stats.probability_of_improvement([1.0] * 12, [math.nan] * 12, seed=0).value)
    assert math.isnan(stats.probability_of_improvement([], [1.0], seed=0).value)


def test_iqm_cuts_a_quarter_at_either_end():
    assert stats.iqm(np.array([-1e9, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e9])) == pytest.approx(3.5)
    assert stats.iqm(np.array([[1.0, 2.0, 30.0], [5.0, 5.0, 5.0]])).tolist() == pytest.approx([11.0, 5.0])
    values = generator(0, "test iqm").normal(size=40)
    got = stats.estimate(values, seed=0, statistic="iqm")
    assert got.low < got.value < got.high
    assert got.value == pytest.approx(np.sort(values)[10:30].mean())


def test_pairs_are_narrower_than_two_samples():
    rng = generator(0, "test pairs")
    shared = rng.normal(0, 10, 50)
    a, b = shared + 1 + rng.normal(0, 0.1, 50), shared
    got = stats.paired_difference(a, b, seed=0)
    assert got.value == pytest.approx(1, abs=0.1)
    assert got.high - got.low < 0.1
    assert stats.estimate(a, seed=0).high - stats.estimate(a, seed=0).low > 2
    flipped = stats.paired_difference(b, a, seed=0)
    assert (flipped.low, flipped.high) == (pytest.approx(-got.high), pytest.approx(-got.low))


def test_probability_of_improvement():
    """Normal draws one deviation apart: Phi(1 / sqrt 2) = .760. A sample against itself: exactly one half."""
    rng = generator(0, "test improvement")
    a, b = rng.normal(1, 1, 300), rng.normal(0, 1, 300)
    got = stats.probability_of_improvement(a, b, seed=0)
    assert got.low < norm.cdf(1 / math.sqrt(2)) < got.high
    assert got.high - got.low < 0.1
    assert stats.probability_of_improvement(a, a, seed=0).value == 0.5
    assert stats.probability_of_improvement([2.0] * 10, [1.0] * 10, seed=0).value == 1.0
    wins = (a[:, None] > b[None]).mean() + 0.5 * (a[:, None] == b[None]).mean()
    assert got.value == pytest.approx(wins)
