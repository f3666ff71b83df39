"""The weightings that climb a utility: what they estimate, where they lead, and that both learners follow them."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from learner_cases import SMALL, TASK, log_of, spec_of, weights, whole_and_cut
from oracles import small_task
from paretune.errors import ConfigError
from paretune.objectives.utilities import Constrained, LogSum, MaxMin, Tchebycheff
from paretune.registry import describe
from paretune.tasks.exact.optimum import landmarks, optimum
from paretune.training.combine import Combine
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.weightings.adaptive import Climb, Multipliers
from paretune.training.weightings.base import StepContext


def seen(returns_NM, w_M, *, exact=False, marks=None, step=0):
    returns_NM = np.atleast_2d(np.asarray(returns_NM, dtype=float))
    m = returns_NM.shape[1]
    w_NM = np.tile(np.asarray(w_M, dtype=float), (len(returns_NM), 1))
    return StepContext(step, 10, w_NM, returns_NM, np.eye(m), [], np.zeros(m), np.ones(m), exact, marks)


def climb(utility, **fields):
    return Climb(utility=describe(utility), **fields)


def multipliers(utility, **fields):
    return Multipliers(utility=describe(utility), **fields)


def test_returns_are_a_running_mean_of_batches_without_a_bias_to_0():
    weighting = climb(LogSum(), decay=0.5)
    state = weighting.start(2)
    for batch in ([[0.2, 0.4], [0.4, 0.8]], [[0.6, 0.6]], [[0.1, 0.2]]):
        J_M, _, state = weighting.estimate(state, seen(batch, (0.5, 0.5)))
    mean = (np.array([0.3, 0.6]) * 0.25 + np.array([0.6, 0.6]) * 0.5 + np.array([0.1, 0.2])) / 1.75
    np.testing.assert_allclose(J_M, mean)
    np.testing.assert_allclose(weighting.estimate(state, seen([[0.9, 0.9]], (0.5, 0.5), exact=True))[0], 0.9)
    json.dumps(state, allow_nan=False)


def test_what_was_not_scored_does_not_count():
    weighting = climb(LogSum(), decay=0.5)
    _, _, state = weighting.estimate(weighting.start(2), seen([[0.2, np.nan], [0.4, np.nan]], (0.5, 0.5)))
    J_M, _, state = weighting.estimate(state, seen([[np.nan, 0.5], [np.nan, np.nan]], (0.5, 0.5)))
    np.testing.assert_allclose(J_M, [0.3, 0.5])
    found, _ = weighting.weights(weighting.start(2), seen([[np.nan, np.nan]], (0.5, 0.5)))
    assert np.isfinite(found).all(), "nothing is known yet: both stand at their low"


def test_without_landmarks_the_first_batch_is_the_reference_and_the_range_ends_at_the_ideal():
    weighting = multipliers(MaxMin(), rate=1.0, damping=0.0)
    _, marks, state = weighting.estimate(weighting.start(2), seen([[0.2, 0.6]], (0.5, 0.5)))
    _, marks, state = weighting.estimate(state, seen([[0.5, 0.5]], (0.5, 0.5)))
    np.testing.assert_allclose(marks.reference_M, [0.2, 0.6])
    np.testing.assert_allclose(marks.ideal_M, 1.0)


@pytest.mark.parametrize("utility", [Tchebycheff(), LogSum()], ids=repr)
def test_climbing_follows_the_gradient_in_weights_that_sum_to_1(utility):
    task = small_task()
    marks, w_M = landmarks(task), np.array([0.3, 0.7])
    found, _ = climb(utility).weights(climb(utility).start(2), seen([[0.4, 0.6]] * 3, w_M, exact=True, marks=marks))
    gradient_M = utility.gradient(np.array([0.4, 0.6]), w_M, marks)
    np.testing.assert_allclose(found, np.tile(gradient_M / gradient_M.sum(), (3, 1)))


def follow(task, weighting, w_M, *, steps=1500, lag=0.05):
    """A learner in closed form: its policy is pi*_v, and v moves a little towards the weights that it is told."""
    marks, state, v_M = landmarks(task), weighting.start(len(w_M)), np.full(len(w_M), 1 / len(w_M))
    for step in range(steps):
        J_M = task.J_M(task.optimum_logp_PR(v_M, "train"), "train")
        told_NM, state = weighting.weights(state, seen(J_M, w_M, exact=True, marks=marks, step=step))
        state = json.loads(json.dumps(state))
        assert told_NM.sum() == pytest.approx(1)
        v_M = v_M + lag * (told_NM[0] - v_M)
    return J_M


CASES = [
    climb(Tchebycheff()),
    climb(LogSum()),
    multipliers(MaxMin()),
    multipliers(Constrained()),
    multipliers(Constrained(), logarithmic=True, rate=3.0),
    multipliers(Constrained(thresholds=(0.51, None))),
]


@pytest.mark.parametrize("weighting", CASES, ids=lambda c: f"{c.seeks!r} {getattr(c, 'logarithmic', '')}")
def test_a_learner_that_follows_arrives_at_the_exact_optimum(weighting):
    task, w_M = small_task(rho=-0.8, seed=2), np.array([0.2, 0.8])
    best = optimum(task, "train", weighting.seeks, w_M)
    np.testing.assert_allclose(follow(task, weighting, w_M), best.J_M, atol=2e-3)
    linear_M = task.J_M(task.optimum_logp_PR(w_M, "train"), "train")
    assert np.abs(linear_M - best.J_M).max() > 0.005, "the weighted sum would not do"


def test_three_objectives_arrive_too():
    task, w_M = small_task(objective_count=3, rho=-0.3), np.array([0.5, 0.3, 0.2])
    for weighting in (climb(Tchebycheff()), multipliers(MaxMin()), multipliers(Constrained())):
        best = optimum(task, "train", weighting.seeks, w_M)
        np.testing.assert_allclose(follow(task, weighting, w_M), best.J_M, atol=3e-3)


def test_dividing_by_the_sum_is_the_published_form():
    """(w + l e_k) / (1 + l) for one constraint of price l."""
    weighting = multipliers(Constrained(thresholds=(None, 0.7)), rate=2.0, damping=0.0)
    found, state = weighting.weights(weighting.start(2), seen([[0.5, 0.5]], (1.0, 0.0), exact=True))
    price = 2.0 * 0.2
    np.testing.assert_allclose(found, [[1 / (1 + price), price / (1 + price)]])
    kept, _ = weighting.weights(state, seen([[0.5, 5.0]], (1.0, 0.0), exact=True))
    np.testing.assert_allclose(kept, [[1.0, 0.0]], atol=1e-12, err_msg="a price never falls below 0")


def test_prices_of_what_cannot_be_met_stay_finite():
    weighting = multipliers(Constrained(thresholds=(None, 50.0)), logarithmic=True)
    state = weighting.start(2)
    for _ in range(100):
        found, state = weighting.weights(state, seen([[0.5, 0.5]], (1.0, 0.0), exact=True))
    assert np.isfinite(found).all()
    assert found[0, 1] > 0.999


@pytest.mark.parametrize("learner", [PolicyGradient(**SMALL), ExactGradient(rank=2, alpha=4, steps=4, checkpoint_every=2, log_every=2)])
def test_killed_and_resumed_the_multipliers_go_on(tmp_path, learner):
    weighting = describe(multipliers(MaxMin(), rate=50.0))
    spec = spec_of(learner, weighting=weighting)
    whole_and_cut(learner, spec, TASK, tmp_path, at=4)  # after the checkpoint at 2
    learner.train(spec_of(learner), TASK, tmp_path / "plain")
    assert len(log_of(tmp_path / "cut")) == len(log_of(tmp_path / "whole"))
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole") != weights(tmp_path / "plain")


def test_the_sampled_learner_trains_what_is_worst_off(tmp_path):
    """An objective far below its share gets nearly all of the weight, and the training is that of its expert."""
    learner = PolicyGradient(**{**SMALL, "samples": 16})
    lopsided = describe(multipliers(MaxMin(base=(-50.0, 0.5)), rate=100.0, damping=100.0))
    learner.train(spec_of(learner, weighting=lopsided), TASK, tmp_path / "told")
    learner.train(spec_of(learner, (0.0, 1.0)), TASK, tmp_path / "expert")
    assert weights(tmp_path / "told") == weights(tmp_path / "expert")


def test_what_a_user_can_get_wrong():
    learner = PolicyGradient(**SMALL)
    for make, message in (
        (lambda: climb(MaxMin()), "gradient of a smooth utility"),
        (lambda: multipliers(LogSum()), "for utilities with kinks"),
        (lambda: climb(LogSum(), decay=1.0), "decay is at least 0 and below 1"),
        (lambda: multipliers(MaxMin(), rate=0.0), "rate is positive"),
        (lambda: Climb(utility={"name": "log-product"}), "log-product is a scalarizer"),
        (lambda: Combine.of(spec_of(learner, weighting={"name": "climb"})).check(sampled=False), "utility"),
        (lambda: learner.accept(spec_of(learner, None, weighting=describe(climb(LogSum())))), "follows one preference"),
        (lambda: multipliers(MaxMin(base=(0.1, 0.2, 0.3))).start(2), "one finite number per objective"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()


def test_the_exact_learner_climbs_a_scalarizer(tmp_path):
    """Its value before the first step is E_ref of the scalarized reward; with a weighting that would not be told, it refuses."""
    learner = ExactGradient(rank=2, alpha=4, steps=30, log_every=1)
    spec = dataclasses.replace(spec_of(learner), scalarizer={"name": "log_product"})
    learner.train(spec, TASK, tmp_path / "product")
    values = [row["value"] for row in log_of(tmp_path / "product")]
    rewards_PRM = np.clip(TASK.rewards_PRM("train"), 1e-4, 0.9999)
    expected = (np.exp(TASK.reference_logp_PR("train")) * (np.log(rewards_PRM) @ np.array(spec.preference))).sum(1).mean()
    assert values[0] == pytest.approx(expected, abs=1e-5)
    assert values[-1] > values[0] + 0.01
    both = dataclasses.replace(spec, weighting=describe(climb(LogSum())))
    with pytest.raises(ConfigError, match='the scalarizer "linear"'):
        learner.train(both, TASK, tmp_path / "both")
