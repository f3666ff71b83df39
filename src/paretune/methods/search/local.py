"""Searches from a start: moves of weight between adapters, quadratic models, and a simplex of points that creeps uphill."""

from __future__ import annotations

import contextlib
import itertools

import numpy as np

from paretune.methods.search.base import Evaluations, Score, SearchResult, Spent

__all__ = ["lattice_refinement", "model_search", "nelder_mead"]

DIGITS = 12  # weights of a lattice are rounded to these, so that a point that is reached on two ways is one point
FLOOR = 1e-3  # the smallest weight that a search in logarithms starts from


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
