"""What all searchers share: the score, counted calls of it, and the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from paretune.errors import ParetuneError

__all__ = ["Evaluations", "Score", "SearchResult", "Spent"]

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
