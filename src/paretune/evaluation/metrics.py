"""Metrics of a family against the exact optimum and the Pareto front: pure functions of returns.

Points are regularized returns J_k = E[r_k] - beta * KL, one row per preference, (W, M); `w_WM` are the preferences. Everything is
maximized. NaN is unknown and stays unknown; `summary` counts it beside the mean.

Measures against a front are computed by moocore, on (K, M) points in any order, dominated ones included. moocore answers 0.0 to NaN and
to nothing at all, which reads like a measured hypervolume: here a point with an unknown coordinate gives NaN, and no points are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import moocore
import numpy as np

from paretune.errors import ParetuneError
from paretune.types import Estimate

__all__ = [
    "MIN_GAIN",
    "attainment",
    "controllability",
    "hypervolume",
    "igd_plus",
    "nondominated",
    "plain",
    "regret",
    "summary",
    "utility",
    "utility_losses",
]

MIN_GAIN = 1e-3
"""Where the optimum gains less than this on the reference, the attainment's denominator is noise, and the attainment NaN."""


def utility(points_WM: np.ndarray, w_WM: np.ndarray) -> np.ndarray:
    """(W,) J_w = w . J at each preference."""
    return (np.asarray(points_WM) * np.asarray(w_WM)).sum(-1)


def attainment(utility_W: np.ndarray, reference_W: np.ndarray, optimum_W: np.ndarray) -> np.ndarray:
    """(W,) share of the possible gain: (J_w(pi) - J_w(pi_ref)) / (J_w(pi*_w) - J_w(pi_ref)); NaN where the gain is under 1e-3.

    1 is optimal, 0 is the untrained reference, negative is harm. All three are means over prompts: a ratio of means.

    Source: ours. Differs: no. Hides: prompts that are harmed beside prompts that gain, and how much is at stake: print the regret too.
    """
    gain_W = np.asarray(optimum_W) - np.asarray(reference_W)
    return np.where(gain_W >= MIN_GAIN, (np.asarray(utility_W) - reference_W) / np.where(gain_W >= MIN_GAIN, gain_W, 1.0), np.nan)


def regret(utility_W: np.ndarray, optimum_W: np.ndarray) -> np.ndarray:
    """(W,) J_w(pi*_w) - J_w(pi), in units of return.

    Source: the usual definition. Differs: no. Hides: whether there was anything to gain at w.
    """
    return np.asarray(optimum_W) - np.asarray(utility_W)


def utility_losses(points_WM: np.ndarray, w_WM: np.ndarray, optimum_W: np.ndarray) -> tuple[float, float]:
    """(expected, maximum) over the preferences of J_w(pi*_w) - max over ALL the family's measured points of w . point.

    Unlike regret, a preference may be served by the policy of any other: what is lost is coverage, not control.

    Source: Zintgraf et al. 2015, Hayes et al. 2022. Differs: the set is the points measured at these preferences.
    Hides: a family that answers every preference with the wrong one of its policies loses nothing here.
    """
    best_W = (np.asarray(w_WM) @ np.asarray(points_WM).T).max(1)
    lost_W = np.asarray(optimum_W) - best_W
    return float(lost_W.mean()), float(lost_W.max())


def controllability(points_WM: np.ndarray, optimum_WM: np.ndarray) -> float:
    """Agreement of the path of returns over preferences with the exact front's path: 1 - |P - Q| / |Q|.

    P and Q hold the steps J(w_i) - J(w_j) of the family and of the optimum between all pairs of preferences, each objective in units
    of the optimum's own spread; |.| is the root mean square. 1: every step is the optimum's. 0: the preference changes nothing.
    Negative: further from the optimum's path than standing still; -1 is the optimum's path backwards.
    Objectives whose optimum does not move (spread under 1e-3) are left out; NaN where none moves or a return is unknown.

    Source: ours. Under a scale mismatch even the optimum lowers r_k when w_k grows, so "raise w_k, r_k rises" is not the standard.
    Differs: from rank correlations of w_k and r_k, which every monotone family satisfies however little it moves.
    Hides: the level: a family far below the front that moves in parallel to it scores 1. Attainment shows that.
    """
    steps_WM = np.asarray(points_WM) - np.mean(points_WM, axis=0)  # all pairs of steps have twice the spread of the centered points
    wanted_WM = np.asarray(optimum_WM) - np.mean(optimum_WM, axis=0)
    spread_M = np.sqrt((wanted_WM**2).mean(0))
    moves_M = spread_M >= MIN_GAIN
    if not moves_M.any() or not np.isfinite(steps_WM).all() or not np.isfinite(wanted_WM).all():
        return float("nan")
    off_WM = (steps_WM - wanted_WM)[:, moves_M] / spread_M[moves_M]
    return float(1.0 - np.sqrt((off_WM**2).mean()))


def summary(values_W: np.ndarray, *, worst: Callable[[np.ndarray], Any]) -> dict[str, Any]:
    """{"mean", "worst", "per_preference", "undefined"}: over the values that are known, with the count of those that are not."""
    values_W = np.asarray(values_W, dtype=np.float64)
    known = values_W[np.isfinite(values_W)]
    return {
        "mean": plain(known.mean()) if len(known) else None,
        "worst": plain(worst(known)) if len(known) else None,
        "per_preference": plain(values_W),
        "undefined": int(len(values_W) - len(known)),
    }


def plain(value: Any) -> Any:
    """NumPy and Estimate to strict JSON: lists, floats, and None for what is unknown."""
    if isinstance(value, Estimate):
        return {"value": plain(value.value), "low": plain(value.low), "high": plain(value.high), "n": value.n}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    if isinstance(value, (int, np.integer)):
        return int(value)
    if isinstance(value, (float, np.floating)):
        return float(value) if np.isfinite(value) else None
    return value


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
