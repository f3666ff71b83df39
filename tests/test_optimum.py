"""The exact optimum of a utility: no policy exceeds it, pi*_lambda reaches it, and the bound follows from definitions alone."""

import dataclasses

import numpy as np
import pytest

from oracles import small_task
from paretune.errors import ConfigError
from paretune.objectives.utilities import Constrained, LogProduct, LogSum, MaxMin, Tchebycheff
from paretune.seeds import generator
from paretune.tasks.exact.optimum import MAX_GAP, landmarks, least_shortfall, optimum, refuse_unreachable
from paretune.tasks.exact.task import ExactTask

SMOOTH = [Tchebycheff(), Tchebycheff(mu=0.1, ideal=(1.0, 1.0)), LogSum(), LogSum(base=(0.3, 0.3))]
KINKED = [MaxMin(), MaxMin(base=(0.45, 0.5))]
SOME = [np.array(w) for w in ((0.5, 0.5), (0.2, 0.8), (0.93, 0.07))]


@pytest.fixture(scope="module")
def task():
    return small_task(rho=-0.8, seed=2)


def along_the_front(task, split):
    first = np.linspace(0, 1, 2001)
    return task.front(split, np.stack([first, 1 - first], axis=1)).points_KM


@pytest.mark.parametrize("utility", SMOOTH + KINKED, ids=repr)
@pytest.mark.parametrize("split", ["train", "test"])
def test_it_is_the_best_point_of_a_fine_front(task, utility, split):
    """A second implementation for two objectives: every pi*_lambda of a grid. The best of the grid is below the optimum, but only just."""
    points_KM, marks = along_the_front(task, split), landmarks(task, split)
    for w_M in SOME:
        found = optimum(task, split, utility, w_M)
        best = utility.value(points_KM, w_M, marks).max()
        assert -1e-9 <= found.value - best < 2e-5 * (20 if utility in KINKED else 1)
        assert 0 <= found.gap <= MAX_GAP
        np.testing.assert_allclose(found.J_M, task.J_M(task.optimum_logp_PR(found.weights_M, split), split), atol=1e-12)


@pytest.mark.parametrize("margin", [-0.01, 0.0])
def test_constraints_are_kept_and_paid_for(task, margin):
    utility, marks = Constrained(margin=margin), landmarks(task)
    points_KM = along_the_front(task, "train")
    for w_M in SOME:
        found = optimum(task, "train", utility, w_M)
        assert utility.violation(found.J_M, marks) < 1e-8
        kept_K = utility.violation(points_KM, marks) == 0
        best = (points_KM[kept_K] @ w_M).max()
        assert -1e-9 <= found.value - best < 1e-3, "a grid point next to the constraint is a little below it"
        prices_M = found.multipliers_M - w_M
        assert (prices_M > -1e-12).all()
        assert abs(prices_M @ (found.J_M - marks.reference_M - margin)) < 1e-6, "only what binds has a price"
    assert (optimum(task, "train", utility, SOME[2]).multipliers_M - SOME[2]).max() > 0.05, "here one binds"


@pytest.mark.parametrize("utility", [Tchebycheff(), LogSum(), MaxMin(), Constrained()], ids=repr)
def test_the_gap_follows_from_the_definitions(utility):
    """For any weights lambda and any policy: U(J) <= U(x) + lambda . (J - x) <= U(x) + h(lambda) - lambda . x, lambda a supergradient at x.

    Three objectives; h is taken from the task's own front, not from the solver's support function.
    """
    task = small_task(objective_count=3, rho=-0.3)
    marks = landmarks(task)
    for w_M in (np.full(3, 1 / 3), np.array([0.6, 0.39, 0.01])):
        found = optimum(task, "train", utility, w_M)
        lambda_M = found.multipliers_M
        support = lambda_M.sum() * found.weights_M @ task.front("train", found.weights_M[None]).points_KM[0]
        if utility.smooth:
            np.testing.assert_allclose(lambda_M, utility.gradient(found.J_M, w_M, marks), rtol=1e-3, atol=1e-7)
        if isinstance(utility, Constrained):
            bound = support - (lambda_M - w_M) @ utility.thresholds_M(marks)
        elif isinstance(utility, MaxMin):
            assert (lambda_M * 3 * w_M).sum() == pytest.approx(1)
            bound = support - lambda_M @ marks.reference_M
        else:
            bound = float(utility.value(found.J_M, w_M, marks)) + support - lambda_M @ found.J_M
        assert bound - found.value <= MAX_GAP


def random_policies(task, split, n=60):
    rng = generator(0, "policies")
    for i in range(n):
        noise_PR = rng.normal(0, (0.1, 1.0, 3.0)[i % 3], task.reference_logp_PR(split).shape)
        start_M = rng.dirichlet(np.ones(task.objectives.count))
        logp_PR = (task.optimum_logp_PR(start_M, split) if i % 2 else task.reference_logp_PR(split)) + noise_PR
        yield logp_PR - np.logaddexp.reduce(logp_PR, axis=1, keepdims=True)


def test_no_policy_exceeds_it(task):
    for w_M in SOME:
        best = {repr(u): optimum(task, "train", u, w_M).value for u in SMOOTH + KINKED}
        for logp_PR in random_policies(task, "train", 20):
            J_M = task.J_M(logp_PR, "train")
            for utility in SMOOTH + KINKED:
                assert utility.value(J_M, w_M, landmarks(task)) <= best[repr(utility)] + MAX_GAP


def test_the_product_of_responses_has_a_closed_form(task):
    utility, w_M, marks = LogProduct(), SOME[1], landmarks(task)
    best = optimum(task, "train", utility, w_M)
    scores_PR = utility.scores(task.rewards_PRM("train"), w_M, marks)

    def value(logp_PR):
        return ((np.exp(logp_PR) * scores_PR).sum(1) - task.beta * task.returns(logp_PR, "train")[1]).mean()

    assert all(value(logp_PR) <= best.value + 1e-9 for logp_PR in random_policies(task, "train"))
    tilt_PR = task.reference_logp_PR("train") + scores_PR / task.beta
    assert value(tilt_PR - np.logaddexp.reduce(tilt_PR, axis=1, keepdims=True)) == pytest.approx(best.value, abs=1e-9)


@pytest.mark.parametrize("utility", [Tchebycheff(), LogSum(), MaxMin()], ids=repr)
def test_at_a_vertex_it_is_the_expert(task, utility):
    for e_M in np.eye(2):
        found = optimum(task, "train", utility, e_M)
        np.testing.assert_allclose(found.weights_M, e_M, atol=1e-9)
        np.testing.assert_allclose(found.J_M @ e_M, landmarks(task).ideal_M @ e_M, atol=1e-9)


class Swapped(ExactTask):
    def rewards_PRM(self, split):
        return np.ascontiguousarray(super().rewards_PRM(split)[:, :, ::-1])


@pytest.mark.parametrize("utility", [Tchebycheff(), LogSum(), MaxMin(), Constrained(margin=-0.02), LogProduct()], ids=repr)
def test_permuting_objectives_permutes_the_optimum(task, utility):
    swapped = Swapped(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    one, two = optimum(task, "train", utility, SOME[1]), optimum(swapped, "train", utility, SOME[1][::-1])
    assert one.value == pytest.approx(two.value, abs=1e-8)
    np.testing.assert_allclose(one.J_M, two.J_M[::-1], atol=1e-5)


def test_contradictory_thresholds_are_refused_with_the_bound(task):
    ideal_M = landmarks(task).ideal_M
    greedy = Constrained(thresholds=tuple(ideal_M - 0.01))
    with pytest.raises(ConfigError, match="some policy meets all thresholds at once") as error:
        optimum(task, "train", greedy, SOME[0])
    short = least_shortfall(task, "train", ideal_M - 0.01)
    assert f"misses one of them by {short:.4f}" in str(error.value)
    best = (along_the_front(task, "train") - ideal_M + 0.01).min(1).max()
    assert short == pytest.approx(-best, abs=1e-4)
    refuse_unreachable(task, "train", Constrained(thresholds=tuple(ideal_M - 0.01 - short - 1e-6)))
    with pytest.raises(ConfigError):
        refuse_unreachable(task, "train", Constrained(thresholds=tuple(ideal_M - 0.01 - short + 1e-5)))


def test_one_threshold_that_no_policy_reaches(task):
    high = float(landmarks(task).ideal_M[0]) + 0.02
    with pytest.raises(ConfigError, match=r"misses one of them by 0\.0200"):
        refuse_unreachable(task, "train", Constrained(thresholds=(high, None)))
    assert least_shortfall(task, "train", np.full(2, -np.inf)) == -np.inf


class Constant(ExactTask):
    def rewards_PRM(self, split):
        rewards_PRM = super().rewards_PRM(split).copy()
        rewards_PRM[:, :, 1] = 0.5
        return rewards_PRM


def test_a_constant_reward_has_an_exact_meaning(task):
    """Nothing can be gained at it, and moving costs KL: who must lose nowhere stays at the reference; the others trade."""
    flat = Constant(**{f.name: getattr(task, f.name) for f in dataclasses.fields(task)})
    reference_M = landmarks(flat).reference_M
    worst = optimum(flat, "train", MaxMin(), SOME[0])
    assert worst.value == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(worst.J_M, reference_M, atol=1e-4)
    nobody = optimum(flat, "train", Constrained(), SOME[0])
    np.testing.assert_allclose(nobody.J_M, reference_M, atol=1e-2)
    assert nobody.value - reference_M @ SOME[0] < 2e-3
    product = optimum(flat, "train", LogSum(), SOME[0])
    assert product.J_M[0] > reference_M[0] + 0.01
    assert product.J_M[1] < reference_M[1]
