"""The exact optimum of a concave utility of expected returns, over all policies, on exact tasks.

The attainable returns, with everything below them, are a convex set (KL is convex in the policy), whose support function is closed form:

    h(lambda) = max over pi of lambda . J(pi) = mean over prompts of s beta log E_ref exp(lambda . r / (s beta)), s = sum lambda,

attained by pi*_lambda, so that its gradient is J(pi*_lambda). For a concave U that rises with every J_k

    max over pi of U(J(pi)) = min over lambda >= 0 of h(lambda) + sup over x of (U(x) - lambda . x),

a convex problem in at most M weights. It is solved by an interior-point method; the policy pi*_lambda that it ends with gives the value
from below and the problem itself a bound from above. Their difference is the `gap`, which needs no trust in the solver.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import logsumexp

from paretune.errors import ConfigError, ParetuneError
from paretune.objectives.utilities import Constrained, Dual, Landmarks, LogProduct, MaxMin, Utility

if TYPE_CHECKING:
    from paretune.tasks.exact.task import ExactTask

__all__ = ["MAX_GAP", "Optimum", "landmarks", "least_shortfall", "optimum", "refuse_unreachable"]

MAX_GAP = 1e-6
BARRIER = 1e-9  # at the end, per weight
BRINK = 1e-7  # thresholds that can only just be met are met up to this


@dataclass(frozen=True)
class Optimum:
    """The best policy is pi*_w with w = `weights_M`; its returns are `J_M`. `value` <= U* <= `value + gap`."""

    value: float
    J_M: np.ndarray
    weights_M: np.ndarray  # lambda / sum lambda
    multipliers_M: np.ndarray  # lambda itself: dU*/dJ_k; for a constrained utility less the preference, the prices of its constraints
    gap: float


def landmarks(task: Any, split: str = "train") -> Landmarks:
    """Range, ideal point and the reference's returns of an exact task, for the split."""
    known: dict[str, Landmarks] = task.__dict__.setdefault("_landmarks", {})
    if split not in known:
        ideal_M = np.diagonal(task.front(split, np.eye(task.objectives.count)).points_KM).copy()
        reference_M = task.J_M(task.reference_logp_PR(split), split)
        known[split] = Landmarks(np.array(task.objectives.low), np.array(task.objectives.high), ideal_M, reference_M)
    return known[split]


def optimum(task: ExactTask, split: str, utility: Utility | LogProduct, w_M: np.ndarray) -> Optimum:
    """The best that any policy does for the utility at the preference `w_M`.

    Raises ConfigError with the bound where constraints cannot all be met, and ParetuneError where the gap exceeds 1e-6.
    """
    w_M, marks = np.asarray(w_M, dtype=np.float64), landmarks(task, split)
    if isinstance(utility, LogProduct):
        return _of_responses(task, split, utility, w_M, marks)
    utility.check(task.objectives.count)
    slack = 0.0
    if isinstance(utility, Constrained):
        refuse_unreachable(task, split, utility)
        slack = max(0.0, BRINK + _shortfall(task, split, utility, marks))
    found = _solve(task, split, _lowered(utility, marks, slack).dual(w_M, marks))
    upper, lambda_M = found
    J_M = task.J_M(task.optimum_logp_PR(lambda_M / lambda_M.sum(), split), split)
    value = float(utility.value(J_M, w_M, marks))
    gap = max(0.0, upper - value)
    if isinstance(utility, Constrained):
        broken = utility.violation(J_M, marks)
        gap += max(0.0, float(broken) - slack)
    if gap > MAX_GAP * max(1.0, abs(value)):
        raise ParetuneError(
            f"the optimum of a utility is known to {MAX_GAP:g}",
            found=f"{utility.registered_name} at w = {w_M.round(4).tolist()} on the {split} prompts: gap {gap:.3g}",
            remedy="report this task, utility and preference",
        )
    return Optimum(value, J_M, lambda_M / lambda_M.sum(), lambda_M, gap)


def least_shortfall(task: ExactTask, split: str, thresholds_M: np.ndarray) -> float:
    """min over policies of max_k (c_k - J_k) over the finite thresholds: positive where they contradict each other."""
    on_M = np.isfinite(thresholds_M)
    if not on_M.any():
        return -np.inf
    range_M = np.ones(len(thresholds_M))
    marks = Landmarks(np.zeros_like(range_M), range_M, range_M, range_M)
    worst = MaxMin(base=tuple(np.where(on_M, thresholds_M, 0.0)))
    upper, _ = _solve(task, split, worst.dual(on_M / on_M.sum(), marks))
    return -upper * len(on_M) / on_M.sum()  # `MaxMin` counts gains in units of M w_k


def refuse_unreachable(task: ExactTask, split: str, utility: Constrained) -> None:
    """ConfigError, with the bound, where no policy keeps all constraints."""
    marks = landmarks(task, split)
    short = _shortfall(task, split, utility, marks)
    if short > BRINK:
        best = ", ".join(f"{name} {value:.4f}" for name, value in zip(task.objectives.names, marks.ideal_M, strict=True))
        asked = ", ".join(f"{c:.4f}" for c in utility.thresholds_M(marks))
        raise ConfigError(
            "some policy meets all thresholds at once",
            found=f"thresholds {asked} on the {split} prompts; every policy misses one of them by {short:.4f} or more",
            remedy=f"lower them all by {short:.4f}; alone, the objectives reach at most: {best}",
        )


def _shortfall(task: ExactTask, split: str, utility: Constrained, marks: Landmarks) -> float:
    known: dict[Any, float] = task.__dict__.setdefault("_shortfalls", {})
    thresholds_M = utility.thresholds_M(marks)
    key = (split, thresholds_M.tobytes())
    if key not in known:
        known[key] = least_shortfall(task, split, thresholds_M)
    return known[key]


def _lowered(utility: Utility, marks: Landmarks, slack: float) -> Utility:
    if not isinstance(utility, Constrained) or slack == 0.0:
        return utility
    return Constrained(thresholds=tuple(float(c) - slack if np.isfinite(c) else None for c in utility.thresholds_M(marks)))


def _of_responses(task: ExactTask, split: str, utility: LogProduct, w_M: np.ndarray, marks: Landmarks) -> Optimum:
    """E[s] - beta KL is largest at the reference tilted by exp(s / beta)."""
    tilt_PR = task.reference_logp_PR(split) + utility.scores(task.rewards_PRM(split), w_M, marks) / task.beta
    scale_P1 = logsumexp(tilt_PR, axis=1, keepdims=True)
    J_M = task.J_M(tilt_PR - scale_P1, split)
    return Optimum(float(task.beta * scale_P1.mean()), J_M, np.full(len(w_M), np.nan), np.full(len(w_M), np.nan), 0.0)


def _support(task: ExactTask, split: str, lambda_M: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """h(lambda), its gradient J(pi*_lambda) (M,) and its second derivatives (M, M)."""
    total = lambda_M.sum()
    rewards_PRM = task.rewards_PRM(split)
    mean_PR = rewards_PRM @ (lambda_M / total)
    tilt_PR = task.reference_logp_PR(split) + mean_PR / task.beta
    scale_P1 = logsumexp(tilt_PR, axis=1, keepdims=True)
    p_PR = np.exp(tilt_PR - scale_P1)
    kl_P = (p_PR * mean_PR).sum(1) / task.beta - scale_P1[:, 0]
    J_M = (np.einsum("pr,prm->pm", p_PR, rewards_PRM) - task.beta * kl_P[:, None]).mean(0)
    # J_k changes with lambda as the covariance of r_k - (lambda . r) / s does: moving all weights alike changes nothing.
    apart_PRM = rewards_PRM - mean_PR[..., None]
    centred_PRM = apart_PRM - np.einsum("pr,prm->pm", p_PR, apart_PRM)[:, None]
    curve_MM = np.einsum("pr,prj,prk->jk", p_PR, centred_PRM, centred_PRM) / len(p_PR) / (total * task.beta)
    return float(total * task.beta * scale_P1.mean()), J_M, curve_MM


def _solve(task: ExactTask, split: str, dual: Dual) -> tuple[float, np.ndarray]:
    """The dual's least value, which bounds the utility from above, and its weights lambda (M,)."""

    def objective(q: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        h, J_M, curve_MM = _support(task, split, dual.fixed_M + dual.slope_MQ @ q)
        value, slope_Q, curve_Q = dual.conjugate(q)
        return h + value, dual.slope_MQ.T @ J_M + slope_Q, dual.slope_MQ.T @ curve_MM @ dual.slope_MQ + np.diag(curve_Q)

    q = _barrier(objective, dual.start_Q, simplex=dual.simplex) if len(dual.start_Q) else dual.start_Q
    return objective(q)[0], dual.fixed_M + dual.slope_MQ @ q


def _barrier(objective: Callable[[np.ndarray], tuple[float, np.ndarray, np.ndarray]], q: np.ndarray, *, simplex: bool) -> np.ndarray:
    """argmin over q > 0 (and sum q = 1): Newton's method on objective - t sum log q, with t going to 0 (Boyd & Vandenberghe, ch. 11)."""
    n = len(q)
    if simplex and n == 1:
        return np.ones(1)
    t = 1e-1
    while True:
        for _ in range(60):
            value, slope_Q, curve_QQ = objective(q)
            slope_Q, curve_QQ = slope_Q - t / q, curve_QQ + np.diag(t / q**2)
            system = np.zeros((n + simplex, n + simplex))
            system[:n, :n] = curve_QQ
            system[:n, n:] = system[n:, :n] = 1.0
            step_Q = np.linalg.lstsq(system, np.concatenate([-slope_Q, np.zeros(int(simplex))]), rcond=None)[0][:n]
            decrease = -slope_Q @ step_Q
            if decrease < 1e-3 * t:
                break
            size = min(1.0, 0.99 / max(1e-300, float((-step_Q / q).max())))
            at = value - t * np.log(q).sum()
            while size > 1e-12 and objective(q + size * step_Q)[0] - t * np.log(q + size * step_Q).sum() > at - 0.1 * size * decrease:
                size /= 2
            if size <= 1e-12:
                break
            q = q + size * step_Q
        if t <= BARRIER:
            return q / q.sum() if simplex else q
        t /= 10
