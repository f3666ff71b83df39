"""Judge a family by the utility that it was trained for, where that is not w . J: `family.utility` describes it.

Own-utility attainment is (U(pi) - U(pi_ref)) / (U* - U(pi_ref)), U* being the exact optimum over all policies. For a utility with
constraints U charges what is broken at the optimum's own multipliers, w . J - sum_k l_k max(c_k - J_k, 0): an exact penalty, so that no
policy exceeds 1 by breaking a constraint; the violation itself, the largest shortfall, stands beside it. Where the task is not exact
only U of the estimated returns is known, and what it is above the reference's.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from paretune.errors import ConfigError
from paretune.evaluation import metrics
from paretune.evaluation.metrics import summary
from paretune.objectives.utilities import UTILITIES, Constrained, Landmarks, LogProduct, Utility
from paretune.policy.family import Family
from paretune.policy.returns import ExactReturns
from paretune.tasks.base import Task
from paretune.tasks.exact.optimum import landmarks, optimum
from paretune.tasks.exact.task import ExactTask
from paretune.types import Curve

__all__ = ["exact_own_utility", "sampled_own_utility"]


def exact_own_utility(
    task: ExactTask, family: Family, returns: ExactReturns, w_WM: np.ndarray, gates_WK: np.ndarray, points_WM: np.ndarray
) -> dict[str, Any] | None:
    """{"name", "attainment", "violation", "value", "optimum", "gap", "unreachable"}; None where the family names no utility.

    `attainment` and `violation` are summaries over the preferences. Where constraints can be met on training prompts but not on these,
    `unreachable` says so in words and attainment is unknown.
    """
    utility = _utility(family)
    if utility is None:
        return None
    split, marks = returns.split, landmarks(task, returns.split)
    try:
        best = [optimum(task, split, utility, w_M) for w_M in w_WM]
    except ConfigError as error:
        value_W = _values(task, utility, returns, w_WM, gates_WK, points_WM, marks)[0]
        unknown_W = np.full(len(w_WM), np.nan)
        return _record(utility, unknown_W, value_W, unknown_W, points_WM, marks, unreachable=error.found)
    best_W = np.array([one.value for one in best])
    value_W, start_W = _values(task, utility, returns, w_WM, gates_WK, points_WM, marks)
    if isinstance(utility, Constrained):
        price_WM = np.stack([one.multipliers_M for one in best]) - w_WM
        value_W = value_W - _charge(utility, points_WM, price_WM, marks)
        start_W = start_W - _charge(utility, marks.reference_M[None], price_WM, marks)
    attainment_W = metrics.attainment(value_W, start_W, best_W)
    found = _record(utility, attainment_W, value_W, best_W, points_WM, marks)
    return {**found, "gap": max(one.gap for one in best)}


def sampled_own_utility(task: Task, family: Family, curve: Curve, start: Curve) -> dict[str, Any] | None:
    """The same from samples: U of the mean returns, and of the reference's; attainment is unknown. Ideal points are the ranges' ends."""
    utility = _utility(family)
    if utility is None:
        return None
    low_M, high_M = np.array(task.objectives.low), np.array(task.objectives.high)
    points_WM, reference_M = np.nanmean(curve.returns_WSM, axis=1), np.nanmean(start.returns_WSM, axis=1)[0]
    marks = Landmarks(low_M, high_M, high_M, reference_M)
    if isinstance(utility, LogProduct):
        value_W, start_W = (
            np.array([np.nanmean(utility.scores(c.rewards_WSM[i], w_M, marks) - c.beta * c.kl_WS[i]) for i, w_M in enumerate(c.w_WM)])
            for c in (curve, start)
        )
    else:
        utility.check(task.objectives.count)
        value_W, start_W = (_at(utility, points, curve.w_WM, marks) for points in (points_WM, np.tile(reference_M, (len(points_WM), 1))))
    unknown_W = np.full(len(points_WM), np.nan)
    return {**_record(utility, unknown_W, value_W, unknown_W, points_WM, marks), "gain": value_W - start_W}


def _utility(family: Family) -> Utility | LogProduct | None:
    return None if family.utility is None else UTILITIES.build(family.utility)


def _at(utility: Utility, points_WM: np.ndarray, w_WM: np.ndarray, marks: Landmarks) -> np.ndarray:
    return np.array([float(utility.value(J_M, w_M, marks)) for J_M, w_M in zip(points_WM, w_WM, strict=True)])


def _values(
    task: ExactTask,
    utility: Utility | LogProduct,
    returns: ExactReturns,
    w_WM: np.ndarray,
    gates_WK: np.ndarray,
    points_WM: np.ndarray,
    marks: Landmarks,
) -> tuple[np.ndarray, np.ndarray]:
    """(W,) U of the family and of the reference."""
    if not isinstance(utility, LogProduct):
        return _at(utility, points_WM, w_WM, marks), _at(utility, np.tile(marks.reference_M, (len(w_WM), 1)), w_WM, marks)
    rewards_PRM = task.rewards_PRM(returns.split)

    def value(logp_PR: np.ndarray, w_M: np.ndarray) -> float:
        kl_P = task.returns(logp_PR, returns.split)[1]
        return float(((np.exp(logp_PR) * utility.scores(rewards_PRM, w_M, marks)).sum(1) - task.beta * kl_P).mean())

    known = {gates_K.tobytes(): returns.logp_PR(gates_K) for gates_K in {g.tobytes(): g for g in gates_WK}.values()}
    mine = [value(known[gates_K.tobytes()], w_M) for gates_K, w_M in zip(gates_WK, w_WM, strict=True)]
    return np.array(mine), np.array([value(task.reference_logp_PR(returns.split), w_M) for w_M in w_WM])


def _charge(utility: Constrained, points_WM: np.ndarray, price_WM: np.ndarray, marks: Landmarks) -> np.ndarray:
    c_M = utility.thresholds_M(marks)
    short_WM = np.where(np.isfinite(c_M), np.maximum(np.where(np.isfinite(c_M), c_M, 0.0) - points_WM, 0.0), 0.0)
    return (np.maximum(price_WM, 0.0) * short_WM).sum(1)


def _record(
    utility: Utility | LogProduct,
    attainment_W: np.ndarray,
    value_W: np.ndarray,
    best_W: np.ndarray,
    points_WM: np.ndarray,
    marks: Landmarks,
    unreachable: str | None = None,
) -> dict[str, Any]:
    violation: np.ndarray | None = None if isinstance(utility, LogProduct) else utility.violation(points_WM, marks)
    return {
        "name": utility.registered_name,
        "attainment": summary(attainment_W, worst=np.min),
        "violation": None if violation is None else summary(violation, worst=np.max),
        "value": value_W,
        "optimum": best_W,
        "gap": None,
        "unreachable": unreachable,
    }
