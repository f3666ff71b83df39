"""The definitions, on numbers that can be checked by hand."""

import json
import math

import numpy as np
import pytest

from paretune.evaluation import metrics
from paretune.seeds import generator
from paretune.types import Estimate

W = np.array([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]])
OPTIMUM = np.stack([np.sqrt(W[:, 0]), np.sqrt(W[:, 1])], axis=1)


def test_attainment_is_a_ratio_of_gains():
    got = metrics.attainment(np.array([3.0, 2.0, 1.0, 0.5]), np.full(4, 1.0), np.full(4, 3.0))
    assert got.tolist() == [1.0, 0.5, 0.0, -0.25]


def test_attainment_without_a_possible_gain_is_unknown_and_counted():
    got = metrics.attainment(np.array([1.5, 1.5, 1.5]), np.ones(3), np.array([2.0, 1.0009, 1.0]))
    assert got[0] == 0.5
    assert np.isnan(got[1:]).all()
    shown = metrics.summary(got, worst=np.min)
    assert shown == {"mean": 0.5, "worst": 0.5, "per_preference": [0.5, None, None], "undefined": 2}
    assert metrics.summary(np.full(2, np.nan), worst=np.min)["mean"] is None


def test_regret_and_utility():
    assert metrics.utility(np.array([[1.0, 3.0]]), np.array([[0.25, 0.75]])).tolist() == [2.5]
    assert metrics.regret(np.array([1.0]), np.array([3.0])).tolist() == [2.0]


def test_utility_losses_let_any_policy_serve_any_preference():
    best = metrics.utility(OPTIMUM, W)
    assert metrics.utility_losses(OPTIMUM, W, best) == (0.0, 0.0)
    backwards = OPTIMUM[::-1]
    assert metrics.utility_losses(backwards, W, best) == (0.0, 0.0), "coverage, not control"
    assert metrics.regret(metrics.utility(backwards, W), best).max() == 1.0
    only_first = np.tile(OPTIMUM[0], (5, 1))
    expected, maximum = metrics.utility_losses(only_first, W, best)
    assert maximum == 1.0
    assert expected == pytest.approx((best - W[:, 0]).mean())


def test_controllability_ends():
    assert metrics.controllability(OPTIMUM, OPTIMUM) == 1.0
    assert metrics.controllability(OPTIMUM - np.array([5.0, 0.3]), OPTIMUM) == pytest.approx(1.0), "the level does not count"
    assert metrics.controllability(np.tile([0.3, 0.9], (5, 1)), OPTIMUM) == pytest.approx(0.0)
    reversed_path = 2 * OPTIMUM.mean(0) - OPTIMUM
    assert metrics.controllability(reversed_path, OPTIMUM) == pytest.approx(-1.0)
    assert metrics.controllability(OPTIMUM[::-1], OPTIMUM) < 0
    half = OPTIMUM.mean(0) + 0.5 * (OPTIMUM - OPTIMUM.mean(0))
    assert metrics.controllability(half, OPTIMUM) == pytest.approx(0.5)


def test_controllability_is_fair_to_scales_and_order():
    rng = generator(0, "test controllability")
    path = OPTIMUM + rng.normal(0, 0.1, OPTIMUM.shape)
    got = metrics.controllability(path, OPTIMUM)
    assert metrics.controllability(path * [100, 1], OPTIMUM * [100, 1]) == pytest.approx(got)
    assert metrics.controllability(path[:, ::-1], OPTIMUM[:, ::-1]) == pytest.approx(got)
    order = rng.permutation(5)
    assert metrics.controllability(path[order], OPTIMUM[order]) == pytest.approx(got)


def test_controllability_looks_at_all_pairs_of_steps():
    """The second reading: all pairs of steps, one norm for each objective, then their root mean square."""
    path = OPTIMUM + generator(0, "test pairs of steps").normal(0, 0.1, OPTIMUM.shape)
    steps = lambda x: (x[:, None] - x[None]).reshape(-1, 2)  # noqa: E731
    off = ((steps(path) - steps(OPTIMUM)) ** 2).mean(0) / (steps(OPTIMUM) ** 2).mean(0)
    assert metrics.controllability(path, OPTIMUM) == pytest.approx(1 - math.sqrt(off.mean()))


def test_controllability_needs_an_optimum_that_moves():
    still = OPTIMUM * [1, 0]
    assert metrics.controllability(still + generator(0, "noise").normal(0, 1, still.shape) * [0, 1], still) == 1.0
    assert math.isnan(metrics.controllability(OPTIMUM, OPTIMUM * 0))
    assert math.isnan(metrics.controllability(OPTIMUM * np.nan, OPTIMUM))


def test_plain_is_strict_json():
    value = {
        "a": np.array([[1.0, np.nan]]),
        1: (np.int64(3), np.float32(0.5), np.bool_(True), np.inf),
        "e": Estimate(value=1.0, low=math.nan, high=math.nan, n=2),
        "nothing": [],
        "text": "x",
        "none": None,
    }
    got = metrics.plain(value)
    assert json.loads(json.dumps(got, allow_nan=False)) == {
        "a": [[1.0, None]],
        "1": [3, 0.5, True, None],
        "e": {"value": 1.0, "low": None, "high": None, "n": 2},
        "nothing": [],
        "text": "x",
        "none": None,
    }
