"""Weightings that climb a utility of expected returns instead of w . J: see `paretune.objectives.utilities`.

The weights are lambda / sum lambda, lambda being the utility's gradient or its multipliers. Dividing by the sum changes the length of a
step and nothing else: each J_k contains the KL penalty, so the sum would multiply it as it multiplies the rewards, and beta stays what it
is. Only with sum 1 does this hold, too, where a learner adds the penalty once, in the loss.

J is exact where the learner enumerates. Elsewhere it is a mean over past batches, the older the less they count (`decay`), of a policy
that moves; a batch mean alone would be too noisy for a kink. The ideal point and the reference's returns are exact on exact tasks.
Elsewhere the ideal point is the upper end of each objective's range unless the utility declares it, and the reference's returns
are the mean of the first batch, which is that of the reference unless the training starts from an artifact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from paretune.errors import ConfigError
from paretune.objectives.utilities import UTILITIES, Constrained, Landmarks, MaxMin, Utility
from paretune.training.weightings.base import WEIGHTINGS, State, StepContext, Weighting

__all__ = ["Climb", "Multipliers"]


@dataclass(frozen=True)
class _OfReturns(Weighting):
    """What both share: the estimate of J, and the landmarks."""

    utility: Mapping[str, Any]
    decay: float = 0.9

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ConfigError(
                f"weighting {self.registered_name}: decay is at least 0 and below 1",
                found=f"decay = {self.decay:g}",
                remedy="0.9 looks back over about ten batches",
            )
        self.seeks  # noqa: B018 - a utility that does not fit is refused here

    @cached_property
    def seeks(self) -> Any:
        """The utility itself."""
        built = UTILITIES.build(self.utility)
        self._refuse(built)
        return built

    def _refuse(self, built: Any) -> None:
        raise AssertionError("subclasses say which utilities they climb")

    def start(self, count: int) -> State:
        self.seeks.check(count)
        return {"sum": [0.0] * count, "mass": [0.0] * count, "reference": None}

    def estimate(self, state: State, context: StepContext) -> tuple[np.ndarray, Landmarks, State]:
        """(M,) J, the landmarks, and the state with this batch in it. An objective that was never scored stands at its low."""
        scored_NM = ~np.isnan(context.returns_NM)
        count_M = scored_NM.sum(0)
        mean_M = np.where(scored_NM, context.returns_NM, 0.0).sum(0) / np.maximum(count_M, 1)
        decay_M = np.where(count_M > 0, 0.0 if context.exact else self.decay, 1.0)
        sum_M = decay_M * np.array(state["sum"]) + (1 - decay_M) * mean_M
        mass_M = decay_M * np.array(state["mass"]) + (1 - decay_M)
        J_M = np.where(mass_M > 0, sum_M / np.where(mass_M > 0, mass_M, 1.0), context.low_M)
        reference = J_M.tolist() if state["reference"] is None else state["reference"]
        marks = context.landmarks or Landmarks(context.low_M, context.high_M, context.high_M, np.array(reference))
        return J_M, marks, {**state, "sum": sum_M.tolist(), "mass": mass_M.tolist(), "reference": reference}


@WEIGHTINGS.register("climb")
@dataclass(frozen=True)
class Climb(_OfReturns):
    """The gradient of a smooth utility at the present returns: `tchebycheff`, `log-sum`.

    Source: the chain rule; for smooth Tchebycheff 2402.19078. Differs: at the level of expected returns, not of samples or tokens.
    Hides: a utility with a small mu is nearly kinked, and its weights swing from step to step.
    """

    def _refuse(self, built: Any) -> None:
        if not isinstance(built, Utility) or not built.smooth:
            raise ConfigError(
                "weighting climb follows the gradient of a smooth utility of returns",
                found=f"utility {built.registered_name}",
                remedy='use the weighting "multipliers" for max-min and constrained; log-product is a scalarizer, not a weighting',
            )

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        J_M, marks, state = self.estimate(state, context)
        return _rows(self.seeks.gradient(J_M, context.w_NM[0], marks), context), state


@WEIGHTINGS.register("multipliers")
@dataclass(frozen=True)
class Multipliers(_OfReturns):
    """Multipliers that grow while what they stand for falls short: `max-min` (shares of a simplex) and `constrained` (prices >= 0).

    Each step adds `rate` times the shortfall to a multiplier (its logarithm for max-min, as in mirror descent; so too for constrained
    with `logarithmic`, as in Safe-RLHF), and `damping` times the shortfall is added to what is used, without being kept: without it, policy
    and multipliers circle each other. Shortfalls are in units of the objectives' ranges.

    Source: dual ascent; Safe-RLHF (2310.12773) for A = (A_r - sum l A_c) / (1 + sum l), which for preferences that sum to 1 is what
    dividing by the sum of weights gives; the damping is that of PID Lagrangians (2007.03964). Differs: see there: both of Safe-RLHF's
    forms, divided and additive, differ by the length of a step alone. Hides: where thresholds cannot all be met the prices grow without
    end and the preference loses its influence; exact tasks refuse such thresholds beforehand, elsewhere the violation is reported.
    """

    rate: float = 1.0
    damping: float = 10.0
    logarithmic: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not (0 < self.rate < np.inf and 0 <= self.damping < np.inf):
            raise ConfigError(
                "weighting multipliers: rate is positive and damping at least 0",
                found=f"rate = {self.rate:g}, damping = {self.damping:g}",
                remedy="leave them out for the defaults",
            )

    def _refuse(self, built: Any) -> None:
        if not isinstance(built, MaxMin | Constrained):
            raise ConfigError(
                "weighting multipliers is for utilities with kinks: max-min, constrained",
                found=f"utility {built.registered_name}",
                remedy='use the weighting "climb" for smooth ones',
            )

    def start(self, count: int) -> State:
        return {**super().start(count), "integral": [0.0] * count}

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        J_M, marks, state = self.estimate(state, context)
        w_M, kept_M = context.w_NM[0], np.array(state["integral"])
        follow = self._shares if isinstance(self.seeks, MaxMin) else self._prices
        lambda_M, kept_M = follow(J_M / (marks.high_M - marks.low_M), w_M, marks, kept_M)
        return _rows(lambda_M / (marks.high_M - marks.low_M), context), {**state, "integral": kept_M.tolist()}

    def _shares(self, unit_M: np.ndarray, w_M: np.ndarray, marks: Landmarks, kept_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Multipliers of max-min: an objective counts more the further its gain lies below its share w_k of the common level."""
        base_M = self.seeks.base_M(marks) / (marks.high_M - marks.low_M)
        gain_M, on_M = unit_M - base_M, w_M > 0
        now_M = _softmax(-kept_M, on_M)
        level = (now_M @ gain_M) / (now_M @ w_M)
        above_M = np.where(on_M, gain_M - level * w_M, 0.0)
        kept_M = kept_M + self.rate * above_M
        return _softmax(-kept_M - self.damping * above_M, on_M), kept_M

    def _prices(self, unit_M: np.ndarray, w_M: np.ndarray, marks: Landmarks, kept_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The preference, and the prices of the constraints on top of it."""
        scale_M = marks.high_M - marks.low_M
        threshold_M = self.seeks.thresholds_M(marks)
        on_M = np.isfinite(threshold_M)
        short_M = np.where(on_M, np.where(on_M, threshold_M, 0.0) / scale_M - unit_M, 0.0)
        if self.logarithmic:
            kept_M = np.minimum(kept_M + self.rate * short_M, MAX_LOG)
            price_M = np.where(on_M, np.exp(kept_M + self.damping * short_M), 0.0)
        else:
            kept_M = np.maximum(kept_M + self.rate * short_M, 0.0)
            price_M = np.maximum(kept_M + self.damping * short_M, 0.0)
        return w_M * scale_M + price_M, kept_M


MAX_LOG = 12.0  # exp(12) to 1 leaves nothing of the preference: prices of constraints that cannot be met stop there


def _rows(lambda_M: np.ndarray, context: StepContext) -> np.ndarray:
    """(N, M) the same weights for every row, with sum 1."""
    return np.tile(lambda_M / lambda_M.sum(), (len(context.w_NM), 1))


def _softmax(logits_M: np.ndarray, on_M: np.ndarray) -> np.ndarray:
    raised_M = np.where(on_M, np.exp(np.where(on_M, logits_M, -np.inf) - logits_M[on_M].max()), 0.0)
    return raised_M / raised_M.sum()
