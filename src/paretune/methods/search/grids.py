"""Searches by grids: the published one in a box, ours on the simplex, and the lattice of preferences."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import numpy as np

from paretune.methods.search.base import Evaluations, Score, SearchResult, Spent

__all__ = ["box_cells", "hierarchical_grid", "hierarchical_simplex", "simplex_cells", "simplex_lattice"]


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
