"""Optimistic linear support: its geometry by hand, what it trains where every training is perfect, when it stops, what it charges."""

import dataclasses

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError, TrainingError
from paretune.evaluation.evaluate import evaluate
from paretune.methods import linear_support
from paretune.methods.linear_support import Measured, corners, next_corner, next_planned, optimistic
from paretune.policy.family import Family
from paretune.policy.returns import covariance_within
from paretune.policy.rules import Constant
from paretune.registry import METHODS
from paretune.tasks.exact.task import ExactTask
from paretune.tasks.preferences import KEEP_OUT
from paretune.testing.methods import check_method, quick_learner, quick_task, train_plan
from paretune.training.cost import Cost

FAR = np.array([[0.123, 0.877]])  # a judged preference that is in nobody's way


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8, seed=2)


def test_corners_of_two_lines():
    """J = (1, 0) and (0, 1) cross at (.5, .5); with (.7, .7) between them there are two corners, where it equals either."""
    np.testing.assert_allclose(corners(np.eye(2)), [[0, 1], [0.5, 0.5], [1, 0]])
    found = corners(np.array([[1.0, 0.0], [0.0, 1.0], [0.7, 0.7]]))
    np.testing.assert_allclose(found, [[0, 1], [0.3, 0.7], [0.7, 0.3], [1, 0]])
    dominated = corners(np.array([[1.0, 0.0], [0.0, 1.0], [0.3, 0.3]]))
    np.testing.assert_allclose(dominated, [[0, 1], [0.5, 0.5], [1, 0]])


def test_corners_of_three_objectives():
    """Three experts meet at the center, two of them on the middle of each edge."""
    found = corners(np.eye(3))
    expected = [*np.eye(3), *(1 - np.eye(3)) / 2, np.full(3, 1 / 3)]
    assert len(found) == len(expected)
    for w_M in expected:
        assert np.abs(found - w_M).max(1).min() < 1e-8


def test_the_optimistic_bound_by_hand():
    """Experts at (1, 0) and (0, 1): nothing forbids (1, 1). A policy of w . J = .6 at the center forbids more than v1 + v2 = 1.2."""
    assert optimistic(np.eye(2), np.eye(2), np.array([0.5, 0.5])) == pytest.approx(1.0)
    returns, trained = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.6]]), np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    assert optimistic(returns, trained, np.array([0.5, 0.5])) == pytest.approx(0.6)
    assert optimistic(returns, trained, np.array([0.75, 0.25])) == pytest.approx(0.75 * 1.0 + 0.25 * 0.2)


def test_no_policy_exceeds_the_optimistic_bound_where_trainings_are_perfect(task):
    w_KM = np.array([[1.0, 0.0], [0.0, 1.0], [0.4, 0.6]])
    returns_KM = task.front("train", w_KM).points_KM
    for first in np.linspace(0, 1, 21):
        w_M = np.array([first, 1 - first])
        best = w_M @ task.front("train", w_M[None]).points_KM[0]
        assert best <= optimistic(returns_KM, w_KM, w_M) + 1e-9


def test_the_published_way_goes_to_the_corner_and_stops_when_little_is_missing():
    assert next_corner(np.eye(2), np.eye(2), eps=0.01, judged_WM=FAR).tolist() == [0.5, 0.5]
    assert next_corner(np.eye(2), np.eye(2), eps=0.51, judged_WM=FAR) is None
    returns, trained = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.6]]), np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    # Corners at w1 = 6/7 - no: (1,0) meets (.9,.6) where w1 = .6/.7, and (0,1) where w1 = .4/1.3; the bound leaves more at the second.
    gaps = {w1: optimistic(returns, trained, np.array([w1, 1 - w1])) - max(w1, 1 - w1, 0.9 * w1 + 0.6 * (1 - w1)) for w1 in (6 / 7, 4 / 13)}
    assert gaps[4 / 13] > gaps[6 / 7] > 0
    assert next_corner(returns, trained, eps=0.0, judged_WM=FAR)[0] == pytest.approx(4 / 13, abs=1e-3)


def test_a_corner_at_a_judged_preference_is_trained_beside_it():
    judged_WM = np.array([[0.5, 0.5], [0.494, 0.506]])
    found = next_corner(np.eye(2), np.eye(2), eps=0.0, judged_WM=judged_WM)
    assert np.abs(judged_WM - found).max(1).min() > KEEP_OUT
    assert np.abs(found - 0.5).max() < 0.012
    assert found.sum() == pytest.approx(1)
    assert (found * 1000).round(6).tolist() == np.round(found * 1000).tolist()


def perfect(task, count, **fields):
    """What would be trained if every training were perfect."""
    method = METHODS.build({"name": "ols", "budget": count, **fields})
    w_KM = np.eye(task.objectives.count) if method.estimate == "bound" else np.empty((0, task.objectives.count))
    reference = linear_support._measured(task, None, 1, 0)
    asked_WM = task.judged() if method.asked == "judged" else linear_support._spread(task.objectives.count, 101)
    candidates = linear_support._spread(task.objectives.count, 201)
    candidates = candidates[linear_support._allowed(candidates, task.judged())]
    while len(w_KM) < count:
        returns_KM = task.front("train", w_KM).points_KM if len(w_KM) else np.empty((0, task.objectives.count))
        if method.estimate == "bound":
            found = next_corner(returns_KM, w_KM, eps=0, judged_WM=task.judged())
        else:
            given = {"reference": reference, "beta": task.beta, "asked_WM": asked_WM, "candidates_CM": candidates}
            found = next_planned(returns_KM, w_KM, left=count - len(w_KM), eps=method.eps, **given)
        if found is None:
            break
        w_KM = np.concatenate([w_KM, found[None]])
    judged_WM = task.judged()
    start_W = judged_WM @ task.J_M(task.reference_logp_PR("train"), "train")
    best_W = (judged_WM * task.front("train", judged_WM).points_KM).sum(1)
    reached_W = (judged_WM @ task.front("train", w_KM).points_KM.T).max(1)
    return w_KM, ((reached_W - start_W) / (best_W - start_W)).min()


def test_planning_by_curvature_serves_the_worst_preference_better_than_corners(task):
    corners_KM, by_corners = perfect(task, 5, estimate="bound")
    planned_KM, planned = perfect(task, 5)
    asked_KM, asked = perfect(task, 5, asked="judged")
    assert planned > by_corners + 0.1
    assert asked >= planned - 0.01
    assert len(np.unique(planned_KM, axis=0)) == len(planned_KM) == 5
    for w_KM in (corners_KM, planned_KM, asked_KM):
        assert linear_support._allowed(w_KM, task.judged()).all()


def test_it_stops_when_no_preference_can_gain_eps(task):
    few, _ = perfect(task, 12, eps=0.2)
    many, share = perfect(task, 12, eps=0.05)
    assert len(few) < len(many) <= 12
    assert share > 0.9


def test_three_objectives_are_spread_over_the_simplex():
    task = small_task(objective_count=3, rho=-0.3)
    w_KM, planned = perfect(task, 6)
    assert len(np.unique(w_KM, axis=0)) == 6
    assert planned > perfect(task, 6, estimate="bound")[1]


def test_curvature_is_exact_for_rewards_that_are_normal():
    """Missing at w from the best policy of v is (w - v)' S (w - v) / (2 beta): with S = 1 the best two mirror each other."""
    reference = Measured(np.zeros(2), np.eye(2), Cost())
    grid = linear_support._spread(2, 101)
    first = next_planned(
        np.empty((0, 2)), np.empty((0, 2)), reference=reference, beta=0.5, asked_WM=grid, candidates_CM=grid, left=2, eps=0.0
    )
    second = next_planned(
        np.stack([first]), np.stack([first]), reference=reference, beta=0.5, asked_WM=grid, candidates_CM=grid, left=1, eps=0.0
    )
    assert sorted([first[0], second[0]]) == pytest.approx([1 - max(first[0], second[0]), max(first[0], second[0])], abs=0.03)


@pytest.mark.parametrize("fields", [{}, {"estimate": "bound", "budget": 4}, {"asked": "judged", "answer": "nearest"}], ids=str)
def test_three_objectives_pass_the_conformance_suite(fields):
    check_method({"name": "ols", "budget": 3, **fields}, task=quick_task(objective_count=3, rho=-0.2), learner=quick_learner(steps=2))


@pytest.fixture(scope="module")
def trained(task, tmp_path_factory):
    method, learner = METHODS.build({"name": "ols", "budget": 3}), quick_learner(steps=10)
    return method, learner, train_plan(method, task, learner, tmp_path_factory.mktemp("ols"), seed=0)


def test_trainings_come_one_by_one_and_measuring_is_charged(task, trained):
    method, learner, done = trained
    assert len(method.plan(task, learner, {}, 0)) == 1
    family = method.policy(task, learner, done, 0)
    cost = evaluate(task, family, splits=["train"]).cost
    assert cost.evaluations == 4, "three policies and the reference"
    assert cost.tokens == 4 * task.inputs("train").input_ids_PT.numel()
    assert cost.validation_samples == 0
    assert sorted(map(tuple, family.meta["trained_at"])) == sorted(a.spec.preference for a in done.values())


def test_the_bound_is_charged_for_the_policies_alone(task, tmp_path):
    """It never asks for the reference, which the planned way measures first."""
    method, learner = METHODS.build({"name": "ols", "estimate": "bound", "budget": 2}), quick_learner(steps=2)
    done = train_plan(method, task, learner, tmp_path, seed=0)
    assert method.policy(task, learner, done, 0).cost(np.eye(2)).evaluations == len(done) == 2


def test_the_best_of_the_trained_answers(task, trained, tmp_path):
    method, learner, done = trained
    family = method.policy(task, learner, done, 0)
    w_WM = np.array([[0.9, 0.1], [0.5, 0.5], [0.1, 0.9]])
    mine = evaluate(task, family, w_WM=w_WM, splits=["train"]).curves["train"].returns_WSM.mean(1)
    each = []
    for k in range(3):
        one = Family(family.policy, Constant(gates_K=tuple(np.eye(3)[k])), task.objectives, task.base())
        each.append(evaluate(task, one, w_WM=w_WM, splits=["train"]).curves["train"].returns_WSM.mean(1))
    best_W = np.max([(w_WM * points).sum(1) for points in each], axis=0)
    np.testing.assert_allclose((w_WM * mine).sum(1), best_W, atol=1e-7)
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    assert np.array_equal(loaded.gates(w_WM), family.gates(w_WM))
    assert evaluate(task, loaded, w_WM=w_WM, splits=["train"]).cost == Cost()


class NotExact(ExactTask):
    registered_name = "not-exact"
    is_exact = False


def test_off_exact_tasks_it_measures_samples(task, trained):
    """Returns and covariance of 2,000 samples within 4.5 standard errors (false alarm below 1e-4)."""
    _, _, done = trained
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    artifact = next(iter(done.values()))
    for given in (artifact, None):
        exact, drawn = linear_support._measured(task, given, 1, 0), linear_support._measured(blind, given, 2000, 0)
        np.testing.assert_allclose(drawn.returns_M, exact.returns_M, atol=4.5 * 0.25 / np.sqrt(2000))
        np.testing.assert_allclose(drawn.covariance_MM, exact.covariance_MM, atol=4.5 * 0.06 / np.sqrt(2000))
        assert (drawn.cost.validation_samples, drawn.cost.evaluations) == (2000, 1)
        assert exact.covariance_MM[0, 1] < -0.01


def test_as_many_prompts_as_samples_leave_two_responses_to_each_that_is_used(task):
    """One response to each prompt says nothing of how rewards vary within a prompt, and nothing would be trained."""
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    count = blind.prompt_count
    assert (np.diagonal(linear_support._measured(blind, None, count, 0).covariance_MM) > 0).all()
    assert len(METHODS.build({"name": "ols", "samples": count}).plan(blind, quick_learner(), {}, 0)) == 1


def test_an_unknown_covariance_is_refused_in_words(task, monkeypatch):
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    monkeypatch.setattr(linear_support, "_measured", lambda *_: Measured(np.zeros(2), np.full((2, 2), np.nan), Cost()))
    with pytest.raises(TrainingError, match="no prompt with two responses that were scored in every objective"):
        METHODS.build({"name": "ols"}).plan(blind, quick_learner(), {}, 0)


def test_rewards_that_do_not_vary_are_refused_in_words(task, monkeypatch):
    """As an objective that pays so rarely that no sample of the reference has it: an empty plan would end in a family of nothing."""
    monkeypatch.setattr(linear_support, "_measured", lambda *_: Measured(np.zeros(2), np.zeros((2, 2)), Cost()))
    with pytest.raises(TrainingError, match="rewards that hardly do"):
        METHODS.build({"name": "ols"}).plan(task, quick_learner(), {}, 0)


def test_unscored_samples_are_left_out_of_the_covariance():
    rewards_SM = np.array([[0.0, 1.0], [1.0, 0.0], [np.nan, 0.5], [0.2, 0.2], [0.4, 0.4]])
    got = covariance_within(rewards_SM, np.array([0, 0, 0, 1, 1]))
    np.testing.assert_allclose(got, (np.array([[0.5, -0.5], [-0.5, 0.5]]) + 0.02 * np.ones((2, 2))) / 2)
    assert np.isnan(covariance_within(rewards_SM, np.arange(5))).all(), "one sample of each prompt"


def test_what_a_user_can_get_wrong(task):
    for given, message in (
        ({"budget": 0}, "budget is at least 1"),
        ({"eps": -1.0}, "eps at least 0"),
        ({"estimate": "bound", "asked": "judged"}, "looked at on the whole simplex"),
        ({"estimate": "bound", "budget": 1}, "begins with every vertex"),
        ({"estimate": "gues"}, "estimate"),
    ):
        with pytest.raises(ConfigError, match=message):
            METHODS.build({"name": "ols", **given}).plan(task, quick_learner(), {}, 0)
