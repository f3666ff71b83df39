"""Weights that follow from the returns of a training: covariance targets, and a bandit whose arms are the objectives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from paretune.errors import ConfigError
from paretune.seeds import generator
from paretune.training.weightings.base import WEIGHTINGS, State, StepContext, Weighting
from paretune.training.weightings.gradient import tilted

__all__ = ["CovarianceTargeted", "Exp3", "exp3_probabilities"]


@WEIGHTINGS.register("ctwa")
@dataclass(frozen=True)
class CovarianceTargeted(Weighting):
    """The weight of an objective grows while its reward hardly goes with the advantage: to first order, while it does not gain.

    Statistic: the correlation of r_k and the advantage sum_j w_j (r_j - mean) within a prompt, (S w)_k / sqrt(S_kk w'Sw) with S
    the rewards' covariance, smoothed: ema <- (1 - smoothing) ema + smoothing * statistic. log w_k grows by
    rate * max(0, target - ema), unless the mean return of objective k has reached the share `enough` of its range.

    Source: CTWA (2602.06869), paper and the authors' code.
    Differs: correlation instead of covariance (an option of their code), because targets then mean the same for every scale of reward;
        one update per batch and on-policy, so that no advantage is clipped; weights start at the preference and are kept at sum 1, or
        the price of KL would grow with them; an objective with weight 0 stays out.
    Hides: it bends the preference towards objectives that conflict with it; at the optimum of w . J nothing says that all correlate.
    """

    target: float = 0.1
    rate: float = 0.05
    smoothing: float = 0.1
    enough: float = 0.95

    def __post_init__(self):
        if not (-1 <= self.target <= 1 and 0 < self.smoothing <= 1 and self.rate >= 0):
            raise ConfigError(
                "weighting ctwa: target is a correlation, smoothing lies in (0, 1], rate is not negative",
                found=f"target = {self.target:g}, smoothing = {self.smoothing:g}, rate = {self.rate:g}",
                remedy="leave them out for 0.1, 0.1 and 0.05",
            )

    def start(self, count: int) -> State:
        return {"ema": None, "change": [0.0] * count}

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        change_M = np.array(state["change"])
        w_M, s_MM = tilted(context.w_NM, change_M)[0], context.covariance_MM
        spread_M = np.sqrt(np.maximum(np.diag(s_MM) * (w_M @ s_MM @ w_M), 0.0))
        known_M = spread_M > 1e-12
        found_M = np.where(known_M, s_MM @ w_M / np.where(known_M, spread_M, 1.0), 0.0)
        before_M = found_M if state["ema"] is None else np.array(state["ema"])
        ema_M = (1 - self.smoothing) * before_M + self.smoothing * found_M
        reached_M = (_means(context.returns_NM) - context.low_M) / (context.high_M - context.low_M)
        short_M = np.where(known_M & (reached_M < self.enough), np.maximum(self.target - ema_M, 0.0), 0.0)
        change_M = change_M + self.rate * short_M
        return tilted(context.w_NM, change_M), {"ema": ema_M.tolist(), "change": (change_M - change_M.max()).tolist()}


@WEIGHTINGS.register("exp3")
@dataclass(frozen=True)
class Exp3(Weighting):
    """An adversarial bandit with M + 1 arms: an arm raises the weight of its objective, the last one changes nothing.

    Every `every` steps the arm that was pulled last is paid the mean over objectives of how much returns have risen above their mean so
    far, and the next arm is drawn. Pulling arm k multiplies the weight of objective k by exp(gamma / (M p_k)), p_k being that weight's
    own Exp3 probability, as if a second bandit had been paid 1 for it.

    Source: DynaOpt (2403.13578), paper and the authors' code (gamma 0.07, M + 1 arms, every 10 steps).
    Differs: the returns of the training batches, which are fresh samples of the present policy, stand for a validation set, and cost
        nothing; returns include the KL penalty and are scaled to the objectives' ranges; the weights multiply the preference.
    Hides: a pay of some hundredths over a few dozen pulls moves the arms' probabilities very little: the pulls are nearly uniform.
    """

    gamma: float = 0.07
    every: int = 10

    def __post_init__(self):
        if not 0 < self.gamma <= 1 or self.every < 1:
            raise ConfigError(
                "weighting exp3: gamma lies in (0, 1], every is at least 1",
                found=f"gamma = {self.gamma:g}, every = {self.every}",
                remedy="leave them out for the published 0.07 and 10",
            )

    def start(self, count: int) -> State:
        history = {"sum": [0.0] * count, "batches": 0}
        return {"arms": [0.0] * (count + 1), "change": [0.0] * count, "pulled": None, "recent": history, "past": history}

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        arms, change_M, pulled = np.array(state["arms"]), np.array(state["change"]), state["pulled"]
        unit_M = (_means(context.returns_NM) - context.low_M) / (context.high_M - context.low_M)
        recent, past = _add(state["recent"], unit_M, 1), state["past"]
        if context.step % self.every == 0:
            if pulled is not None and past["batches"]:
                risen_M = np.array(recent["sum"]) / recent["batches"] - np.array(past["sum"]) / past["batches"]
                p = exp3_probabilities(arms, self.gamma)[pulled]
                arms[pulled] += self.gamma / len(arms) * risen_M.mean() / p
                arms -= arms.max()
            past, recent = _add(past, recent["sum"], recent["batches"]), {"sum": [0.0] * len(unit_M), "batches": 0}
            cumulative = np.cumsum(exp3_probabilities(arms, self.gamma))
            draw = generator(context.seed, "exp3", context.step).random() * cumulative[-1]
            pulled = min(int(np.searchsorted(cumulative, draw, side="right")), len(unit_M))
            if pulled < len(unit_M):
                change_M[pulled] += self.gamma / len(change_M) / exp3_probabilities(change_M, self.gamma)[pulled]
                change_M -= change_M.max()
        after = {"arms": arms.tolist(), "change": change_M.tolist(), "pulled": pulled, "recent": recent, "past": past}
        return tilted(context.w_NM, change_M), after


def exp3_probabilities(log_weights: np.ndarray, gamma: float) -> np.ndarray:
    """(1 - gamma) times the normalized weights plus gamma times uniform ones."""
    raw = np.exp(log_weights - log_weights.max())
    return (1 - gamma) * raw / raw.sum() + gamma / len(raw)


def _means(returns_NM: np.ndarray) -> np.ndarray:
    """(M,) means of what is scored; 0 where nothing is."""
    scored = ~np.isnan(returns_NM)
    return np.where(scored, returns_NM, 0.0).sum(0) / np.maximum(scored.sum(0), 1)


def _add(history: State, sums: np.ndarray | list[float], batches: int) -> State:
    return {"sum": (np.array(history["sum"]) + np.array(sums)).tolist(), "batches": history["batches"] + batches}
