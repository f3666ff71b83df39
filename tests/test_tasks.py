"""Preferences for training: where they come from, and that no judged one is among them."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import kstest

from paretune.seeds import generator
from paretune.tasks.preferences import KEEP_OUT, judged_preferences, sample_preferences, spread_preferences


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("n", [1, 8, 64])
def test_spread_preferences_are_preferences_away_from_the_judged_ones(count, n):
    rng = generator(0, "spread", count, n)
    w_NM = np.concatenate([spread_preferences(rng, n, count) for _ in range(20)])
    assert w_NM.shape == (20 * n, count)
    assert (w_NM >= 0).all()
    np.testing.assert_allclose(w_NM.sum(1), 1)
    assert (np.abs(w_NM[:, None] - judged_preferences(count)[None]).max(-1) > KEEP_OUT).all()


@pytest.mark.parametrize("count", [2, 3])
def test_each_row_alone_is_uniform_on_the_simplex(count):
    """A weight of a uniform point has the distribution 1 - (1 - x)^(M - 1); the gap around judged points hardly shows.

    False alarms: one in 1,000 per case (fixed seed).
    """
    rng = generator(1, "spread", count)
    for place in (0, 5):
        first_N = np.array([spread_preferences(rng, 8, count)[place, 0] for _ in range(1500)])
        assert kstest(first_N, lambda x: 1 - (1 - x) ** (count - 1)).pvalue > 1e-3


def test_the_rows_of_one_batch_cover_the_simplex_better_than_independent_ones():
    """The spread of the mean weight over batches shows it: about 1 / n instead of 1 / sqrt(n)."""

    def wobble(draw):
        rng = generator(2, "spread")
        return np.std([draw(rng, 16, 2)[:, 0].mean() for _ in range(300)])

    assert wobble(spread_preferences) < 0.5 * wobble(sample_preferences)
