"""Intervals that mean what they say: coverage measured, strata kept apart, and no interval where there are too few units."""

import math
import tracemalloc

import numpy as np
import pytest
from scipy.stats import binomtest, bootstrap, norm, t, trim_mean

from paretune.evaluation import stats
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


@pytest.mark.parametrize(("statistic", "share"), [("mean", 0.90), ("iqm", 0.94)])
def test_what_an_interval_of_ten_units_covers(statistic, share):
    """As the report says of it: about 9 times in 10 for a mean (400 trials: 2 standard errors are .03)."""
    values = generator(0, "test ten units").normal(size=(400, 10))
    found = [stats.estimate(row, seed=0, units_N=range(10), statistic=statistic, resamples=1000) for row in values]
    assert np.mean([one.low <= 0 <= one.high for one in found]) == pytest.approx(share, abs=0.03)


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


def test_iqm_is_the_trimmed_mean_of_scipy():
    for n in (1, 3, 4, 10, 11, 30):
        values = generator(n, "test iqm").normal(size=(5, n))
        assert stats.iqm(values) == pytest.approx(trim_mean(values, 0.25, axis=1))


# Samples of prompts: those of one prompt are alike


def responses(prompts, each, alike, trials):
    """(S, trials) normal values of mean 0 and variance 1, of which `alike` is shared by the samples of a prompt; and the prompts (S,)."""
    rng, prompt_S = generator(0, "test prompts", prompts, each), np.arange(prompts * each) % prompts
    shared_PX = rng.normal(size=(prompts, trials))
    return np.sqrt(alike) * shared_PX[prompt_S] + np.sqrt(1 - alike) * rng.normal(size=(len(prompt_S), trials)), prompt_S


@pytest.mark.parametrize(("prompts", "each", "alike"), [(3, 20, 0.3), (6, 11, 0.3), (6, 11, 0.0), (64, 1, 0.0), (64, 2, 0.0), (20, 5, 1.0)])
def test_intervals_over_prompts_cover_95_percent(prompts, each, alike):
    """4,000 trials: the share is within .016 of .95, 4.6 standard errors, false alarm below 1e-5. Rows taken for units cover 66 % of the
    second case."""
    values_SX, prompt_S = responses(prompts, each, alike, 4000)
    found = stats.over_prompts(values_SX, prompt_S)
    assert np.mean(np.abs(found.value) <= found.half) == pytest.approx(0.95, abs=0.016)
    assert found.value == pytest.approx(values_SX.mean(0))
    if alike == 0.3:
        pooled_X = 1.96 * values_SX.std(0) / np.sqrt(len(values_SX))
        assert np.mean(np.abs(found.value) <= pooled_X) < 0.7


def test_equally_many_samples_give_the_t_interval_of_prompt_means():
    values_SX, prompt_S = responses(6, 11, 0.3, 5)
    means_PX = values_SX.reshape(11, 6, 5).mean(0)
    half_X = t.ppf(0.975, 5) * means_PX.std(0, ddof=1) / np.sqrt(6)
    assert stats.over_prompts(values_SX, prompt_S).half == pytest.approx(half_X)
    assert stats.over_prompts(values_SX[:, 2], prompt_S).half == pytest.approx(half_X[2])


def test_unscored_samples_are_left_out_of_each_mean():
    values_SX, prompt_S = responses(6, 11, 0.3, 3)
    values_SX[:5, 1], values_SX[prompt_S == 2, 2] = math.nan, math.nan
    found = stats.over_prompts(values_SX, prompt_S)
    assert found.n.tolist() == [66, 61, 55]
    for x in range(3):
        known_S = np.isfinite(values_SX[:, x])
        alone = stats.over_prompts(values_SX[known_S, x], prompt_S[known_S])
        assert (found.value[x], found.half[x]) == (pytest.approx(alone.value), pytest.approx(alone.half))


@pytest.mark.parametrize("prompt_S", [[0] * 40, [0, 1] * 20, np.arange(9)])
def test_few_prompts_or_samples_have_no_interval(prompt_S):
    found = stats.over_prompts(np.arange(float(len(prompt_S))), prompt_S)
    assert np.isfinite(found.value)
    assert np.isnan(found.half)
    assert np.isnan(stats.over_prompts(np.full(9, np.nan), np.arange(9)).value)


# Units with a name: one value in every stratum, drawn together


def shared(units=12, strata=3, spread=0.1):
    """(U, D) values whose strata nearly agree, and the names of units and strata of the raveled table."""
    rng = generator(0, "test units", units, strata)
    table_UD = rng.normal(size=(units, 1)) + spread * rng.normal(size=(units, strata)) + np.arange(strata)
    return table_UD, [f"seed {u}" for u in range(units) for _ in range(strata)], [f"dial {d}" for _ in range(units) for d in range(strata)]


@pytest.mark.parametrize("statistic", ["mean", "iqm"])
def test_units_are_drawn_as_scipy_draws_paired_samples(statistic):
    table_UD, units, dials = shared()
    got = stats.estimate(table_UD.ravel(), seed=0, strata_N=dials, units_N=units, statistic=statistic, resamples=20_000)

    def reduce(*columns, axis=-1):
        together = np.concatenate(columns, axis=-1)
        return together.mean(-1) if statistic == "mean" else trim_mean(together, 0.25, axis=-1)

    ci = bootstrap(
        tuple(table_UD.T), reduce, paired=True, vectorized=True, method="percentile", n_resamples=20_000, rng=generator(1, "oracle")
    ).confidence_interval
    assert (got.value, got.n) == (pytest.approx(reduce(*table_UD.T)), 12)
    assert (got.low, got.high) == (pytest.approx(ci.low, abs=0.03), pytest.approx(ci.high, abs=0.03))
    assert got.high - got.low > 0.7, "the tolerance is small against the width"


def test_strata_that_share_their_units_are_no_new_evidence():
    """Nine strata that agree: as independent they would make the interval three times narrower than one of them has it."""
    table_UD, units, dials = shared(units=20, strata=9, spread=0.01)
    level = table_UD - np.arange(9)
    together = stats.estimate(level.ravel(), seed=0, strata_N=dials, units_N=units)
    apart = stats.estimate(level.ravel(), seed=0, strata_N=dials)
    alone = stats.estimate(level[:, 0], seed=0)
    assert together.high - together.low == pytest.approx(alone.high - alone.low, rel=0.1)
    assert apart.high - apart.low == pytest.approx((alone.high - alone.low) / 3, rel=0.2)


def test_the_order_of_values_and_names_says_nothing():
    table_UD, units, dials = shared()
    order = generator(0, "test order").permutation(table_UD.size)
    straight = stats.estimate(table_UD.ravel(), seed=0, strata_N=dials, units_N=units, statistic="iqm")
    turned = stats.estimate(
        table_UD.ravel()[order], seed=0, strata_N=[dials[k] for k in order], units_N=[units[k] for k in order], statistic="iqm"
    )
    assert (straight.low, straight.high, straight.n) == (turned.low, turned.high, turned.n)
    assert straight.value == pytest.approx(turned.value)


def test_nine_units_are_too_few_however_many_strata_they_have():
    table_UD, units, dials = shared(units=9, strata=5)
    got = stats.estimate(table_UD.ravel(), seed=0, strata_N=dials, units_N=units)
    assert (got.value, got.n) == (pytest.approx(table_UD.mean()), 9)
    assert math.isnan(got.low)
    assert math.isnan(got.high)
    profile = stats.performance_profile(table_UD.ravel(), [0.0, 1.0], seed=0, strata_N=dials, units_N=units)
    assert profile.n == 9
    assert np.isfinite(profile.share_T).all()
    assert np.isnan([*profile.low_T, *profile.high_T]).all()
    wins = stats.share_of_wins(table_UD.ravel(), -table_UD.ravel(), strata_N=dials, units_N=units)
    assert (wins.n, math.isnan(wins.low)) == (9, True)


def test_a_unit_without_a_value_in_some_stratum_is_refused():
    table_UD, units, dials = shared()
    with pytest.raises(AssertionError, match="one value in every stratum"):
        stats.estimate(table_UD.ravel()[1:], seed=0, strata_N=dials[1:], units_N=units[1:])
    with pytest.raises(AssertionError, match="one value in every stratum"):
        stats.estimate([1.0, 2.0], seed=0, units_N=["a", "a"])


def test_a_difference_turned_round_has_the_interval_turned_round():
    table_UD, units, dials = shared()
    other = table_UD.ravel() ** 2
    got = stats.paired_difference(table_UD.ravel(), other, seed=3, strata_N=dials, units_N=units)
    back = stats.paired_difference(other, table_UD.ravel(), seed=3, strata_N=dials, units_N=units)
    assert (back.value, back.low, back.high) == pytest.approx((-got.value, -got.high, -got.low))
    assert got.low < got.value < got.high


def test_nan_among_the_units_is_unknown():
    values = [1.0] * 11 + [math.nan]
    for got in (stats.estimate(values, seed=0, units_N=range(12)), stats.share_of_wins(values, [0.0] * 12)):
        assert np.isnan([got.value, got.low, got.high]).all()
    profile = stats.performance_profile(values, [0.5], seed=0)
    assert np.isnan([profile.share_T, profile.low_T, profile.high_T]).all()
    assert np.isnan(stats.performance_profile([], [0.5], seed=0).share_T).all()
    assert math.isnan(stats.estimate([], seed=0, units_N=[]).value)
    assert math.isnan(stats.share_of_wins([], []).value)


# Improvement


@pytest.mark.parametrize(("wins", "n"), [(0, 10), (3, 10), (10, 10), (7, 25)])
def test_share_of_wins_has_the_exact_binomial_interval(wins, n):
    a, b = np.where(np.arange(n) < wins, 1.0, -1.0), np.zeros(n)
    got, want = stats.share_of_wins(a, b), binomtest(wins, n).proportion_ci(0.95, "exact")
    assert (got.value, got.n) == (wins / n, n)
    assert (got.low, got.high) == pytest.approx((want.low, want.high))
    back = stats.share_of_wins(b, a)
    assert (back.low, back.high) == pytest.approx((1 - got.high, 1 - got.low))


def test_wins_on_shared_units_are_not_hidden_by_how_units_differ():
    """Always ahead by a little on tasks that differ by much: certain on the same task."""
    b = generator(0, "test wins").normal(0, 10, 40)
    assert stats.share_of_wins(b + 0.1, b).value == 1.0


def test_ties_and_strata_make_wins_fractional():
    assert stats.share_of_wins([1.0] * 10, [1.0] * 10).value == 0.5
    units, strata = list(range(10)) * 2, ["a"] * 10 + ["b"] * 10
    got = stats.share_of_wins([1.0] * 10 + [-1.0] * 10, [0.0] * 20, strata_N=strata, units_N=units)
    assert (got.value, got.n) == (0.5, 10)
    want = binomtest(5, 10).proportion_ci(0.95, "exact")
    assert (got.low, got.high) == pytest.approx((want.low, want.high))


# Profiles


def test_a_profile_is_the_share_above_and_its_area_is_the_mean():
    values = generator(0, "test profile").random(30)
    taus = np.linspace(0, 1, 2001)
    profile = stats.performance_profile(values, taus, seed=0)
    assert (np.diff(profile.share_T) <= 0).all()
    assert profile.share_T[taus <= values.min() - 1e-3].min() == 1.0
    assert profile.share_T[-1] == 0.0
    assert profile.share_T[:-1].sum() / 2000 == pytest.approx(values.mean(), abs=1e-3)
    assert (profile.low_T <= profile.share_T).all()
    assert (profile.share_T <= profile.high_T).all()
    assert stats.performance_profile([0.5] * 10, [0.5], seed=0).share_T == [0.0], "above is strict"


def test_the_band_of_a_profile_is_the_interval_of_a_share():
    values = generator(0, "test band").random(200)
    profile = stats.performance_profile(values, [0.3, 0.5], seed=0, resamples=20_000)
    for share, low, high in zip(profile.share_T, profile.low_T, profile.high_T, strict=True):
        half = norm.ppf(0.975) * np.sqrt(share * (1 - share) / 200)
        assert (low, high) == (pytest.approx(share - half, abs=0.01), pytest.approx(share + half, abs=0.01))
    above = (values > 0.5).astype(float)
    alone = stats.estimate(above, seed=0, units_N=[f"{k:03}" for k in range(200)], resamples=20_000)
    assert (profile.low_T[1], profile.high_T[1]) == pytest.approx((alone.low, alone.high))


def test_strata_of_a_profile_are_drawn_with_their_unit():
    table_UD, units, dials = shared(units=20, strata=9, spread=0.0)
    level = table_UD - np.arange(9)
    together = stats.performance_profile(level.ravel(), [0.0], seed=0, strata_N=dials, units_N=units)
    alone = stats.performance_profile(level[:, 0], [0.0], seed=0, units_N=units[::9])
    assert (together.low_T, together.high_T) == (pytest.approx(alone.low_T), pytest.approx(alone.high_T))
    assert together.n == 20


def test_a_profile_of_a_thousand_units_needs_memory_for_their_number_and_not_for_its_square():
    values = generator(0, "test many units").random(1000)
    tracemalloc.start()
    profile = stats.performance_profile(values, [0.2, 0.5], seed=0, resamples=200)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40e6  # 200 x 1000 x 1000 comparisons would take 200 MB
    by_name = values[sorted(range(1000), key=str)]
    shares = (by_name[stats._draws(1000, 0, 200)] > 0.5).mean(1)
    assert [profile.low_T[1], profile.high_T[1]] == pytest.approx(np.quantile(shares, [0.025, 0.975]).tolist(), abs=1e-12)
