"""Closed forms, and second implementations written without a library, against the guards around moocore."""

import itertools
import math

import numpy as np
import pytest

from paretune.errors import ParetuneError
from paretune.evaluation import metrics
from paretune.seeds import generator


def brute_hypervolume(points_KM, reference_M):
    """Inclusion-exclusion over all subsets of points."""
    total = 0.0
    for size in range(1, len(points_KM) + 1):
        for chosen in itertools.combinations(points_KM, size):
            sides = np.clip(np.min(chosen, axis=0) - reference_M, 0, None)
            total += (-1) ** (size + 1) * np.prod(sides)
    return total


def brute_igd_plus(points_KM, front_KM):
    short = np.clip(front_KM[:, None] - points_KM[None], 0, None)
    return float(np.sqrt((short**2).sum(-1)).min(1).mean())


def brute_nondominated(points_KM):
    return np.array([not any((q >= p).all() and (q > p).any() for q in points_KM) for p in points_KM])


@pytest.mark.parametrize("count", [2, 3, 4])
def test_hypervolume_of_unit_vectors_and_center(count):
    """A box of side 1/M at the center, nothing from the vertices: they do not lie above 0 in every objective."""
    points = np.concatenate([np.eye(count), np.full((1, count), 1 / count)])
    assert metrics.hypervolume(points, np.zeros(count)) == pytest.approx((1 / count) ** count, rel=1e-12)


@pytest.mark.parametrize("count", [2, 3])
def test_hypervolume_of_a_simplex(count):
    """A lattice of n steps on the simplex dominates C(n, M) cells of side 1/n, which goes to 1/M! (the simplex's volume)."""
    n = 40
    rows = [c for c in itertools.product(range(n + 1), repeat=count) if sum(c) == n]
    share = metrics.hypervolume(np.array(rows) / n, np.zeros(count))
    assert share == pytest.approx(math.comb(n, count) / n**count, rel=1e-12)
    assert share == pytest.approx(1 / math.factorial(count), rel=0.1)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_against_brute_force(count):
    rng = generator(0, "test pareto", count)
    for _ in range(20):
        points, front = rng.normal(size=(6, count)), rng.normal(size=(5, count))
        points[3] = points[2]  # a duplicate
        reference = rng.normal(size=count) - 1
        assert metrics.hypervolume(points, reference) == pytest.approx(brute_hypervolume(points, reference), abs=1e-10)
        assert metrics.igd_plus(points, front) == pytest.approx(brute_igd_plus(points, front), abs=1e-12)
        assert (metrics.nondominated(points) == brute_nondominated(points)).all()


def test_directions():
    """Every objective is maximized: better points make hypervolume grow and the distances shrink."""
    front = np.array([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]])
    worse, reference = front - 0.5, np.array([-2.0, -2.0])
    assert metrics.hypervolume(front, reference) > metrics.hypervolume(worse, reference)
    assert metrics.igd_plus(front, front) == 0
    assert metrics.igd_plus(worse, front) == pytest.approx(math.sqrt(0.5))
    assert metrics.igd_plus(front + 1, front) == 0, "beyond the front is no distance"


def test_measures_do_not_depend_on_order_or_memory_layout():
    rng = generator(0, "test pareto order")
    points, front, reference = rng.random((7, 3)), rng.random((9, 3)), np.zeros(3)
    swapped = np.asfortranarray(points[::-1][:, [2, 0, 1]])
    assert metrics.hypervolume(swapped, reference) == pytest.approx(metrics.hypervolume(points, reference), rel=1e-12)
    assert metrics.igd_plus(swapped, front[:, [2, 0, 1]]) == pytest.approx(metrics.igd_plus(points, front), rel=1e-12)


def test_a_real_zero_is_zero():
    assert metrics.hypervolume(np.array([[-1.0, 5.0]]), np.zeros(2)) == 0.0


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_unknown_is_never_a_number(bad):
    points = np.array([[1.0, 2.0], [2.0, bad]])
    good = np.array([[1.0, 1.0]])
    assert math.isnan(metrics.hypervolume(points, np.zeros(2)))
    assert math.isnan(metrics.igd_plus(points, good))
    assert math.isnan(metrics.igd_plus(good, points))
    with pytest.raises(ParetuneError, match="1 of 2 points with NaN or infinity"):
        metrics.nondominated(points)
    with pytest.raises(ParetuneError, match="one finite reference value per objective"):
        metrics.hypervolume(good, np.array([0.0, bad]))


def test_questions_without_meaning_are_refused():
    for empty in (np.empty((0, 2)), np.empty((2, 0)), np.zeros(3)):
        with pytest.raises(ParetuneError, match=r"\(K, M\) array with at least one row"):
            metrics.hypervolume(empty, np.zeros(2))
    with pytest.raises(ParetuneError, match="2 and 3 of them"):
        metrics.igd_plus(np.zeros((1, 2)), np.zeros((1, 3)))
    with pytest.raises(ParetuneError, match="for 2 objectives"):
        metrics.hypervolume(np.zeros((1, 2)), np.zeros(3))
