"""Outer-level searchers: where in a box or a simplex of mixing weights is a score largest? No language model in here.

Every call of the score is counted, because each one is a run of the mixed policy on validation prompts. One interface:

    result = searcher(score, count, start=None, budget=None)     more settings have defaults

`start` is where to begin, for example the preference itself (default: equal weights, or nowhere for grids); it is scored first, so that
the answer is never worse. Where it has no score, local searches begin elsewhere. `budget` is the largest number of evaluations (default:
each searcher's own end). A score that gives NaN is counted and never the answer. The same score gives the same result, and where a
searcher draws, it has a seed.

    grid          hierarchical_grid     [0, 1]^M, so the scale is free     3^M points a level: the published one
    simplex       hierarchical_simplex  weights that sum to 1              midpoints of all edges a level, shared ones once
    lattice       lattice_refinement    weights that sum to 1              at most M (M - 1) points a level, from a start
    model         model_search          [0, 1]^M                           2 M + 1 points, then one for each improved quadratic model
    nelder-mead   nelder_mead           weights that sum to 1, above 0     M points, then one or two a step
    optuna        optuna_search         [0, 1]^M                           TPE, a Gaussian process or CMA-ES; as many as the budget
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from paretune.errors import ConfigError, ParetuneError
from paretune.progress import during
from paretune.seeds import seed_for

__all__ = [
    "SEARCHERS",
    "Evaluations",
    "Score",
    "SearchResult",
    "box_cells",
    "hierarchical_grid",
    "hierarchical_simplex",
    "lattice_refinement",
    "load_optuna",
    "model_search",
    "nelder_mead",
    "optuna_search",
    "quiet",
    "simplex_cells",
    "simplex_lattice",
]

DIGITS = 12  # weights of a lattice are rounded to these, so that a point that is reached on two ways is one point
FLOOR = 1e-3  # the smallest weight that a search in logarithms starts from
TRIALS = 100  # of Optuna, where no budget is given

Score = Callable[[np.ndarray], float]
"""(K,) mixing weights -> a number to be maximized; NaN where it cannot be scored."""


@dataclass(frozen=True)
class SearchResult:
    """The best point ever scored (the first of equals), its score, and what finding it cost."""

    best_K: np.ndarray
    value: float
    evaluations: int  # calls of the score
    unscored: int  # of those, how many gave NaN
    cells: tuple[np.ndarray, ...] = ()  # of grids: the corners of the cell chosen at each level, outermost first
    values: tuple[float, ...] = field(default=(), repr=False)  # every score, in the order of the evaluations

    def evaluations_until(self, value: float) -> int | None:
        """How many evaluations it took to see a score of at least `value`; None where it was never seen."""
        return next((number for number, seen in enumerate(self.values, start=1) if seen >= value), None)


class Spent(Exception):
    """The budget is spent: a searcher that is interrupted by this returns the best so far."""


class Evaluations:
    """A score that counts its calls, knows the best point, and stops at a budget. With `cache` no point is scored twice."""

    def __init__(self, score: Score, *, budget: int | None = None, cache: bool = True):
        assert budget is None or budget >= 1, "a search has at least one evaluation"
        self._score, self._budget, self._cache = score, budget, cache
        self._known: dict[bytes, float] = {}
        self.values: list[float] = []
        self.best_K: np.ndarray | None = None
        self.best = -np.inf

    def __call__(self, point_K: np.ndarray) -> float:
        """The score at the point. Raises Spent instead of an evaluation beyond the budget."""
        point_K = np.array(point_K, dtype=np.float64) + 0.0  # -0.0 and 0.0 are one point
        name = point_K.tobytes()
        if self._cache and name in self._known:
            return self._known[name]
        if len(self.values) == self._budget:
            raise Spent
        with during(f"searching weights, {len(self.values) + 1}" + ("" if self._budget is None else f" of {self._budget}")):
            value = float(self._score(point_K.copy()))
        self._known[name] = value
        self.values.append(value)
        if value > self.best or (self.best_K is None and not np.isnan(value)):
            self.best_K, self.best = point_K, value
        return value

    def filled(self, point_K: np.ndarray) -> float:
        """The same for libraries that take no NaN: an unscored point is as far below the worst score as that is below the best."""
        value = self(point_K)
        if not np.isnan(value):
            return value
        known = [seen for seen in self.values if not np.isnan(seen)]
        return min(known) - (max(known) - min(known) or abs(min(known)) or 1.0)

    def first_scored(self, start: np.ndarray | None, count: int) -> np.ndarray:
        """Where a local search begins: the start (by default equal weights); if it has no score, equal weights or a vertex that has one."""
        equal_K = np.full(count, 1.0 / count)
        given_K = equal_K if start is None else np.array(start, dtype=np.float64)
        assert given_K.shape == (count,), f"a start of shape {given_K.shape} for {count} weights"
        for point_K in (given_K, equal_K, *np.eye(count)):
            if not np.isnan(self(point_K)):
                return point_K
        return self.result().best_K  # raises

    @property
    def unscored(self) -> int:
        return int(np.isnan(self.values).sum())

    def result(self, cells: tuple[np.ndarray, ...] = ()) -> SearchResult:
        """What was found. Raises ParetuneError where nothing could be scored."""
        if self.best_K is None:
            count = len(self.values)
            raise self.nothing_to_follow(f"no point had a score ({count} of {count} evaluations gave NaN)")
        return SearchResult(self.best_K, self.best, len(self.values), self.unscored, cells, tuple(self.values))

    @staticmethod
    def nothing_to_follow(found: str) -> ParetuneError:
        """The error of a search that sees no scores."""
        remedy = "look at the objectives: most completions could not be scored"
        return ParetuneError("a search needs scores to follow", found=found, remedy=remedy)


# Grids


def hierarchical_grid(
    score: Score, count: int, *, start: np.ndarray | None = None, budget: int | None = None, levels: int = 5, cache: bool = False
) -> SearchResult:
    """Search [0, 1]^count: score 3 points per axis of the current box, then go into the sub-box whose corners score most in sum.

    Without a cache every level scores all its 3^count points, so `levels * 3^count` evaluations; with it a point that a level shares
    with an earlier one is not scored again (coordinates are dyadic fractions, so that equal points are equal bit by bit). Equal sums go to
    the first cell in counting order, the last axis fastest. `start` (none as published) is scored first and steers nothing.

    Source: EMORL, arXiv 2505.02579: the authors' code, where count = 3 is written out. Differs: any number of axes, any score; NaN
    excludes the cells it touches. Hides: the largest *sum* follows the average of a region, so a narrow peak is missed; the weights
    need not sum to 1, and their scale is a temperature.
    """
    evaluations = Evaluations(score, budget=budget, cache=cache)
    return _descend(evaluations, start, np.stack([np.zeros(count), np.ones(count)]), _split_box, levels=levels)


def hierarchical_simplex(
    score: Score, count: int, *, start: np.ndarray | None = None, budget: int | None = None, levels: int = 5, cache: bool = True
) -> SearchResult:
    """The same search among weights that sum to 1: each level cuts the simplex into 2^(count - 1) equal cells at its edges' midpoints.

    Source: ours, after EMORL; the cut is the edgewise subdivision of Edelsbrunner & Grayson 2000. Differs: no dimension is spent on
    the weights' scale, and shared corners are scored once. Hides: the cut prefers the order of the axes where count > 3 (cells of
    equal volume but not of equal shape).
    """
    evaluations = Evaluations(score, budget=budget, cache=cache)
    return _descend(evaluations, start, np.eye(count), _split_simplex, levels=levels)


def simplex_lattice(count: int, points: int) -> np.ndarray:
    """(K, count) preferences with all coordinates multiples of 1 / (points - 1): `points` per edge, vertices included.

    The vertices come first, in the order of the objectives.
    """
    assert points >= 2, "a lattice has at least the vertices"
    steps = points - 1
    inner = [c for c in itertools.product(range(steps + 1), repeat=count - 1) if sum(c) <= steps]
    rows_KM = np.array([(steps - sum(c), *c) for c in inner], dtype=np.float64) / steps
    vertex_K = rows_KM.max(1) == 1.0
    return np.concatenate([np.eye(count), rows_KM[~vertex_K]])


def box_cells(corners_2K: np.ndarray) -> Iterator[np.ndarray]:
    """The 2^K sub-boxes of the box from corners_2K[0] to corners_2K[1], each as (2, K), the last axis fastest."""
    low_K, high_K = corners_2K
    half_K = (high_K - low_K) / 2
    for offset in itertools.product((0.0, 1.0), repeat=len(low_K)):
        start_K = low_K + half_K * np.array(offset)
        yield np.stack([start_K, start_K + half_K])


def simplex_cells(corners_KK: np.ndarray) -> Iterator[np.ndarray]:
    """The 2^(K-1) equal cells of a simplex given by its K corners (rows), each as (K, K) corners: midpoints of edges, and corners.

    Walk from corner pair (0, a) to (a, K - 1), one step on one of the two places at a time; every walk is a cell.
    """
    steps = len(corners_KK) - 1
    for walk in itertools.product((0, 1), repeat=steps):
        first = np.concatenate([[0], np.cumsum(1 - np.array(walk, dtype=int))])
        second = first[-1] + np.concatenate([[0], np.cumsum(np.array(walk, dtype=int))])
        yield (corners_KK[first] + corners_KK[second]) / 2


# A splitter gives the points to score, and the cells as (what to split next, rows of the points that are its corners).
_Cells = list[tuple[np.ndarray, list[int]]]


def _split_box(corners_2K: np.ndarray) -> tuple[np.ndarray, _Cells]:
    low_K, high_K = corners_2K
    count = len(low_K)
    grid = list(itertools.product(range(3), repeat=count))
    row = {place: number for number, place in enumerate(grid)}
    points = low_K + (high_K - low_K) / 2 * np.array(grid)
    cells: _Cells = []
    for offset, cell in zip(itertools.product((0, 1), repeat=count), box_cells(corners_2K), strict=True):
        corners = itertools.product(*[(o, o + 1) for o in offset])
        cells.append((cell, [row[corner] for corner in corners]))
    return points, cells


def _split_simplex(corners_KK: np.ndarray) -> tuple[np.ndarray, _Cells]:
    row: dict[bytes, int] = {}
    points: list[np.ndarray] = []
    cells: _Cells = []
    for cell in simplex_cells(corners_KK):
        rows = []
        for point in cell:
            if point.tobytes() not in row:
                row[point.tobytes()] = len(points)
                points.append(point)
            rows.append(row[point.tobytes()])
        cells.append((cell, rows))
    return np.array(points), cells


def _descend(
    evaluations: Evaluations,
    start: np.ndarray | None,
    region: np.ndarray,
    split: Callable[[np.ndarray], tuple[np.ndarray, _Cells]],
    *,
    levels: int,
) -> SearchResult:
    assert levels >= 1
    chosen: list[np.ndarray] = []
    try:
        if start is not None:
            evaluations(start)
        for _ in range(levels):
            points, cells = split(region)
            values = [evaluations(point) for point in points]
            sums = [float(sum(values[row] for row in rows)) for _, rows in cells]
            if np.isnan(sums).all():
                raise evaluations.nothing_to_follow(
                    f"every cell of level {len(chosen) + 1} has a corner without a score "
                    f"({evaluations.unscored} of {len(evaluations.values)} evaluations gave NaN)"
                )
            region = cells[int(np.nanargmax(sums))][0]
            chosen.append(region)
    except Spent:
        pass
    return evaluations.result(tuple(chosen))


# From a start


def lattice_refinement(
    score: Score, count: int, *, start: np.ndarray | None = None, budget: int | None = None, step: float = 0.2, levels: int = 5
) -> SearchResult:
    """Move `step` of weight from one adapter to another while that helps; then halve the step: `levels` steps in all.

    The first move that improves is made, and tried first again. What is moved is at most what is there, so weights stay at least 0 and
    their sum that of the start. Every point is scored once.

    Source: pattern (compass) search with the moves e_i - e_j, which positively span the simplex (Lewis & Torczon 1999).
    Differs: moves that the border cuts short are still made. Hides: the scale of the weights is not searched; a local search.
    """
    evaluations = Evaluations(score, budget=budget)
    with contextlib.suppress(Spent):
        here_K = evaluations.first_scored(None if start is None else np.round(start, DIGITS), count)
        value = evaluations(here_K)
        moves = list(itertools.permutations(range(count), 2))
        for level in range(levels):
            improved = True
            while improved:
                improved = False
                for place, (up, down) in enumerate(moves):
                    next_K = _moved(here_K, up, down, step / 2**level)
                    found = evaluations(next_K)
                    if found > value:
                        here_K, value, improved = next_K, found, True
                        moves.insert(0, moves.pop(place))
                        break
    return evaluations.result()


def _moved(weights_K: np.ndarray, up: int, down: int, step: float) -> np.ndarray:
    moved_K = weights_K.copy()
    amount = min(step, weights_K[down])
    moved_K[up] += amount
    moved_K[down] -= amount
    return np.round(moved_K, DIGITS)


def model_search(
    score: Score,
    count: int,
    *,
    start: np.ndarray | None = None,
    budget: int | None = None,
    radius: float = 0.15,
    tolerance: float = 0.01,
) -> SearchResult:
    """Climb a quadratic model of the score in [0, 1]^count: 2 count + 1 points around the start, then each model's best point.

    `radius` is how far the model is trusted at first, `tolerance` the trusted distance at which the search ends. One dimension more
    than the simplex has: the scale of the weights, as in the published box.

    Source: COBYQA (Ragonneau & Zhang 2022), as SciPy ships it; quadratic models of least change, after Powell's NEWUOA. Differs: the
    start is always scored, first; an unscored point counts as far below the worst. Hides: a local search, so it ends on the hill where
    it starts; a score with noise of the size of the gain misleads its model.
    """
    from scipy.optimize import minimize

    assert 0 < tolerance <= radius <= 0.5
    evaluations = Evaluations(score, budget=budget)
    with contextlib.suppress(Spent):
        start_K = evaluations.first_scored(None if start is None else np.clip(start, 0.0, 1.0), count)
        minimize(
            lambda weights_K: -evaluations.filled(weights_K),
            start_K,
            method="COBYQA",
            bounds=[(0.0, 1.0)] * count,
            options={"initial_tr_radius": radius, "final_tr_radius": tolerance},
        )
    return evaluations.result()


def nelder_mead(
    score: Score,
    count: int,
    *,
    start: np.ndarray | None = None,
    budget: int | None = None,
    step: float = 0.5,
    tolerance: float = 0.01,
) -> SearchResult:
    """Nelder and Mead's search in the logarithms of weights that sum to 1, the last weight being the unit.

    `step` is the first change of each logarithm; it ends where its points differ by less than `tolerance` in logarithms and in score.

    Source: Nelder & Mead 1965 with parameters that adapt to the dimension (Gao & Han 2012), as SciPy ships it. Differs: softmax
    coordinates. Hides: a weight of 0 is never reached, and weights near 0 move slowly; the scale of the weights is not searched.
    """
    from scipy.optimize import minimize

    evaluations = Evaluations(score, budget=budget)

    def weights(z: np.ndarray) -> np.ndarray:
        full_K = np.append(z, 0.0)
        shares_K = np.exp(full_K - full_K.max())
        return shares_K / shares_K.sum()

    with contextlib.suppress(Spent):
        start_K = evaluations.first_scored(start, count)
        value = evaluations(start_K)
        if count > 1:
            logs_K = np.log(np.maximum(start_K, FLOOR))
            first = logs_K[:-1] - logs_K[-1]
            corners = np.concatenate([first[None], first + step * np.eye(count - 1)])
            options = {"initial_simplex": corners, "adaptive": True, "xatol": tolerance, "fatol": tolerance * max(abs(value), 1e-3)}
            minimize(lambda z: -evaluations.filled(weights(z)), first, method="Nelder-Mead", options=options)
    return evaluations.result()


# By Optuna, an optional dependency


def optuna_search(
    score: Score,
    count: int,
    *,
    start: np.ndarray | None = None,
    budget: int | None = None,
    sampler: Literal["tpe", "gp", "cmaes"] = "gp",
    seed: int = 0,
) -> SearchResult:
    """`budget` trials (100 by default) in [0, 1]^count: "tpe" is a Parzen estimator, "gp" a Gaussian process, "cmaes" CMA-ES.

    Source: Optuna (Akiba et al. 2019) and its samplers, with their defaults. Differs: the start is the first trial. Hides: global
    models pay for what a local search gets from its start; the first 10 trials of the Gaussian process and of TPE are random. Another
    version of Optuna may draw other candidates.
    """
    optuna = load_optuna()
    evaluations = Evaluations(score, budget=budget or TRIALS, cache=False)
    with quiet(optuna), contextlib.suppress(Spent):
        study = optuna.create_study(direction="maximize", sampler=_sampler(optuna, sampler, seed_for(seed, "optuna") % 2**32))
        if start is not None:
            study.enqueue_trial({_name(k): float(weight) for k, weight in enumerate(start)})
        while True:
            trial = study.ask()
            value = evaluations(np.array([trial.suggest_float(_name(k), 0.0, 1.0) for k in range(count)]))
            if np.isnan(value):
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
            else:
                study.tell(trial, value)
    return evaluations.result()


def _name(k: int) -> str:
    return f"weight_{k}"


def _sampler(optuna: Any, name: str, seed: int) -> Any:
    makers = {"tpe": optuna.samplers.TPESampler, "gp": optuna.samplers.GPSampler, "cmaes": optuna.samplers.CmaEsSampler}
    assert name in makers, name
    return makers[name](seed=seed)


def load_optuna(*, otherwise: str = ', or search "model"') -> Any:
    """Optuna, or a ConfigError that says which extra to install, or what to do `otherwise`."""
    try:
        import optuna
    except ImportError:
        remedy = f'`pip install "paretune[search]"`{otherwise}'
        raise ConfigError("a search by Optuna needs Optuna", found="it is not installed", remedy=remedy) from None
    return optuna


@contextlib.contextmanager
def quiet(optuna: Any) -> Iterator[None]:
    """No line for every study, and the reader's own setting afterwards."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


SEARCHERS: dict[str, Callable[..., SearchResult]] = {
    "grid": hierarchical_grid,
    "simplex": hierarchical_simplex,
    "lattice": lattice_refinement,
    "model": model_search,
    "nelder-mead": nelder_mead,
    "optuna": optuna_search,
}
