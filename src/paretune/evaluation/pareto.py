"""Measures of a set of points against a Pareto front: guards around moocore, with every objective MAXIMIZED.

moocore answers 0.0 to NaN and to nothing at all, which reads like a measured hypervolume. Here a number that cannot be known is
NaN (a point with an unknown coordinate), and a question without meaning is refused (no points, wrong shapes).

Points are (K, M) arrays of regularized returns; their order does not matter, and dominated points may stay in.
"""

from __future__ import annotations

import moocore
import numpy as np

from paretune.errors import ParetuneError

__all__ = ["hypervolume", "igd_plus", "nondominated"]


def hypervolume(points_KM: np.ndarray, reference_M: np.ndarray) -> float:
    """Volume that the points dominate above `reference_M`; NaN where any coordinate is not finite.

    0.0 is a real answer: no point lies above the reference point in every objective.

    Source: Zitzler & Thiele 1998; computed by moocore. Differs: NaN and empty sets are never 0.
    Hides: how the points are spread, and failures between good points: a family whose worst attainment was .55 kept 97 % of it.
    """
    points_KM = _points(points_KM, "points")
    reference_M = np.asarray(reference_M, dtype=np.float64)
    if reference_M.shape != points_KM.shape[1:] or not np.isfinite(reference_M).all():
        raise ParetuneError(
            "a hypervolume has one finite reference value per objective",
            found=f"{reference_M.tolist()} for {points_KM.shape[1]} objectives",
            remedy="take the task's reference point, fixed before any run",
        )
    if not np.isfinite(points_KM).all():
        return float("nan")
    return float(moocore.hypervolume(points_KM, ref=reference_M, maximise=True))


def igd_plus(points_KM: np.ndarray, front_KM: np.ndarray) -> float:
    """Mean over the front's points of the distance to the nearest point, counting only what falls short; NaN where not finite.

    0 means that every point of the front is matched or exceeded.

    Source: Ishibuchi et al. 2015; computed by moocore. Differs: NaN and empty sets are never 0.
    Hides: which part of the front is missed, and the objectives' scales (a Euclidean distance: compare like with like).
    """
    points_KM, front_KM = _pair(points_KM, front_KM)
    if not (np.isfinite(points_KM).all() and np.isfinite(front_KM).all()):
        return float("nan")
    return float(moocore.igd_plus(points_KM, ref=front_KM, maximise=True))


def nondominated(points_KM: np.ndarray) -> np.ndarray:
    """(K,) bool: True where no other point is at least as good everywhere and better somewhere. Equal points are all kept.

    Refuses points that are not finite: what is unknown may dominate anything.
    """
    points_KM = _points(points_KM, "points")
    if not np.isfinite(points_KM).all():
        raise ParetuneError(
            "points are compared where all their coordinates are known",
            found=f"{int((~np.isfinite(points_KM)).any(1).sum())} of {len(points_KM)} points with NaN or infinity",
            remedy="leave those points out, and print how many there were",
        )
    return np.asarray(moocore.is_nondominated(points_KM, maximise=True, keep_weakly=True), dtype=bool)


def _pair(points_KM: np.ndarray, front_KM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points_KM, front_KM = _points(points_KM, "points"), _points(front_KM, "front")
    if points_KM.shape[1] != front_KM.shape[1]:
        raise ParetuneError(
            "points and front have the same objectives",
            found=f"{points_KM.shape[1]} and {front_KM.shape[1]} of them",
            remedy="measure both in the same space",
        )
    return points_KM, front_KM


def _points(given: np.ndarray, what: str) -> np.ndarray:
    """(K, M) float64, contiguous (moocore reads memory as it lies)."""
    points_KM = np.ascontiguousarray(given, dtype=np.float64)
    if points_KM.ndim != 2 or 0 in points_KM.shape:
        raise ParetuneError(
            f"{what} are a (K, M) array with at least one row and one objective",
            found=f"shape {points_KM.shape}",
            remedy="give one row per point; an empty set has no measure",
        )
    return points_KM
