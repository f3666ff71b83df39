"""Utilities as functions: gradients by differences, concavity, what a weight of 0 means, and what a user can get wrong."""

import numpy as np
import pytest

from paretune.errors import ConfigError
from paretune.objectives.utilities import UTILITIES, Constrained, Landmarks, LogProduct, LogSum, MaxMin, Tchebycheff, log_product
from paretune.registry import describe
from paretune.seeds import generator

MARKS = Landmarks(np.array([0.0, -1.0, 0.0]), np.array([1.0, 1.0, 2.0]), np.array([0.7, 0.5, 1.5]), np.array([0.4, 0.1, 0.8]))
ALL = [
    Tchebycheff(),
    Tchebycheff(mu=0.5, ideal=(0.9, 0.8, 2.0)),
    MaxMin(),
    MaxMin(base=(0.0, 0.0, 0.0)),
    LogSum(),
    LogSum(base=(0.2, 0.0, 0.5)),
    Constrained(),
]
W_M = np.array([0.5, 0.3, 0.2])


def points(n=40):
    rng = generator(0, "utilities")
    return MARKS.reference_M + rng.normal(0, 0.2, (n, 3)), rng


@pytest.mark.parametrize("utility", ALL, ids=repr)
def test_the_gradient_is_that_of_the_value(utility):
    """Central differences; kinks have measure zero, and no random point comes within a step of one."""
    for J_M in points()[0]:
        numeric = [(utility.value(J_M + h, W_M, MARKS) - utility.value(J_M - h, W_M, MARKS)) / 2e-6 for h in np.eye(3) * 1e-6]
        np.testing.assert_allclose(utility.gradient(J_M, W_M, MARKS), numeric, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("utility", ALL, ids=repr)
def test_every_utility_rises_and_is_concave(utility):
    a_NM, rng = points()
    b_NM = a_NM + rng.normal(0, 0.3, a_NM.shape)
    middle, ends = utility.value((a_NM + b_NM) / 2, W_M, MARKS), (utility.value(a_NM, W_M, MARKS) + utility.value(b_NM, W_M, MARKS)) / 2
    assert (middle >= ends - 1e-12).all()
    if not isinstance(utility, Constrained):
        assert (middle > ends + 1e-6).any(), "some of these bend"
    assert (utility.gradient(a_NM[0], W_M, MARKS) >= 0).all()


def test_values_by_hand():
    J_M = np.array([0.5, 0.0, 1.0])
    # ranges 1, 2, 2; shares 3 w = 1.5, .9, .6
    far = np.array([1.5 * 0.2, 0.9 * 0.5 / 2, 0.6 * 0.5 / 2])
    assert Tchebycheff(mu=0.1).value(J_M, W_M, MARKS) == pytest.approx(-0.1 * np.log(np.exp(far / 0.1).sum()))
    assert MaxMin().value(J_M, W_M, MARKS) == pytest.approx(min(0.1 / 1.5, -0.1 / 1.8, 0.2 / 1.2))
    assert LogSum().value(J_M, W_M, MARKS) == pytest.approx(0.5 * np.log(0.5) + 0.3 * np.log(0.5) + 0.2 * np.log(0.5))
    constrained = Constrained(thresholds=(0.6, None, 1.3))
    assert constrained.value(J_M, W_M, MARKS) == pytest.approx(0.45)
    assert constrained.violation(J_M, MARKS) == pytest.approx(0.3)
    assert Constrained(margin=0.05).violation(MARKS.reference_M, MARKS) == pytest.approx(0.05)


def test_a_small_mu_is_the_worst_distance_and_mu_softens_it_by_at_most_mu_log_M():
    for J_M in points()[0]:
        worst = -(3 * W_M * (MARKS.ideal_M - J_M) / (MARKS.high_M - MARKS.low_M)).max()
        for mu in (1e-4, 0.01, 1.0):
            assert worst - mu * np.log(3) - 1e-12 <= Tchebycheff(mu=mu).value(J_M, W_M, MARKS) <= worst + 1e-12


@pytest.mark.parametrize("utility", [Tchebycheff(), MaxMin(), LogSum()], ids=repr)
def test_an_objective_without_weight_is_left_out(utility):
    """At a vertex the utility is that of the one objective, so that its optimum is the expert."""
    w_M, J_M = np.array([0.0, 1.0, 0.0]), np.array([-5.0, 0.2, -5.0])
    gradient_M = utility.gradient(J_M, w_M, MARKS)
    assert gradient_M[1] > 0
    assert (gradient_M[[0, 2]] == 0).all()
    assert utility.value(J_M, w_M, MARKS) == utility.value(np.array([9.0, 0.2, 9.0]), w_M, MARKS)


def test_below_its_floor_the_logarithm_goes_on_as_its_tangent():
    utility = LogSum(floor=0.1)
    below, at = (utility.value(np.array([x, 0.0, 1.0]), W_M, MARKS) for x in (-0.5, 0.1))
    assert at - below == pytest.approx(0.5 * 0.6 / 0.1)


def test_the_product_of_responses_is_the_scalarizer():
    rewards = generator(1, "rewards").uniform(size=(2, 4, 3))
    got = LogProduct(floor=0.01).scores(rewards, W_M, MARKS)
    expected = log_product(rewards.reshape(8, 3), np.tile(W_M, (8, 1)), low_M=MARKS.low_M, high_M=MARKS.high_M, floor=0.01)
    assert np.array_equal(got, expected.reshape(2, 4))


def test_a_description_builds_the_same_utility():
    for utility in (*ALL, LogProduct(), Constrained(thresholds=(0.1, None, 0.2))):
        assert UTILITIES.build(describe(utility)) == utility


def test_what_a_user_can_get_wrong():
    for make, message in (
        (lambda: Tchebycheff(mu=0), "mu lies between"),
        (lambda: LogSum(floor=0), "floor lies between"),
        (lambda: LogProduct(floor=2), "0 < floor < ceiling"),
        (lambda: MaxMin(base=(0.1,)).check(2), "base has one finite number per objective"),
        (lambda: Tchebycheff(ideal=(0.1, np.inf)).check(2), "ideal has one finite number"),
        (lambda: Constrained(thresholds=(0.1, None)).check(3), r"\[0.1, None\] for 3 objectives"),
        (lambda: UTILITIES.build({"name": "tchebychef"}), "did you mean 'tchebycheff'"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
