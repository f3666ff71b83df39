"""Weights that adapt: one step by hand, the published Exp3's own numbers, ridge regression, and bandits that find the better arm."""

import dataclasses
import inspect
import json

import numpy as np
import pytest

from learner_cases import SMALL, TASK, log_of, spec_of, weights, whole_and_cut
from paretune.errors import ConfigError
from paretune.seeds import generator
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.weightings.adaptive import (
    Contextual,
    CovarianceTargeted,
    Exp3,
    GradientLevel,
    Influence,
    exp3_probabilities,
    prompt_features,
    ridge,
)
from paretune.training.weightings.base import WEIGHTINGS, StepContext
from paretune.types import Prompt

A, B = Prompt("aab"), Prompt("ccd")


def seen(w, *, step=0, returns=None, covariance=None, gramian=None, prompts=(), seed=0):
    w_NM = np.atleast_2d(np.asarray(w, dtype=float))
    m = w_NM.shape[1]
    returns = np.full(w_NM.shape, 0.5) if returns is None else np.asarray(returns, dtype=float)
    covariance = np.eye(m) if covariance is None else np.asarray(covariance)
    return StepContext(step, 100, w_NM, returns, covariance, prompts, np.zeros(m), np.ones(m), seed=seed, gramian_MM=gramian)


def test_influence_by_hand():
    """s = (1 - .4, 2 - .4) over a mean square of 1.5."""
    gramian = np.array([[1.0, -0.4], [-0.4, 2.0]])
    rule = Influence(eta=0.3)
    got, state = rule.weights(rule.start(2), seen([0.6, 0.4], gramian=gramian))
    raw = np.array([0.6, 0.4]) * np.exp(0.3 * np.array([0.6, 1.6]) / 1.5)
    np.testing.assert_allclose(got[0], raw / raw.sum())
    again, _ = rule.weights(json.loads(json.dumps(state)), seen([0.6, 0.4], gramian=gramian))
    raw = raw * np.exp(0.3 * np.array([0.6, 1.6]) / 1.5)
    np.testing.assert_allclose(again[0], raw / raw.sum())
    scaled, _ = rule.weights(rule.start(2), seen([0.6, 0.4], gramian=1e-6 * gramian))
    np.testing.assert_allclose(scaled, got)


def test_the_gradient_level_has_absolute_sum_one():
    gramian = np.array([[1.0, -0.4], [-0.4, 4.0]])
    got, _ = GradientLevel(aggregator="nash_mtl").weights({}, seen([[0.5, 0.5]] * 3, gramian=gramian))
    a = got[0]
    assert got.shape == (3, 2)
    assert np.abs(a).sum() == pytest.approx(1)
    assert a[0] * (gramian @ a)[0] == pytest.approx(a[1] * (gramian @ a)[1])


def test_covariance_targets_by_hand():
    """S w = (.62, -.52), w'Sw = .392: the second correlates -.83 with the advantage, and log w_2 grows by .05 * (.1 + .83)."""
    covariance = [[1.0, -0.9], [-0.9, 1.0]]
    rule = CovarianceTargeted()
    got, state = rule.weights(rule.start(2), seen([0.8, 0.2], covariance=covariance))
    short = 0.1 + 0.52 / 0.392**0.5
    raw = np.array([0.8, 0.2 * np.exp(0.05 * short)])
    np.testing.assert_allclose(got[0], raw / raw.sum())
    np.testing.assert_allclose(state["ema"], [0.62 / 0.392**0.5, -0.52 / 0.392**0.5])
    _, later = rule.weights(state, seen([0.8, 0.2], covariance=np.eye(2)))
    w = got[0]
    np.testing.assert_allclose(later["ema"], 0.9 * np.array(state["ema"]) + 0.1 * w / np.sqrt(w @ w))


def test_covariance_targets_leave_alone_what_agrees_is_constant_or_good_enough():
    rule = CovarianceTargeted()
    for settings in (
        {"covariance": [[1.0, 0.5], [0.5, 1.0]]},
        {"covariance": [[1.0, 0.0], [0.0, 0.0]]},
        {"covariance": [[1.0, -0.9], [-0.9, 1.0]], "returns": [[0.5, 0.96]]},
    ):
        got, _ = rule.weights(rule.start(2), seen([0.8, 0.2], **settings))
        np.testing.assert_allclose(got, [[0.8, 0.2]])


def pay(rule, arms, pulled, amount):
    """One payment to an arm by way of `weights`: returns have risen by `amount` over a past at 0.5."""
    state = {**rule.start(2), "arms": arms, "pulled": pulled, "past": {"sum": [0.5, 0.5], "batches": 1}}
    _, state = rule.weights(state, seen([0.5, 0.5], step=rule.every, returns=[[0.5 + amount, 0.5 + amount]]))
    return state["arms"]


def test_exp3_has_the_published_codes_numbers():
    """Its class with 3 arms, gamma .07, paid (.5, arm 0), (.2, arm 2), (-.1, arm 1), (.3, arm 0): recorded."""
    arms = [0.0, 0.0, 0.0]
    for amount, arm in ((0.5, 0), (0.2, 2), (-0.1, 1), (0.3, 0)):
        arms = pay(Exp3(), arms, arm, amount)
    published = np.log([1.057171225268907, 0.9929171002582694, 1.0142551098601578])
    np.testing.assert_allclose(arms, published - published.max(), atol=1e-12)
    p = exp3_probabilities(np.array(arms), 0.07)
    np.testing.assert_allclose(p, [0.3441750601927806, 0.3246745252430028, 0.33115041456421646])


def test_exp3_takes_an_objective_that_nobody_scored_for_neither_risen_nor_fallen():
    """Returns that stay at .2: a batch in which objective 1 is unscored pays nothing, and leaves its mean where it was."""
    rule, nan = Exp3(every=1), float("nan")
    state = {**rule.start(2), "pulled": 0, "past": {"sum": [0.4, 0.4], "batches": 2}}
    for step, second in ((1, nan), (2, 0.2), (3, nan)):
        _, state = rule.weights({**state, "pulled": 0}, seen([0.5, 0.5], step=step, returns=[[0.2, second]] * 2))
        np.testing.assert_allclose(state["arms"], 0.0, atol=1e-12)
    np.testing.assert_allclose(np.array(state["past"]["sum"]) / state["past"]["batches"], [0.2, 0.2])
    _, state = rule.weights({**state, "pulled": 0}, seen([0.5, 0.5], step=4, returns=[[0.4, nan]] * 2))
    assert state["arms"][0] == 0.0  # the others are below: objective 0 has risen by .2, objective 1 by nothing
    np.testing.assert_allclose(state["arms"][1:], -0.07 / 3 * 0.1 / (1 / 3), atol=1e-12)


def test_exp3_raises_the_weight_of_the_arm_it_pulls_as_published():
    """Its weight bandit after arms 0, 0, 1, 0 were pulled: (0.53270774, 0.46729226); the last arm changes nothing."""
    rule, state, step = Exp3(every=1), Exp3().start(2), 0
    wanted, log = [0, 0, 1, 0], []
    while len(log) < 4:  # draws that are not wanted are undone
        _, after = rule.weights(state, seen([0.5, 0.5], step=step))
        step += 1
        if after["pulled"] == 2:
            assert after["change"] == state["change"]
        if after["pulled"] == wanted[len(log)]:
            state = {**after, "arms": [0.0] * 3}
            log.append(after["pulled"])
    got = np.exp(state["change"]) / np.exp(state["change"]).sum()
    np.testing.assert_allclose(got, [0.53270774, 0.46729226], atol=1e-8)


def test_exp3_changes_every_so_often_and_its_pulls_are_the_seeds():
    rule = Exp3(every=5)

    def run(seed):
        state, out = rule.start(2), []
        for step in range(20):
            got, state = rule.weights(json.loads(json.dumps(state)), seen([0.3, 0.7], step=step, seed=seed))
            out.append(tuple(got[0].round(9)))
        return out

    assert run(1) == run(1)
    assert len({tuple(run(s)) for s in range(4)}) > 1
    assert all(len(set(run(1)[i : i + 5])) == 1 for i in (0, 5, 10, 15))


def test_ridge_is_least_squares_with_penalty_rows():
    """The closed form: least squares on the data and sqrt(penalty) times the unit vectors with pay 0."""
    rng = generator(0, "ridge")
    x, y = rng.normal(size=(20, 4)), rng.normal(size=20)
    theta, inverse = ridge(x.T @ x, x.T @ y, 2.5)
    rows, pays = np.concatenate([x, 2.5**0.5 * np.eye(4)]), np.concatenate([y, np.zeros(4)])
    np.testing.assert_allclose(theta, np.linalg.lstsq(rows, pays)[0])
    np.testing.assert_allclose(inverse, np.linalg.inv(rows.T @ rows))


def test_a_contextual_bandit_keeps_the_ridge_statistics_of_its_pays():
    """One prompt twice: the second visit pays the arm of the first what the preference's return has gained in between."""
    rule = Contextual(stress=2.0)
    first, state = rule.weights(rule.start(2), seen([[0.5, 0.5]] * 2, returns=[[0.2, 0.4], [0.4, 0.6]], prompts=[A, A]))
    arm, before = state["waiting"][A.digest]
    assert before == pytest.approx(0.4)
    assert sum(np.abs(np.array(a["gram"])).sum() for a in state["arms"]) == 0
    np.testing.assert_allclose(first, [[[0.75, 0.25], [0.25, 0.75], [0.5, 0.5]][arm]] * 2)
    _, state = rule.weights(json.loads(json.dumps(state)), seen([[0.5, 0.5]], step=1, returns=[[0.5, 0.7]], prompts=[A]))
    x = prompt_features(A, 8)
    np.testing.assert_allclose(state["arms"][arm]["gram"], np.outer(x, x))
    np.testing.assert_allclose(state["arms"][arm]["sum"], 0.2 * x)


def test_a_contextual_bandit_is_not_paid_for_what_is_unscored():
    """An unscored objective counted as its low: the arm was punished, and on the next visit another one was paid as much."""
    rule = Contextual()
    _, state = rule.weights(rule.start(2), seen([[0.5, 0.5]] * 2, returns=[[0.2, 0.4], [0.4, 0.6]], prompts=[A, A]))
    arm = state["waiting"][A.digest][0]
    _, state = rule.weights(state, seen([[0.5, 0.5]] * 2, step=1, returns=[[0.2, np.nan], [0.4, 0.9]], prompts=[A, A]))
    assert np.linalg.norm(state["arms"][arm]["sum"]) == pytest.approx(2**0.5 * 0.2), "(.3 + .9) / 2 - .4"
    paid, waits = json.dumps(state["arms"], allow_nan=False), [[np.nan, 0.5], [np.nan, 0.7]]
    _, state = rule.weights(state, seen([[0.5, 0.5]] * 2, step=2, returns=waits, prompts=[A, A]))
    _, state = rule.weights(json.loads(json.dumps(state, allow_nan=False)), seen([[0.5, 0.5]], step=3, returns=[[0.9, 0.9]], prompts=[A]))
    assert json.dumps(state["arms"]) == paid, "what an unknown value is compared with is unknown"
    assert state["waiting"][A.digest][1] == pytest.approx(0.9)


@pytest.mark.parametrize("rule", ["linucb", "thompson"])
def test_a_contextual_bandit_finds_the_better_arm_of_each_prompt(rule):
    """Stressing the first objective pays 0.1 on one prompt, stressing the second on the other; all else pays nothing."""
    bandit = Contextual(rule=rule, alpha=0.05, penalty=0.1)
    state, level, chosen = bandit.start(2), np.array([0.3, 0.3]), []
    for step in range(150):
        returns = np.repeat(level[:, None], 2, axis=1)
        got, state = bandit.weights(state, seen([[0.5, 0.5]] * 2, step=step, returns=returns, prompts=[A, B], seed=3))
        right = np.array([got[0, 0] > got[0, 1], got[1, 1] > got[1, 0]])
        level = level + 0.1 * right
        chosen.append(right)
    assert np.mean(chosen[-50:], axis=0).min() > 0.8


def test_features_look_at_words_or_at_letters():
    one, two = prompt_features(A, 64), prompt_features(Prompt("baa"), 64)
    np.testing.assert_array_equal(one, two)
    assert (prompt_features(A, 64) != prompt_features(B, 64)).any()
    assert one[0] == 1
    assert np.linalg.norm(one[1:]) == pytest.approx(1)
    words = prompt_features(Prompt("late parcel"), 64)
    np.testing.assert_array_equal(words, prompt_features(Prompt(messages=({"role": "user", "content": "parcel late"},)), 64))
    assert (prompt_features(Prompt(""), 4) == [1, 0, 0, 0, 0]).all()


GATE_RULES = [
    {"name": "influence"},
    {"name": "ctwa", "target": 1.0},  # objectives of the task do not conflict enough for less
    {"name": "exp3", "every": 1},
    {"name": "contextual"},
    {"name": "contextual", "rule": "thompson"},
    {"name": "gradient", "aggregator": "imtl_g"},
]


@pytest.mark.parametrize("given", GATE_RULES, ids=lambda given: given.get("rule", given["name"]))
def test_an_objective_without_weight_stays_out(given):
    rule = WEIGHTINGS.build(given)
    state = rule.start(3)
    covariance, gramian = np.array([[1.0, -0.5, 0], [-0.5, 1, 0], [0, 0, 1]]), np.array([[1.0, -0.5, 0], [-0.5, 1, 0], [0, 0, 1]])
    for step in range(12):
        returns = generator(step, "returns").uniform(size=(2, 3))
        look = seen([[0.4, 0.0, 0.6]] * 2, step=step, returns=returns, covariance=covariance, gramian=gramian, prompts=[A, B])
        got, state = rule.weights(json.loads(json.dumps(state)), look)
        assert (got[:, 1] == 0).all()
        np.testing.assert_allclose(got.sum(1), 1)


@pytest.mark.parametrize("given", GATE_RULES, ids=lambda given: given.get("rule", given["name"]))
@pytest.mark.parametrize("learner", [PolicyGradient(**SMALL), ExactGradient(rank=2, alpha=4, steps=4, checkpoint_every=2, log_every=2)])
def test_both_learners_follow_it_and_go_on_where_they_were_killed(tmp_path, learner, given):
    spec = spec_of(learner, weighting=given)
    whole_and_cut(learner, spec, TASK, tmp_path, at=4)  # after the checkpoint at 2
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert len(log_of(tmp_path / "cut")) == 2
    learner.train(spec_of(learner), TASK, tmp_path / "plain")
    assert weights(tmp_path / "plain") != weights(tmp_path / "whole")


def test_what_a_user_can_get_wrong():
    for wrong, match in (
        ({"name": "gradient", "c": 1.5}, "c lies in"),
        ({"name": "gradient", "aggregator": "mgdaa"}, "aggregator"),
        ({"name": "influence", "eta": -1.0}, "eta is not negative"),
        ({"name": "ctwa", "target": 2.0}, "target is a correlation"),
        ({"name": "exp3", "gamma": 0.0}, "gamma lies in"),
        ({"name": "contextual", "penalty": 0.0}, "penalty is positive"),
    ):
        with pytest.raises(ConfigError, match=match):
            WEIGHTINGS.build(wrong)


def test_every_weighting_says_source_differs_hides():
    for name in WEIGHTINGS:
        assert dataclasses.is_dataclass(WEIGHTINGS[name])
        assert all(word in inspect.getdoc(WEIGHTINGS[name]) for word in ("Source:", "Differs:", "Hides:")), name
