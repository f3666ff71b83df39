"""The published search against a second, slow reading of it; the simplex variant against geometry."""

import itertools
import math
import sys

import numpy as np
import pytest

from paretune.errors import ConfigError, ParetuneError
from paretune.methods import search
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


def bowl(center):
    return lambda g: -float(((g - center) ** 2).sum())


def test_agrees_with_a_second_reading_of_the_published_search():
    rng = generator(0, "test grid")
    for _ in range(10):
        center, noise = rng.random(3), rng.normal(size=(5, 5, 5))
        rough = lambda g, c=center, n=noise: bowl(c)(g) + 0.3 * n[tuple((g * 4).astype(int))]  # noqa: E731
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
    for center in ([0.21, 0.77], [0.5, 0.5], [0.0, 1.0]):
        got = search.hierarchical_grid(bowl(np.array(center)), 2)
        assert np.abs(got.best_K - center).max() <= 1 / 32


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
        center = generator(0, "test simplex", count).dirichlet(np.ones(count))
        score = bowl(center)
        got = search.hierarchical_simplex(lambda g, s=score, into=seen: into.append(tuple(g)) or s(g), count)
        assert got.evaluations == len(seen) == len(set(seen))
        assert np.allclose(np.sum(seen, axis=1), 1, atol=1e-15)
        assert (np.array(seen) >= 0).all()
        assert np.abs(got.best_K - center).max() < 0.1
    assert search.hierarchical_simplex(lambda g: 0.0, 2).evaluations == 3 + 4, "one new midpoint for each level after the first"


@pytest.mark.parametrize(("count", "points", "size"), [(2, 5, 5), (3, 5, 15), (3, 2, 3), (4, 3, 10), (2, 2, 2)])
def test_lattice(count, points, size):
    rows = search.simplex_lattice(count, points)
    assert rows.shape == (size, count) == (math.comb(points - 1 + count - 1, count - 1), count)
    assert (rows[:count] == np.eye(count)).all(), "vertices first: they are the experts' trainings"
    assert len({tuple(row) for row in rows}) == size
    assert np.allclose(rows.sum(1), 1)


# What every searcher promises


@pytest.fixture(params=sorted(search.SEARCHERS))
def searcher(request):
    return search.SEARCHERS[request.param]


START = np.array([0.2, 0.5, 0.3])


def test_the_start_is_scored_first_and_the_answer_is_never_worse(searcher):
    """A lone peak at the start, and a slope away from it elsewhere: whoever forgets the start loses."""
    seen = []

    def score(g):
        seen.append(g)
        return 10.0 if np.allclose(g, START, atol=1e-9) else float(g[0])

    got = searcher(score, 3, start=START, budget=25)
    assert np.allclose(seen[0], START)
    assert got.value == 10
    assert np.allclose(got.best_K, START)


@pytest.mark.parametrize("budget", [1, 2, 12])
def test_the_budget_is_kept_to_the_evaluation(searcher, budget):
    calls = []
    got = searcher(lambda g: calls.append(1) or bowl(START)(g), 3, start=np.array([0.9, 0.05, 0.05]), budget=budget)
    assert got.evaluations == len(calls) == len(got.values) == budget


def test_the_same_score_gives_the_same_search(searcher):
    first, second = (searcher(bowl(START), 3, start=np.array([0.8, 0.1, 0.1]), budget=15) for _ in range(2))
    assert first.values == second.values
    assert first.best_K.tolist() == second.best_K.tolist()


def test_unscored_points_are_counted_and_never_the_answer(searcher):
    """Half of the space has no score, and the best of the other half lies at its border."""
    calls = []

    def score(g):
        calls.append(g)
        return math.nan if g[0] > 0.6 else float(g[0])

    got = searcher(score, 3, start=np.array([0.7, 0.2, 0.1]), budget=30)
    assert got.unscored == sum(g[0] > 0.6 for g in calls) > 0
    assert got.evaluations == len(calls)
    assert got.best_K[0] == got.value <= 0.6
    assert got.value > 0.2, "it goes on where there are scores"


def test_a_score_that_is_never_there_is_an_error(searcher):
    with pytest.raises(ParetuneError, match=r"a search needs scores to follow(?s:.*)gave NaN(?s:.*)look at the objectives"):
        searcher(lambda g: math.nan, 3, start=START, budget=12)


def test_what_a_search_is_given_is_its_own(searcher):
    """A score that writes into its argument harms nobody, and a start stays what it was."""
    start = START.copy()

    def score(g):
        value = bowl(np.array([0.3, 0.3, 0.4]))(g)
        g[:] = 0
        return value

    got = searcher(score, 3, start=start, budget=12)
    assert start.tolist() == START.tolist()
    assert got.best_K.sum() > 0.5


def test_the_searchers_that_say_so_find_known_tops():
    """sum c log g has its top on the simplex at g = c (Gibbs); a bowl has it anywhere in the box, also at its border."""
    for count in (2, 3, 5):
        c = generator(1, "test tops", count).dirichlet(3 * np.ones(count))
        entropy = lambda g, c=c: float(c @ np.log(np.maximum(g, 1e-12)))  # noqa: E731
        for name in ("lattice", "nelder-mead"):
            got = search.SEARCHERS[name](entropy, count)
            assert got.best_K.sum() == pytest.approx(1, abs=1e-9)
            assert np.abs(got.best_K - c).max() < 0.05, (name, count)
            assert len(got.values) == got.evaluations
        off = 0.7 * c
        skew = generator(2, "test tops", count).normal(size=(count, count))
        valley = lambda g, a=skew, o=off: -float(((g - o) @ a) @ ((g - o) @ a) + (g - o) @ (g - o))  # noqa: E731
        got = search.model_search(valley, count)
        assert np.abs(got.best_K - off).max() < 0.02, "off the simplex, and the axes are coupled"
        assert got.evaluations < 10 * count + 10
    outside = np.array([-0.5, 0.4, 1.5])
    assert search.model_search(bowl(outside), 3).best_K == pytest.approx([0, 0.4, 1], abs=0.01)


def test_model_search_against_gradients():
    """A smooth score that is not quadratic: SciPy's L-BFGS-B, which sees the gradient, finds the same top."""
    from scipy.optimize import minimize

    rng = generator(3, "test gradients")
    a, b = rng.normal(size=(20, 4)), rng.normal(size=20)

    def loss(g):
        z = a @ g + b
        p = np.exp(z - z.max())
        return float(np.log(p.sum()) + z.max() + 2 * g @ g), a.T @ (p / p.sum()) + 4 * g

    exact = minimize(loss, np.full(4, 0.25), jac=True, method="L-BFGS-B", bounds=[(0, 1)] * 4)
    got = search.model_search(lambda g: -loss(g)[0], 4, tolerance=1e-4)
    assert got.value == pytest.approx(-exact.fun, abs=1e-6)
    assert got.best_K == pytest.approx(exact.x, abs=1e-3)


def test_where_lattice_refinement_ends_no_smallest_move_helps():
    for seed in range(5):
        rng = generator(seed, "test lattice")
        c, tilt = rng.dirichlet(np.ones(4)), rng.normal(size=4)
        score = lambda g, c=c, t=tilt: bowl(c)(g) + 0.1 * float(t @ np.abs(g - c))  # noqa: E731
        seen = []
        got = search.lattice_refinement(lambda g, s=score, into=seen: into.append(tuple(g)) or s(g), 4, step=0.2, levels=4)
        assert len(seen) == len(set(seen)), "no point is scored twice"
        assert (np.array(seen) >= 0).all()
        assert np.allclose(np.sum(seen, axis=1), 1, atol=1e-9)
        for up, down in itertools.permutations(range(4), 2):
            move = min(0.2 / 8, got.best_K[down])
            assert score(got.best_K + move * (np.eye(4)[up] - np.eye(4)[down])) <= got.value + 1e-12


def test_lattice_refinement_keeps_the_sum_of_its_start():
    got = search.lattice_refinement(bowl(np.array([0.5, 0.5])), 2, start=np.array([0.5, 0.0]))
    assert got.best_K.tolist() == [0.25, 0.25]


def test_evaluations_count_points_once():
    made = search.Evaluations(lambda g: float(g.sum()), budget=2)
    assert made(np.array([0.0, 1.0])) == made(np.array([-0.0, 1.0])) == 1
    assert made.values == [1.0]
    assert made(np.array([1.0, 1.0])) == 2
    assert made.result().best_K.tolist() == [1, 1]
    again = search.Evaluations(lambda g: 0.0, cache=False)
    again(np.ones(1))
    again(np.ones(1))
    assert again.result().evaluations == 2


def test_evaluations_until():
    got = search.hierarchical_grid(lambda g: float(g[0]), 1, levels=1)
    assert got.values == (0, 0.5, 1)
    assert [got.evaluations_until(v) for v in (-1, 0.2, 0.5, 1.0, 1.1)] == [1, 2, 2, 3, None]


@pytest.mark.parametrize("sampler", ["tpe", "gp", "cmaes"])
def test_optuna_samplers_climb_and_follow_their_seed(sampler):
    runs = [search.optuna_search(bowl(np.array([0.3, 0.6])), 2, budget=25, sampler=sampler, seed=seed) for seed in (0, 0, 1)]
    assert runs[0].values == runs[1].values != runs[2].values
    assert all(run.value > -0.05 for run in runs)


def test_an_unscored_point_is_worse_than_any_score_that_is_known():
    """Scores far below 0: whoever takes 0 for NaN climbs towards what has no score."""
    nowhere = np.array([0.2, 0.2])
    score = lambda g: math.nan if np.abs(g - nowhere).max() < 0.05 else -100 + bowl(np.array([0.4, 0.4]))(g)  # noqa: E731
    for start in (nowhere, np.array([0.2, 0.3])):
        got = search.model_search(score, 2, start=start)
        assert got.unscored >= (start is nowhere)
        assert got.best_K == pytest.approx([0.4, 0.4], abs=0.02)
    made = search.Evaluations(lambda g: math.nan if g[0] else -5.0)
    made(np.zeros(1))
    assert made.filled(np.ones(1)) < -5


def test_optuna_is_optional(monkeypatch):
    import optuna

    before = optuna.logging.get_verbosity()
    search.optuna_search(lambda g: 0.0, 2, budget=2)
    assert optuna.logging.get_verbosity() == before, "the reader's setting"
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(ConfigError, match=r"needs Optuna(?s:.*)paretune\[search\]"):
        search.optuna_search(lambda g: 0.0, 2)
