"""Adaptive placement: gates among neighbors, the bound that it follows, and where its experts end up."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError, TrainingError
from paretune.evaluation.evaluate import evaluate
from paretune.methods.placed import optimistic_regret
from paretune.methods.search import simplex_lattice
from paretune.policy.family import Family
from paretune.policy.rules import Barycentric, Identity, barycentric_gates
from paretune.registry import METHODS
from paretune.seeds import generator
from paretune.tasks.preferences import KEEP_OUT
from paretune.testing.methods import check_method, quick_learner, quick_task, train_plan


@pytest.mark.parametrize("count", [2, 3, 4])
def test_gates_are_the_place_of_a_preference_among_its_neighbors(count):
    rng = generator(0, "placed", count)
    points = np.concatenate([np.eye(count), rng.dirichlet(np.ones(count), 3)])
    w_WM = rng.dirichlet(np.ones(count), 50)
    gates = barycentric_gates(points, w_WM)
    np.testing.assert_allclose(gates @ points, w_WM, atol=1e-9)
    np.testing.assert_allclose(gates.sum(1), 1)
    assert (gates >= 0).all()
    assert ((gates > 1e-12).sum(1) <= count).all(), "no more than the corners of one cell"
    np.testing.assert_allclose(barycentric_gates(points, points), np.eye(len(points)), atol=1e-9)


@pytest.mark.parametrize("points", [4, 6])
def test_flat_cells_between_points_of_a_lattice_give_no_gates(points):
    lattice = simplex_lattice(4, points)
    w_WM = np.concatenate([generator(3, "placed").dirichlet(np.ones(4), 40), lattice])
    gates = barycentric_gates(lattice, w_WM)
    np.testing.assert_allclose(gates @ lattice, w_WM, atol=1e-9)
    np.testing.assert_allclose(gates.sum(1), 1)


def test_without_more_experts_it_is_plain_mixing():
    w_WM = generator(1, "placed").dirichlet(np.ones(3), 10)
    np.testing.assert_allclose(Barycentric(tuple(map(tuple, np.eye(3)))).gates(w_WM), Identity().gates(w_WM), atol=1e-9)


def test_the_bound_holds_for_optimal_policies():
    """With V the exact optimum at three preferences and U that of any family, no regret exceeds the bound: V is convex."""
    task = small_task(rho=-0.8)
    points = np.array([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]])
    w_WM = np.stack([np.linspace(0, 1, 11), np.linspace(1, 0, 11)], axis=1)
    best_K = (task.front("train", points).points_KM * points).sum(1)
    best_W = (task.front("train", w_WM).points_KM * w_WM).sum(1)
    utility_W = best_W - generator(2, "placed").random(11)
    bound_W = optimistic_regret(best_K, barycentric_gates(points, w_WM), utility_W)
    assert (bound_W >= best_W - utility_W - 1e-9).all()
    assert bound_W[5] == pytest.approx(best_W[5] - utility_W[5])


def test_an_expert_more_goes_to_the_middle_of_a_conflict_and_lifts_logit_mixing(tmp_path):
    task, learner = small_task(rho=-0.8), quick_learner(steps=40)
    method = METHODS.build({"name": "placed", "more": 1})
    assert len(method.plan(task, learner, {}, 0)) == 2
    done = train_plan(method, task, learner, tmp_path, seed=0)
    third = method.plan(task, learner, done, 0)[2].preference
    assert 0.2 < third[0] < 0.8
    assert np.abs(task.judged() - np.array(third)).max(1).min() > KEEP_OUT
    family = method.policy(task, learner, done, 0)
    found = evaluate(task, family, splits=["train"])
    plain = METHODS.build("experts").policy(task, learner, done, 0)
    before = evaluate(task, plain, splits=["train"]).metrics["splits"]["train"]["attainment"]["worst"]
    assert found.metrics["splits"]["train"]["attainment"]["worst"] > before + 0.1
    assert found.cost.evaluations > 0, "choosing was paid for"
    family.save(tmp_path / "family")
    assert Family.load(tmp_path / "family").gates(task.judged()) == pytest.approx(family.gates(task.judged()))


def test_what_is_unscored_is_unknown_only_where_it_has_a_share(tmp_path, monkeypatch):
    values_K, gates_WK = np.array([0.5, np.nan, 0.7]), np.array([[0.5, 0, 0.5], [0.5, 0.5, 0]])
    assert optimistic_regret(values_K, gates_WK, np.array([0.4, 0.4])) == pytest.approx([0.2, np.nan], nan_ok=True)
    task, learner, method = small_task(rho=-0.8), quick_learner(steps=1), METHODS.build("placed")
    done, means = train_plan(METHODS.build("experts"), task, learner, tmp_path, seed=0), []

    def returns(*_, **__):
        return SimpleNamespace(at=lambda gates_WK: SimpleNamespace(means_WM=np.tile(means[-1], (len(gates_WK), 1))))

    monkeypatch.setattr("paretune.methods.placed.returns_of", returns)
    means.append([0.5, np.nan])
    with pytest.raises(TrainingError, match="no preference whose objectives were scored"):
        method.plan(task, learner, done, 0)
    means.append([0.5, 0.5])
    assert len(method.plan(task, learner, done, 0)) == 3


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("mixing", ["logit", "parameter"])
def test_conformance(count, mixing):
    check_method({"name": "placed", "mixing": mixing, "points": 5}, task=quick_task(objective_count=count))


def test_what_a_user_can_get_wrong():
    with pytest.raises(ConfigError, match="points at least 3"):
        METHODS.build({"name": "placed", "points": 2})
    method = METHODS.build({"name": "placed", "points": 3, "more": 9})
    with pytest.raises(ConfigError, match="candidate for every expert"):
        method.plan(small_task(), quick_learner(), {}, 0)
