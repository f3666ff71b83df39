"""The published search against a second, slow reading of it; the simplex variant against geometry."""

import itertools
import math

import numpy as np
import pytest

from paretune import search
from paretune.errors import ParetuneError
from paretune.seeds import generator


def published(score, levels=5):
    """The published procedure as prose, for three weights: loops over linspace, cubes by their lower corner."""
    low, high = [0.0] * 3, [1.0] * 3
    best, best_score, calls = None, -math.inf, 0
    for _ in range(levels):
        axes = [np.linspace(low[k], high[k], 3) for k in range(3)]
        table = {}
        for i, j, k in itertools.product(range(3), repeat=3):
            point = (axes[0][i], axes[1][j], axes[2][k])
            table[i, j, k] = score(np.array(point))
            calls += 1
            if table[i, j, k] > best_score:
                best, best_score = point, table[i, j, k]
        cubes = {}
        for i, j, k in itertools.product(range(2), repeat=3):
            cubes[i, j, k] = sum(table[i + a, j + b, k + c] for a, b, c in itertools.product(range(2), repeat=3))
        i, j, k = max(cubes, key=cubes.get)
        low, high = [axes[0][i], axes[1][j], axes[2][k]], [axes[0][i + 1], axes[1][j + 1], axes[2][k + 1]]
    return np.array(best), best_score, calls


def bowl(centre):
    return lambda g: -float(((g - centre) ** 2).sum())


def test_agrees_with_a_second_reading_of_the_published_search():
    rng = generator(0, "test grid")
    for _ in range(10):
        centre, noise = rng.random(3), rng.normal(size=(5, 5, 5))
        rough = lambda g, c=centre, n=noise: bowl(c)(g) + 0.3 * n[tuple((g * 4).astype(int))]  # noqa: E731
        best, value, calls = published(rough)
        got = search.hierarchical_grid(rough, 3)
        assert got.best_K.tolist() == best.tolist()
        assert (got.value, got.evaluations) == (value, calls) == (value, 5 * 27)


@pytest.mark.parametrize(("count", "levels"), [(1, 5), (2, 3), (4, 2)])
def test_every_evaluation_is_counted(count, levels):
    calls = []
    got = search.hierarchical_grid(lambda g: calls.append(tuple(g)) or 0.0, count, levels=levels)
    assert got.evaluations == len(calls) == levels * 3**count
    assert len(set(calls)) < len(calls), "the published form scores shared corners again"
    cached = []
    got = search.hierarchical_grid(lambda g: cached.append(tuple(g)) or 0.0, count, levels=levels, cache=True)
    assert got.evaluations == len(cached) == len(set(cached))
    assert set(cached) == set(calls)


def test_finds_the_top_of_a_bowl():
    """After 5 levels the box has sides of 1/32 and the grid points are 1/32 apart; the sum of corners follows a bowl exactly."""
    for centre in ([0.21, 0.77], [0.5, 0.5], [0.0, 1.0]):
        got = search.hierarchical_grid(bowl(np.array(centre)), 2)
        assert np.abs(got.best_K - centre).max() <= 1 / 32


def test_the_cell_is_chosen_by_its_sum_and_the_best_point_is_kept():
    """A lone peak at the corner (1, 1) loses to a plateau around the origin, and is still the answer."""
    table = {(0, 0): 3, (0, 0.5): 3, (0.5, 0): 3, (0.5, 0.5): 3, (1, 1): 5}
    got = search.hierarchical_grid(lambda g: float(table.get(tuple(g), 0)), 2, levels=2)
    assert got.cells[0].tolist() == [[0, 0], [0.5, 0.5]]
    assert got.best_K.tolist() == [1, 1]
    assert got.value == 5


def test_equal_scores_go_to_the_first():
    got = search.hierarchical_grid(lambda g: 0.0, 2)
    assert got.best_K.tolist() == [0, 0]
    assert got.cells[-1].tolist() == [[0, 0], [1 / 32, 1 / 32]]


def test_nan_is_counted_avoided_and_never_best():
    got = search.hierarchical_grid(lambda g: math.nan if g[0] == 0 else -g[0], 2, levels=2)
    assert got.best_K[0] > 0
    assert got.unscored > 0
    with pytest.raises(ParetuneError, match="every cell of level 1 has a corner without a score"):
        search.hierarchical_grid(lambda g: math.nan, 2)


@pytest.mark.parametrize("count", [2, 3, 4])
def test_simplex_cells_tile_the_simplex(count):
    cells = list(search.simplex_cells(np.eye(count)))
    volumes = [abs(np.linalg.det(cell)) for cell in cells]
    assert volumes == pytest.approx([2.0 ** -(count - 1)] * 2 ** (count - 1))
    points = generator(0, "test cells", count).dirichlet(np.ones(count), size=200)
    inside = sum((np.linalg.solve(cell.T, points.T) > -1e-12).all(0).astype(int) for cell in cells)
    assert (inside == 1).all()


def test_simplex_search_stays_on_the_simplex_and_scores_nothing_twice():
    for count in (2, 3, 4):
        seen = []
        centre = generator(0, "test simplex", count).dirichlet(np.ones(count))
        score = bowl(centre)
        got = search.hierarchical_simplex(lambda g, s=score, into=seen: into.append(tuple(g)) or s(g), count)
        assert got.evaluations == len(seen) == len(set(seen))
        assert np.allclose(np.sum(seen, axis=1), 1, atol=1e-15)
        assert (np.array(seen) >= 0).all()
        assert np.abs(got.best_K - centre).max() < 0.1
    assert search.hierarchical_simplex(lambda g: 0.0, 2).evaluations == 3 + 4, "one new midpoint for each level after the first"


@pytest.mark.parametrize(("count", "points", "size"), [(2, 5, 5), (3, 5, 15), (3, 2, 3), (4, 3, 10), (2, 2, 2)])
def test_lattice(count, points, size):
    rows = search.simplex_lattice(count, points)
    assert rows.shape == (size, count) == (math.comb(points - 1 + count - 1, count - 1), count)
    assert (rows[:count] == np.eye(count)).all(), "vertices first: they are the experts' trainings"
    assert len({tuple(row) for row in rows}) == size
    assert np.allclose(rows.sum(1), 1)
