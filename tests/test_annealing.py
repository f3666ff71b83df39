"""The annealed price of KL, and preferences on faces of the simplex: closed forms, and what they are for."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from learner_cases import SMALL, TASK, moved, spec_of
from paretune.errors import ConfigError
from paretune.evaluation.metrics import utility_losses
from paretune.methods.conditioned import Conditioned
from paretune.policy.returns import ExactReturns
from paretune.registry import TASKS, describe
from paretune.tasks.preferences import judged_preferences
from paretune.training.batch import preferences
from paretune.training.learners.base import annealed
from paretune.training.learners.exact import ExactGradient
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import Artifact


def test_the_price_falls_by_equal_factors_to_the_tasks_own():
    assert [annealed(16.0, done) for done in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)] == pytest.approx([16, 8, 4, 2, 1, 1])
    assert annealed(1.0, 0.3) == 1.0


@pytest.mark.parametrize(("step", "price"), [(0, 8.0), (4, 8**0.5), (8, 1.0), (9, 1.0)])
def test_the_exact_learner_climbs_at_the_price_of_its_step(step, price):
    learner = ExactGradient(rank=2, steps=10, anneal=8.0)
    policy, w_M = moved(learner), np.array([0.3, 0.7])
    value, reward_M, kl, _ = learner.update(policy, learner.new_optimizer(policy.parameters()), TASK, spec_of(learner), step)
    assert kl > 0.01
    assert value == pytest.approx(w_M @ reward_M - price * TASK.beta * kl, abs=1e-9)


def test_the_sampled_learner_climbs_at_the_price_of_its_step():
    def advantage_N(anneal, step):
        learner = PolicyGradient(**SMALL, anneal=anneal)
        return learner.collect(moved(learner), TASK, spec_of(learner), step).advantage_N

    plain_N, twice_N, more_N = (advantage_N(anneal, 0) for anneal in (1.0, 2.0, 5.0))
    assert np.abs(twice_N - plain_N).max() > 0.01
    assert more_N - plain_N == pytest.approx(4 * (twice_N - plain_N)), "linear in the price"
    at_half_N = {anneal: advantage_N(anneal, 2) for anneal in (1.0, 5.0, 256.0)}
    off_N, of_eight_N = (at_half_N[anneal] - at_half_N[1.0] for anneal in (5.0, 256.0))  # 256 ** (1 - .5 / .8) is 8
    assert off_N == pytest.approx((5.0 ** (1 - 0.5 / 0.8) - 1) * of_eight_N / 7), "at half of four steps"
    with pytest.raises(ConfigError, match="anneal"):
        PolicyGradient(**SMALL, anneal=2.0, kl_in="loss", kl_estimator="k3")


@pytest.mark.parametrize("count", [2, 3, 6])
def test_a_share_of_preferences_lies_on_faces_and_the_others_stay(count):
    learner = ExactGradient(faces=0.5)
    plain_NM = preferences(spec_of(ExactGradient(), None), 3, 64, count)
    some_NM = preferences(spec_of(learner, None), 3, 64, count)
    assert some_NM == pytest.approx(preferences(spec_of(learner, None), 3, 64, count))
    moved_N = (some_NM != plain_NM).any(1)
    assert moved_N.sum() == 32
    assert some_NM.sum(1) == pytest.approx(np.ones(64))
    assert (some_NM >= 0).all()
    faces_N = (some_NM[moved_N] > 0).sum(1)
    assert set(faces_N) == set(range(1, count)), "of every dimension but the whole"
    assert ((some_NM[moved_N] > 0).any(0)).all(), "and of every objective"
    assert np.abs(some_NM[:, None] - judged_preferences(count)).max(-1).min() > 0.005


def test_objectives_that_take_no_part_get_no_weight():
    some_NM = preferences(spec_of(ExactGradient(faces=1.0), None, active_objectives=(0, 2)), 0, 16, 3)
    assert (some_NM[:, 1] == 0).all()
    assert set(map(tuple, some_NM)) == {(1.0, 0.0, 0.0), (0.0, 0.0, 1.0)}


def test_neither_moves_a_key():
    assert not {"anneal", "faces"} & (set(describe(ExactGradient())) | set(describe(PolicyGradient())))


@pytest.mark.usefixtures("one_thread")
def test_a_small_price_makes_a_policy_settle_before_it_has_seen_what_is_best(tmp_path):
    """The fruit tree of depth 5: the same steps reach more of what is possible where the price of KL comes down from above."""
    recorded = json.loads((Path(__file__).parents[1] / "benchmarks" / "recorded.json").read_text(encoding="utf-8"))
    w_WM = np.array(recorded["equally_spaced_weights_6_50"])
    task = TASKS.build({"name": "fruit-tree", "length": 5, "prompt_count": 8, "width": 32, "layers": 1})
    best_W, share = (w_WM @ task.leaves_LM.T).max(1), {}
    plain = ExactGradient(rank=4, steps=100)
    for learner in (plain, replace(plain, anneal=100.0, faces=0.5)):
        method = Conditioned(structure="bridge")
        (spec,) = method.plan(task, learner, {}, 0)
        folder = tmp_path / spec.key
        learner.train(spec, task, folder)
        family = method.policy(task, learner, {spec.key: Artifact(spec.key, folder, spec)}, 0)
        points_WM = ExactReturns(task, family.policy, "train").at(family.rule.gates(w_WM)).rewards_WSM.mean(1)
        share[learner.anneal] = 1 - utility_losses(points_WM, w_WM, best_W)[0] / best_W.mean()
    assert share[100.0] > share[1.0] + 0.02  # .045 to more, by what the instruction set rounds
