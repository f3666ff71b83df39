"""Methods beyond plain experts: what they train, their gates, that they keep every promise, and that a saved family is the same one."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.methods.soups import BoneSoup
from paretune.policy.family import Family
from paretune.policy.returns import ExactReturns
from paretune.policy.rules import Backbones
from paretune.registry import GATE_RULES, METHODS, describe
from paretune.testing.methods import check_method, quick_learner, train_plan

ON_EXPERTS = ["mod-divergence", "rmod", "hidden-layer", "ties", "dare"]


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8)


@pytest.fixture(scope="module")
def learner():
    return quick_learner(steps=20)


@pytest.fixture(scope="module")
def done(task, learner, tmp_path_factory):
    """Experts and backbones."""
    folder = tmp_path_factory.mktemp("artifacts")
    return {**train_plan(METHODS.build("experts"), task, learner, folder / "experts", seed=0),
            **train_plan(METHODS.build("bone-soup"), task, learner, folder / "bones", seed=0)}  # fmt: skip


def build(task, learner, done, name, **fields):
    return METHODS.build({"name": name, **fields}).policy(task, learner, done, 0)


def refused(*parts: str):
    return pytest.raises(ConfigError, match=".*".join(f"(?s:.*){re.escape(part)}" for part in parts))


@pytest.mark.parametrize(
    "method",
    [
        *ON_EXPERTS,
        "bone-soup",
        {"name": "mod-divergence", "divergence": "js"},
        {"name": "rmod", "radius": 0.3},
        {"name": "dare", "signs": True},
        {"name": "bone-soup", "mixing": "logit"},
    ],
    ids=lambda m: m if isinstance(m, str) else "-".join(str(v) for v in m.values()),
)
def test_promises_are_kept(method):
    check_method(method)


def test_they_share_the_experts(task, learner):
    experts = [spec.key for spec in METHODS.build("experts").plan(task, learner, {}, 0)]
    for name in ON_EXPERTS:
        assert [spec.key for spec in METHODS.build(name).plan(task, learner, {}, 0)] == experts
    assert not set(experts) & {spec.key for spec in METHODS.build("bone-soup").plan(task, learner, {}, 0)}
    assert experts == [spec.key for spec in METHODS.build({"name": "bone-soup", "share": 1.0}).plan(task, learner, {}, 0)]


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("hidden-layer", {"layer": 0}),
        ("mod-divergence", {"divergence": "alpha", "alpha": 0.25}),
        ("rmod", {"radius": 0.5}),
        ("ties", {"density": 0.3}),
        ("dare", {"mask_seed": 3}),
        ("bone-soup", {}),
    ],
)
def test_a_saved_family_is_the_same_policy(task, learner, done, tmp_path, name, fields):
    """Settings of a level included: at the level's own defaults the policy would be another."""
    family = build(task, learner, done, name, **fields)
    family.save(tmp_path / "family")
    loaded = Family.load(tmp_path / "family")
    gates_K = family.gates(np.array([[0.3, 0.7]]))[0]
    one, two, other = (ExactReturns(task, f.policy, "test") for f in (family, loaded, build(task, learner, done, "experts")))
    assert loaded.policy.settings == family.policy.settings
    assert np.array_equal(one.logp_PR(gates_K), two.logp_PR(gates_K))
    assert not np.allclose(one.logp_PR(gates_K), other.logp_PR(gates_K), atol=1e-3)


def test_ends_of_hidden_layer_are_the_soup_and_logit_mixing(task, learner, done):
    def curve(name, **fields):
        return evaluate(task, build(task, learner, done, name, **fields), splits=["test"]).curves["test"].returns_WSM

    assert curve("hidden-layer", layer=0) == pytest.approx(curve("experts", mixing="parameter"), abs=1e-5)
    assert curve("hidden-layer", layer=task.layers) == pytest.approx(curve("experts", mixing="logit"), abs=1e-5)
    with refused("hidden states are mixed at a layer from 0", "layer = 2", "this model has 1 layers"):
        build(task, learner, done, "hidden-layer", layer=2)
    with refused("method hidden-layer: layer is at least 0", "layer = -1"):
        build(task, learner, done, "hidden-layer", layer=-1)


def test_rmod_helps_the_objective_that_is_worst_off(task, learner, done):
    """Where logit mixing leans to one objective, the worst case leans back; and it answers every preference alike."""
    w_WM = np.array([[0.95, 0.05], [0.05, 0.95]])
    plain, robust = (
        evaluate(task, build(task, learner, done, name), w_WM=w_WM, splits=["train"]).curves["train"].returns_WSM.mean(1)
        for name in ("experts", "rmod")
    )
    assert robust[0] == pytest.approx(robust[1], abs=1e-6)
    assert robust.min() > plain.min(1).max()


# Bone soups


@pytest.mark.parametrize("count", [2, 3, 5])
def test_gates_bring_the_backbones_to_the_preference(count):
    points_KM = BoneSoup(share=0.7).points_KM(count)
    assert points_KM.sum(1) == pytest.approx(np.ones(count))
    assert np.diagonal(points_KM) == pytest.approx([0.7] * count)
    rule = Backbones(points_KM=tuple(map(tuple, points_KM.tolist())))
    w_WM = np.random.default_rng(0).dirichlet(np.ones(count), size=7)
    gates_WK = rule.gates(w_WM)
    assert gates_WK @ points_KM == pytest.approx(w_WM)
    assert gates_WK.sum(1) == pytest.approx(np.ones(7))
    assert rule.gates(points_KM) == pytest.approx(np.eye(count), abs=1e-12)
    assert rule.gates(np.eye(count)).min() < 0, "a vertex is outside of what the backbones span"
    more = Backbones(points_KM=rule.points_KM, extrapolation=0.5)
    assert more.gates(w_WM) == pytest.approx(1.5 * gates_WK)
    assert GATE_RULES.build(json.loads(json.dumps(describe(more)))) == more


def test_gates_for_two_objectives_in_closed_form():
    """x_1 = (w_1 - (1 - b)) / (2 b - 1)."""
    w_WM = np.array([[1.0, 0.0], [0.5, 0.5], [0.2, 0.8]])
    for b in (0.6, 0.8):
        gates_WK = Backbones(points_KM=((b, 1 - b), (1 - b, b))).gates(w_WM)
        assert gates_WK[:, 0] == pytest.approx((w_WM[:, 0] - (1 - b)) / (2 * b - 1))


def test_plain_experts_are_the_bone_soup_of_share_1(task, learner, done):
    bones, experts = build(task, learner, done, "bone-soup", share=1.0), build(task, learner, done, "experts", mixing="parameter")
    w_WM = np.array([[0.3, 0.7]])
    assert bones.gates(w_WM) == pytest.approx(w_WM)
    one, two = (ExactReturns(task, f.policy, "test").logp_PR(w_WM[0]) for f in (bones, experts))
    assert one == pytest.approx(two, abs=1e-6)


def test_bone_soups_train_away_from_what_is_judged():
    for count in (2, 3, 5):
        judged_WM = small_task(objective_count=count, rho=0.0).judged()
        for share in (0.6, 0.7, 0.8):
            points_KM = BoneSoup(share=share).points_KM(count)
            assert np.abs(points_KM[:, None] - judged_WM[None]).max(-1).min() > 0.005


def test_backbones_that_span_nothing_are_refused(task, learner):
    with refused("method bone-soup: share is above 1 / M and at most 1", "share = 0.5 for 2 objectives"):
        METHODS.build({"name": "bone-soup", "share": 0.5}).plan(task, learner, {}, 0)
    with refused("none is a mixture of the others", "2 points for 2 objectives"):
        Backbones(points_KM=((0.5, 0.5), (0.5, 0.5)))
    with refused("one preference per objective", "1 points for 2 objectives"):
        Backbones(points_KM=((0.5, 0.5),))
    with refused("extrapolation is above -1", "extrapolation = -1"):
        Backbones(points_KM=((0.7, 0.3), (0.3, 0.7)), extrapolation=-1.0)
