"""The bridge and the conditioned policies: what their gates are, what stays as it was, and that they repair what a soup breaks."""

from __future__ import annotations

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.policy.family import Family
from paretune.policy.rules import BridgeRule, SharedRule, interaction
from paretune.registry import METHODS
from paretune.testing.methods import check_method, quick_learner, train_plan


@pytest.fixture(scope="module")
def conflict():
    return small_task(rho=-0.8)


@pytest.fixture(scope="module")
def learner():
    return quick_learner(steps=40)


@pytest.fixture(scope="module")
def done(conflict, learner, tmp_path_factory):
    return train_plan(METHODS.build("bridge"), conflict, learner, tmp_path_factory.mktemp("bridge"), seed=0)


def worst(task, family, w_WM=None):
    return evaluate(task, family, w_WM=w_WM, splits=["train"]).metrics["splits"]["train"]["attainment"]["worst"]


def test_the_gate_is_nothing_at_vertices_and_all_at_the_center():
    for m in (2, 3, 8):
        np.testing.assert_allclose(interaction(np.eye(m)), 0, atol=1e-12)
        np.testing.assert_allclose(interaction(np.full((1, m), 1 / m)), 1)
    np.testing.assert_allclose(interaction(np.array([[0.25, 0.75]])), 4 * 0.25 * 0.75)
    assert BridgeRule().gates(np.array([[0.5, 0.5]])).tolist() == [[0.5, 0.5, 1.0]]
    assert SharedRule(scale=2.0).gates(np.array([[0.25, 0.75]])).tolist() == [[1.0, 0.5, 1.5]]


def test_the_experts_are_trained_first_and_stay_as_they_are(conflict, learner, done):
    method = METHODS.build("bridge")
    first = method.plan(conflict, learner, {}, 0)
    assert [spec.preference for spec in first] == [(1.0, 0.0), (0.0, 1.0)]
    *experts, bridge = method.plan(conflict, learner, done, 0)
    assert bridge.frozen_adapters == tuple(spec.key for spec in experts)
    assert bridge.preference is None
    at_vertices = {
        name: evaluate(conflict, METHODS.build(name).policy(conflict, learner, done, 0), w_WM=np.eye(2)).curves["train"]
        for name in ("bridge", "experts")
    }
    np.testing.assert_allclose(at_vertices["bridge"].rewards_WSM, at_vertices["experts"].rewards_WSM, atol=1e-6)


def test_under_conflict_it_repairs_the_soup_at_one_forward(conflict, learner, done):
    """Shown on preferences of its own: nothing was trained at them. The soup of the same experts does harm; the bridge nearly none."""
    w_WM = np.stack([np.linspace(0.1, 0.9, 9), np.linspace(0.9, 0.1, 9)], axis=1)
    bridge = METHODS.build("bridge").policy(conflict, learner, done, 0)
    soup = METHODS.build({"name": "experts", "mixing": "parameter"}).policy(conflict, learner, done, 0)
    assert bridge.policy.forwards_per_token == 1
    assert worst(conflict, bridge, w_WM) > worst(conflict, soup, w_WM) + 0.2


@pytest.mark.parametrize("structure", ["clp", "bridge", "panacea", "pblora"])
def test_one_training_serves_all_preferences(conflict, tmp_path, structure):
    method, longer = METHODS.build({"name": "conditioned", "structure": structure}), quick_learner(steps=80)
    (spec,) = method.plan(conflict, longer, {}, 0)
    made = train_plan(method, conflict, longer, tmp_path, seed=0)
    assert list(made) == [spec.key]
    family = method.policy(conflict, longer, made, 0)
    assert {"clp": 2, "bridge": 3, "panacea": 3, "pblora": 3}[structure] == family.policy.K
    vertex = evaluate(conflict, family, w_WM=np.eye(2), splits=["train"]).metrics["splits"]["train"]["utility"]["per_preference"]
    swapped = evaluate(conflict, family, w_WM=np.eye(2)[::-1], splits=["train"]).metrics["splits"]["train"]["rewards"]
    assert swapped[0][1] > swapped[1][1], "the second objective does better where it alone matters"
    assert swapped[1][0] > swapped[0][0]
    assert all(entry["value"] is not None for entry in vertex)
    if structure != "panacea":  # one rank per objective is too little here, after so few steps
        assert worst(conflict, family) > 0, "no judged preference is harmed"


def test_a_saved_family_answers_alike(conflict, learner, done, tmp_path):
    family = METHODS.build("bridge").policy(conflict, learner, done, 0)
    family.save(tmp_path / "family")
    again = Family.load(tmp_path / "family")
    w_WM = np.array([[0.3, 0.7]])
    before, after = (evaluate(conflict, one, w_WM=w_WM).curves["test"].rewards_WSM for one in (family, again))
    assert np.array_equal(before, after)


def test_effort_scales_the_budget_of_the_bridge_alone(conflict, learner, done):
    *experts, bridge = METHODS.build({"name": "bridge", "effort": 2.5}).plan(conflict, learner, done, 0)
    assert [spec.learner["steps"] for spec in experts] == [40, 40]
    assert bridge.learner["steps"] == 100
    from paretune.registry import LEARNERS

    assert LEARNERS.build({"name": "pg", "samples": 640}).scaled(0.5).samples == 320


@pytest.mark.parametrize(
    "method",
    ["bridge", *({"name": "conditioned", "structure": structure} for structure in ("clp", "bridge", "panacea", "pblora"))],
    ids=["bridge", "clp", "joint-bridge", "panacea", "pblora"],
)
@pytest.mark.parametrize("count", [2, 3])
def test_conformance(method, count):
    from paretune.testing.methods import quick_task

    check_method(method, task=quick_task(objective_count=count))


def test_what_a_user_can_get_wrong():
    with pytest.raises(ConfigError, match="effort is positive"):
        METHODS.build({"name": "bridge", "effort": 0})
    with pytest.raises(ConfigError, match="private is at least 1"):
        METHODS.build({"name": "conditioned", "private": 0})
