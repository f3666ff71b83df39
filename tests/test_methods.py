"""The shipped methods: which trainings they share, what their families are at the vertices, and the published outer level."""

import dataclasses
import json

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError
from paretune.evaluation.evaluate import evaluate
from paretune.methods.base import CATEGORIES
from paretune.methods.emorl import outer_score
from paretune.methods.search import hierarchical_grid
from paretune.policy.base import build_policy
from paretune.policy.family import Family
from paretune.policy.returns import ExactReturns, SampledReturns
from paretune.policy.rules import Table
from paretune.registry import LEARNERS, METHODS, describe
from paretune.seeds import seed_for
from paretune.tasks.exact.task import ExactTask
from paretune.testing.methods import quick_learner, train_plan
from paretune.training.cost import Cost

SHIPPED = {"reference", "expert", "uniform", "linear", "experts", "emorl", "emorl-shared"}


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8)


@pytest.fixture(scope="module")
def learner():
    return quick_learner(steps=40)


@pytest.fixture(scope="module")
def done(task, learner, tmp_path_factory):
    """The experts and one training between them: what most methods below are made of."""
    return train_plan(METHODS.build({"name": "linear", "points": 2}), task, learner, tmp_path_factory.mktemp("artifacts"), seed=0)


def keys(name, task, learner, seed=0, **fields):
    return [s.key for s in METHODS.build({"name": name, **fields}).plan(task, learner, {}, seed)]


def test_every_shipped_method_is_registered_with_a_full_card():
    assert set(METHODS) >= SHIPPED
    for name in SHIPPED:
        card = METHODS[name].card
        assert card.category in CATEGORIES
        assert all(getattr(card, f.name) not in ("", None) for f in dataclasses.fields(card))


def test_methods_share_trainings(task, learner):
    experts = keys("experts", task, learner)
    assert keys("emorl-shared", task, learner) == experts
    assert keys("linear", task, learner)[:2] == experts
    assert [keys("expert", task, learner, objective=k)[0] for k in (0, 1)] == experts
    assert keys("expert", task, learner, objective="objective_2") == keys("expert", task, learner, objective="1") == experts[1:]
    for mixing in ("parameter", "factor", "logit", "hidden"):
        assert keys("experts", task, learner, mixing=mixing) == experts
    assert keys("reference", task, learner) == []
    assert not set(keys("uniform", task, learner)) & set(experts)
    assert not set(keys("experts", task, learner, seed=1)) & set(experts)


def test_linear_trains_away_from_what_is_judged():
    """The default lattice keeps the sampler's distance to the judged preferences; points = 0 is dedicated training at them."""
    for count in (2, 3):
        task = small_task(objective_count=count, rho=0.0)
        judged_WM = task.judged()
        lattice_KM = METHODS.build("linear").preferences(task)
        assert np.abs(lattice_KM[:, None] - judged_WM[None]).max(-1).min() > 0.005
        assert (METHODS.build({"name": "linear", "points": 0}).preferences(task) == judged_WM).all()
    assert len(METHODS.build("linear").preferences(small_task())) == 6


def test_emorl_sets_the_published_stopping_rule_where_there_is_one(task, learner):
    offline = LEARNERS.build("trl")
    assert keys("emorl", task, offline) == keys("emorl-shared", task, offline), "without a stopping rule it trains as it always does"
    method = METHODS.build("emorl")
    assert [s.learner["stop_cv"] for s in method.plan(task, learner, {}, 0)] == [0.015, 0.015]
    assert [s.learner["stop_cv"] for s in METHODS.build("emorl-shared").plan(task, learner, {}, 0)] == [learner.stop_cv] * 2
    sampled = LEARNERS.build("pg")
    assert [s.learner["stop_cv"] for s in method.plan(task, sampled, {}, 0)] == [0.015, 0.015]


@pytest.mark.parametrize("mixing", ["parameter", "factor", "logit", "hidden"])
def test_at_a_vertex_every_mixer_is_that_expert(task, learner, done, mixing):
    family = METHODS.build({"name": "experts", "mixing": mixing}).policy(task, learner, done, 0)
    mixed = evaluate(task, family, w_WM=np.eye(2), splits=["test"]).curves["test"]
    for k in (0, 1):
        alone = METHODS.build({"name": "expert", "objective": k}).policy(task, learner, done, 0)
        curve = evaluate(task, alone, w_WM=np.eye(2), splits=["test"]).curves["test"]
        assert mixed.rewards_WSM[k] == pytest.approx(curve.rewards_WSM[0], abs=1e-5)
        assert mixed.kl_WS[k] == pytest.approx(curve.kl_WS[0], abs=1e-5)
        assert curve.rewards_WSM[0] == pytest.approx(curve.rewards_WSM[1], abs=0), "a single policy does not hear the preference"
    assert not np.allclose(mixed.rewards_WSM[0], mixed.rewards_WSM[1], atol=1e-3)


def test_trained_experts_climb_and_hidden_equals_logit(task, learner, done):
    curves = {}
    for mixing in ("logit", "hidden", "parameter"):
        family = METHODS.build({"name": "experts", "mixing": mixing}).policy(task, learner, done, 0)
        got = evaluate(task, family)
        curves[mixing] = got.curves["train"]
        loss = got.metrics["splits"]["train"]["loss"]
        assert max(loss["experts"]) < 0.6, "40 exact steps of rank 4 are well above the reference"
        assert (loss["composition"] is None) == (mixing == "parameter")
    assert curves["hidden"].rewards_WSM == pytest.approx(curves["logit"].rewards_WSM, abs=1e-5)
    assert not np.allclose(curves["parameter"].rewards_WSM, curves["logit"].rewards_WSM, atol=1e-3)


def test_linear_answers_with_the_nearest_policy(task, learner, done):
    family = METHODS.build({"name": "linear", "points": 2}).policy(task, learner, done, 0)
    assert family.gates(np.array([[0.9, 0.1], [0.2, 0.8]])).tolist() == [[1, 0], [0, 1]]
    assert family.policy.forwards_per_token == 1
    assert family.meta["trained_at_judged"] == 0


def test_the_reference_has_no_adapters(task, learner):
    family = METHODS.build("reference").policy(task, learner, {}, 0)
    assert family.gates(task.judged()).shape == (11, 0)
    assert abs(evaluate(task, family).metrics["splits"]["train"]["attainment"]["mean"]) < 1e-4


@pytest.fixture(scope="module")
def emorl(task, learner, done):
    return METHODS.build("emorl-shared").policy(task, learner, done, 0)


def test_emorl_searches_J_w_of_hidden_state_mixing(task, learner, done, emorl):
    """The gates found are those of the published search over J_w, measured here by evaluation and not by the method's own score."""
    w = np.array([0.3, 0.7])
    policy = build_policy(task, "hidden", emorl.adapters)
    returns = ExactReturns(task, policy, "train")

    def J_w(gates_K):
        measured = returns.at(gates_K[None])
        rewards_1PM, kl_1P = measured.rewards_WSM, measured.kl_WS
        return float(w @ (rewards_1PM[0] - task.beta * kl_1P[0][:, None]).mean(0))

    expected = hierarchical_grid(J_w, 2)
    assert emorl.gates(w[None])[0].tolist() == expected.best_K.tolist()
    best = evaluate(task, emorl, w_WM=w[None], splits=["train"])
    assert best.metrics["splits"]["train"]["utility"]["mean"] == pytest.approx(expected.value, abs=1e-6)
    assert best.cost.evaluations == 45
    assert best.cost.validation_samples == 0, "exact scores draw nothing"
    assert best.cost.seconds > 0


def test_emorl_is_no_worse_than_equal_weights_on_training_prompts(task, learner, done, emorl):
    """(.5, .5) is a point of the first grid, and the best point ever seen is kept."""
    w = np.array([[0.5, 0.5]])
    plain = METHODS.build({"name": "experts", "mixing": "hidden"}).policy(task, learner, done, 0)
    searched, equal = (evaluate(task, f, w_WM=w, splits=["train"]).metrics["splits"]["train"]["utility"]["mean"] for f in (emorl, plain))
    assert searched >= equal - 1e-9


def test_emorl_pays_for_every_preference_once(task, learner, done):
    family = METHODS.build("emorl-shared").policy(task, learner, done, 0)
    w = np.array([[0.3, 0.7], [0.6, 0.4], [0.3, 0.7]])
    first = evaluate(task, family, w_WM=w, splits=["train"]).cost
    assert first.evaluations == 2 * 45
    again = evaluate(task, family, w_WM=w, splits=["train", "test"]).cost
    assert again == first, "the cost of an answer does not depend on what was asked before"
    assert family.cost(w[:1]).evaluations == 45


def test_emorl_is_saved_as_a_table(task, learner, done, emorl, tmp_path):
    w = np.array([[0.3, 0.7], [0.9, 0.1]])
    gates = emorl.gates(w)
    emorl.save(tmp_path / "family")
    card = json.loads((tmp_path / "family" / "family.json").read_text())
    assert card["rule"]["name"] == "table"
    loaded = Family.load(tmp_path / "family")
    assert isinstance(loaded.rule, Table)
    assert np.array_equal(loaded.gates(w), gates)
    assert np.array_equal(loaded.gates(w + np.array([0.01, -0.01])), gates), "elsewhere the nearest row"
    assert evaluate(task, loaded, w_WM=w, splits=["train"]).cost == Cost()


def test_emorl_saved_before_any_question_answers_the_judged_preferences(task, learner, done, tmp_path):
    family = METHODS.build({"name": "emorl-shared", "levels": 1}).policy(task, learner, done, 0)
    family.save(tmp_path / "family")
    assert np.array_equal(Family.load(tmp_path / "family").rule.w_WM, task.judged())


def test_emorl_variants(task, learner, done):
    w = np.array([[0.3, 0.7]])
    simplex = METHODS.build({"name": "emorl-shared", "search": "simplex", "cache": True}).policy(task, learner, done, 0)
    assert simplex.gates(w).sum() == 1
    assert simplex.cost(w).evaluations == 7
    cached = METHODS.build({"name": "emorl-shared", "cache": True}).policy(task, learner, done, 0)
    published = METHODS.build("emorl-shared").policy(task, learner, done, 0)
    assert np.array_equal(cached.gates(w), published.gates(w))
    assert cached.cost(w).evaluations < 45 == published.cost(w).evaluations


def test_product_score_by_hand(task, learner, done, emorl):
    policy = build_policy(task, "hidden", emorl.adapters)
    gates, w = np.array([0.5, 1.0]), np.array([0.25, 0.75])
    got = outer_score(task, policy, kind="product", samples=1, seed=0)(gates, w)
    p_PR = np.exp(ExactReturns(task, policy, "train").logp_PR(gates))
    logs_PR = np.log(np.clip(task.rewards_PRM("train"), 1e-4, 1 - 1e-4)) @ w
    assert got == pytest.approx((p_PR * logs_PR).sum(1).mean(), abs=1e-9)
    product = METHODS.build({"name": "emorl-shared", "score": "product"}).policy(task, learner, done, 0)
    assert product.cost(w[None]).evaluations == 45


class NotExact(ExactTask):
    """The same task, for methods that are not told that it can be enumerated."""

    registered_name = "not-exact"
    is_exact = False


def test_emorl_on_samples(task, learner, done):
    """The sampled score agrees with the exact one (4.5 standard errors, false alarm below 1e-5) and is the same at every call."""
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    adapters = {f"expert-{k}": a.path for k, a in enumerate(done.values())}
    policy = build_policy(task, "hidden", adapters)
    gates, w = np.array([0.5, 0.5]), np.array([0.9, 0.1])
    sampled = outer_score(blind, policy, kind="linear", samples=800, seed=5)
    exact = outer_score(task, policy, kind="linear", samples=1, seed=0)(gates, w)
    drawn = SampledReturns(task, policy, "train", samples=800, seed=seed_for(5, "outer level")).at(gates[None])
    spread = ((drawn.rewards_WSM[0] - task.beta * drawn.kl_WS[0][:, None]) @ w).std() / np.sqrt(800)
    assert abs(sampled(gates, w) - exact) < 4.5 * spread
    assert sampled(gates, w) == sampled(gates, w)
    family = dataclasses.replace(METHODS.build("emorl-shared"), samples=8, levels=1).policy(
        blind, learner, _renamed(blind, learner, done), 0
    )
    cost = family.cost(w[None])
    assert (cost.evaluations, cost.validation_samples) == (9, 72)


def test_emorl_leaves_out_what_is_unscored(task, done, monkeypatch):
    """A judge that fails at one response in sixteen costs that response; one that fails at one in eight costs the point."""
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    policy = build_policy(task, "hidden", {f"expert-{k}": a.path for k, a in enumerate(done.values())})
    gates, w, plain, every = np.array([0.5, 0.5]), np.array([0.9, 0.1]), NotExact.score, [64]

    def score(self, prompts, texts):
        rewards_NM = plain(self, prompts, texts)
        rewards_NM[:: every[0], 0] = np.nan
        return rewards_NM

    def found():
        return outer_score(blind, policy, kind="linear", samples=64, seed=5)(gates, w)

    drawn = SampledReturns(blind, policy, "train", samples=64, seed=seed_for(5, "outer level")).at(gates[None])
    monkeypatch.setattr(NotExact, "score", score)
    every[0] = 16
    known = np.arange(64) % 16 > 0
    assert found() == pytest.approx((drawn.rewards_WSM[0][known] @ w).mean() - task.beta * drawn.kl_WS[0].mean())
    every[0] = 8
    assert np.isnan(found())


@pytest.mark.parametrize("kind", ["linear", "product"])
def test_emorl_scores_a_preference_whose_own_objectives_are_scored(task, done, monkeypatch, kind):
    """An objective without weight may be unscored everywhere: the score is that of the objective asked for, and no response is dropped."""
    blind = NotExact(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    policy, plain = build_policy(task, "hidden", {f"expert-{k}": a.path for k, a in enumerate(done.values())}), NotExact.score
    gates, w = np.array([0.5, 0.5]), np.array([1.0, 0.0])

    def found(w):
        return outer_score(blind, policy, kind=kind, samples=64, seed=5)(gates, w)

    before = found(w)
    monkeypatch.setattr(NotExact, "score", lambda self, *given: plain(self, *given) * [1, np.nan])
    assert found(w) == before
    assert np.isnan(found(np.array([0.9, 0.1])))


def _renamed(task, learner, done):
    """The same artifacts under the keys of another task."""
    specs = METHODS.build("experts").plan(task, learner, {}, 0)
    return {spec.key: artifact for spec, artifact in zip(specs, done.values(), strict=True)}


def test_families_say_what_they_are(task, learner, done):
    family = METHODS.build("experts").policy(task, learner, done, 0)
    assert family.meta["method"] == describe(METHODS.build("experts"))
    assert family.meta["card"]["category"] == "meta-policy"
    assert family.experts == (0, 1)
    assert family.max_new_tokens == task.max_new_tokens
    json.dumps(family.meta, allow_nan=False)
    assert list(family.adapters) == ["expert-objective_1", "expert-objective_2"]


def test_bad_fields(task, learner):
    for given, message in (
        ({"name": "expert", "objective": "objetive_1"}, "did you mean 'objective_1'"),
        ({"name": "expert", "objective": 2}, "its number from 0 to 1"),
        ({"name": "expert", "objective": -1}, "its number from 0 to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            METHODS.build(given).plan(task, learner, {}, 0)
    for given, message in (
        ({"name": "linear", "points": 1}, "points is 0"),
        ({"name": "experts", "mixing": "logits"}, "mixing"),
        ({"name": "emorl", "score": "sum"}, "score"),
        ({"name": "emorll"}, "did you mean 'emorl'"),
    ):
        with pytest.raises(ConfigError, match=message):
            METHODS.build(given)
