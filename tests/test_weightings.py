"""Weightings: what the weights of a step are, that they are a pure function of what was seen, and that both learners follow them."""

from __future__ import annotations

import json

import numpy as np
import pytest

from learner_cases import SMALL, TASK, log_of, spec_of, weights, whole_and_cut
from paretune.errors import ConfigError
from paretune.seeds import generator
from paretune.training.advantages import group_covariance
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.weightings.base import Balanced, Fixed, StepContext


def seen(w_NM, covariance_MM=None, step=0, returns_NM=None):
    w_NM = np.asarray(w_NM, dtype=float)
    m = w_NM.shape[1]
    returns_NM = np.zeros_like(w_NM) if returns_NM is None else returns_NM
    covariance_MM = np.eye(m) if covariance_MM is None else covariance_MM
    return StepContext(step, 10, w_NM, returns_NM, covariance_MM, [], np.zeros(m), np.ones(m))


def test_fixed_is_the_preference():
    w_NM = np.array([[0.2, 0.8], [0.5, 0.5]])
    got, state = Fixed().weights({}, seen(w_NM))
    assert np.array_equal(got, w_NM)
    assert state == {}


def test_balanced_multiplies_by_what_is_missing_to_a_typical_gain():
    """Variances 1 and correlation -.8: w'Sw is 1 at a vertex and .1 in the middle, so the middle counts ten times as much."""
    covariance = np.array([[1.0, -0.8], [-0.8, 1.0]])
    rows = [[1.0, 0.0], [0.5, 0.5]]
    balanced = Balanced()
    got, state = balanced.weights(balanced.start(2), seen(rows, covariance))
    np.testing.assert_allclose(got, [[1.0, 0.0], [5.0, 5.0]])
    json.dumps(state)
    half, _ = Balanced(power=0.5).weights(balanced.start(2), seen(rows, covariance))
    np.testing.assert_allclose(half, [[1.0, 0.0], [0.5 * 10**0.5] * 2])


def test_balanced_looks_at_the_first_steps_only():
    balanced = Balanced(window=2)
    state = balanced.start(2)
    for covariance in (np.diag([1.0, 3.0]), np.diag([3.0, 1.0]), np.diag([100.0, 1.0])):
        got, state = balanced.weights(state, seen([[1.0, 0.0]], covariance))
    np.testing.assert_allclose(got, [[1.0, 0.0]])
    assert state["steps"] == 2


def test_covariance_within_groups_is_numpys_where_all_is_scored():
    values = generator(0, "covariance").normal(size=(12, 3))
    by_hand = np.mean([np.cov(values[i : i + 4].T) for i in (0, 4, 8)], axis=0)
    np.testing.assert_allclose(group_covariance(values, group=4), by_hand)
    holed = np.concatenate([values, np.full((4, 3), np.nan)])
    holed[12] = 1.0
    np.testing.assert_allclose(group_covariance(holed, group=4), by_hand)
    assert (group_covariance(np.full((4, 2), np.nan), group=4) == 0).all()


@pytest.mark.parametrize("learner", [PolicyGradient(**SMALL), ExactGradient(rank=2, alpha=4, steps=4, checkpoint_every=2, log_every=2)])
def test_killed_and_resumed_the_weighting_goes_on(tmp_path, learner):
    """A window longer than the first half of the training: without its state a resumed training would weigh differently."""
    spec = spec_of(learner, None, weighting={"name": "balanced", "window": 3})
    whole_and_cut(learner, spec, TASK, tmp_path, at=4)  # after the checkpoint at 2
    learner.train(spec_of(learner, None), TASK, tmp_path / "plain")
    assert len(log_of(tmp_path / "cut")) == len(log_of(tmp_path / "whole"))
    for name in ("adapter-0", "adapter-1"):
        assert weights(tmp_path / "cut" / name) == weights(tmp_path / "whole" / name) != weights(tmp_path / "plain" / name)


def test_what_a_user_can_get_wrong():
    learner = PolicyGradient(**SMALL)
    with pytest.raises(ConfigError, match="power lies between 0 and 2"):
        Balanced(power=-1)
    with pytest.raises(ConfigError, match="known by its name"):
        learner.accept(spec_of(learner, weighting={"name": "blanced"}))
