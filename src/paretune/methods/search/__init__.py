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

from collections.abc import Callable

from paretune.methods.search.base import Evaluations, Score, SearchResult
from paretune.methods.search.grids import box_cells, hierarchical_grid, hierarchical_simplex, simplex_cells, simplex_lattice
from paretune.methods.search.local import lattice_refinement, model_search, nelder_mead
from paretune.methods.search.samplers import optuna_search

__all__ = [
    "SEARCHERS",
    "Evaluations",
    "Score",
    "SearchResult",
    "box_cells",
    "hierarchical_grid",
    "hierarchical_simplex",
    "lattice_refinement",
    "model_search",
    "nelder_mead",
    "optuna_search",
    "simplex_cells",
    "simplex_lattice",
]

SEARCHERS: dict[str, Callable[..., SearchResult]] = {
    "grid": hierarchical_grid,
    "simplex": hierarchical_simplex,
    "lattice": lattice_refinement,
    "model": model_search,
    "nelder-mead": nelder_mead,
    "optuna": optuna_search,
}
