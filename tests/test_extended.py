"""An objective added later: the old family answers as before, and the new one serves the whole simplex."""

from __future__ import annotations

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.policy.family import Family
from paretune.policy.lora.bank import LoraBank
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.returns import ExactReturns
from paretune.policy.rules import BridgeRule, ExtendedRule
from paretune.registry import METHODS
from paretune.seeds import generator
from paretune.testing.methods import quick_learner, train_plan


def test_gates_where_the_added_objective_has_no_weight_are_those_of_the_old_family():
    w_WM = generator(0, "extended").dirichlet(np.ones(3), 20)
    for new in range(4):
        whole = np.insert(w_WM, new, 0.0, axis=1)
        gates = ExtendedRule(new=new).gates(whole)
        np.testing.assert_allclose(np.delete(gates[:, :4], new, axis=1), w_WM)
        np.testing.assert_allclose(gates[:, 4:5], BridgeRule().gates(w_WM)[:, 3:])
        np.testing.assert_allclose(gates[:, 5], 0)
        np.testing.assert_allclose(ExtendedRule(new=new, stage="old").gates(whole), BridgeRule().gates(w_WM))
        np.testing.assert_allclose(ExtendedRule(new=new).gates(np.eye(4))[:, 4:], 0, atol=1e-12)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    task, learner = small_task(rho=-0.4, objective_count=3), quick_learner(steps=40)
    method = METHODS.build({"name": "extended", "new": "objective_2"})
    return task, learner, method, train_plan(method, task, learner, tmp_path_factory.mktemp("extended"), seed=0)


def test_the_old_family_knows_nothing_of_the_added_objective(trained):
    """Its bridge is trained before there is an expert for it, on preferences that give it no weight."""
    task, learner, method, done = trained
    first = method.plan(task, learner, {}, 0)
    assert [spec.preference for spec in first] == [(1, 0, 0), (0, 0, 1)]
    *_, old, added, new = method.plan(task, learner, done, 0)
    assert old.active_objectives == (0, 2)
    assert added.preference == (0, 1, 0)
    assert added.key not in old.parents
    assert new.active_objectives is None
    assert len(new.frozen_adapters) == 4
    assert len(done) == 5


def test_nothing_old_is_lost_and_the_whole_simplex_is_served(trained):
    task, learner, method, done = trained
    family = method.policy(task, learner, done, 0)
    specs = method.plan(task, learner, done, 0)
    old = LoraBank.load(task.load()[0], {spec.key: done[spec.key].path for spec in specs[:3]})
    before = ExactReturns(task, ParameterMix(old, family.policy.tokenizer), "train")
    face_WM = np.array([[0.3, 0.0, 0.7], [0.8, 0.0, 0.2]])
    after = ExactReturns(task, family.policy, "train").at(family.gates(face_WM)).rewards_WSM
    np.testing.assert_allclose(after, before.at(ExtendedRule(new=1, stage="old").gates(face_WM)).rewards_WSM, atol=1e-6)
    soup = METHODS.build({"name": "experts", "mixing": "parameter"}).policy(task, learner, done, 0)
    worst = {
        name: evaluate(task, one, splits=["train"]).metrics["splits"]["train"]["attainment"]["worst"]
        for name, one in (("extended", family), ("soup", soup))
    }
    assert worst["extended"] > worst["soup"] + 0.1


def test_a_saved_family_answers_alike(trained, tmp_path):
    task, learner, method, done = trained
    family = method.policy(task, learner, done, 0)
    family.save(tmp_path / "family")
    assert Family.load(tmp_path / "family").gates(task.judged()).tolist() == family.gates(task.judged()).tolist()


def test_what_a_user_can_get_wrong():
    with pytest.raises(ConfigError, match="new is an objective"):
        METHODS.build({"name": "extended", "new": "speed"}).plan(small_task(objective_count=3, rho=0.0), quick_learner(), {}, 0)
    with pytest.raises(ConfigError, match="effort is positive"):
        METHODS.build({"name": "extended", "effort": -1})
