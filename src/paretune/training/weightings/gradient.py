"""Weights from the objectives' gradients: aggregators of multi-task learning, and the influence of one objective on the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.seeds import seed_for
from paretune.training.gradients import aggregate, check_aggregator
from paretune.training.weightings.base import WEIGHTINGS, State, StepContext, Weighting

__all__ = ["GradientLevel", "Influence"]


@WEIGHTINGS.register("gradient")
@dataclass(frozen=True)
class GradientLevel(Weighting):
    """The step is an aggregator's combination of the objectives' gradients, computed from their Gramian.

    Source: MGDA, PCGrad, CAGrad, Nash-MTL, IMTL-G, UPGrad, Aligned-MTL; `training.gradients` has the papers and how a preference enters.
    Differs: the direction is the aggregator's, but the weights are divided by the sum of their absolute values, so that a step has the
        length of a weighted mean of gradients and a learning rate means the same for all.
    Hides: they stop wherever gradients oppose each other, and Adam or Muon with momentum blur weights that change from step to step.
    """

    aggregator: Literal["mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g", "upgrad", "aligned_mtl"] = "upgrad"
    c: float = 0.5  # of CAGrad: how far its step may be from the mean gradient

    needs_gramian: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.c < 1:
            raise ConfigError(
                "weighting gradient: c lies in [0, 1)", found=f"c = {self.c:g}", remedy="0.5 is usual; 0 is the mean gradient"
            )

    def check(self) -> None:
        check_aggregator(self.aggregator)

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        assert context.gramian_MM is not None, "the learner gives what a weighting needs"
        seed = seed_for(context.seed, "aggregator", context.step)
        weights_M = aggregate(self.aggregator, context.gramian_MM, context.w_NM[0], seed=seed, c=self.c)
        total = np.abs(weights_M).sum()
        return np.tile(weights_M / total if total > 0 else weights_M, (len(context.w_NM), 1)), state


@WEIGHTINGS.register("influence")
@dataclass(frozen=True)
class Influence(Weighting):
    """The weight of an objective grows with how much its gradient helps all of them: w <- softmax(log w + eta s), s_i = sum_j <g_i, g_j>.

    Source: gradient-based weight optimization (2509.11452), paper and the authors' code.
    Differs: it starts at the preference, so that an objective with weight 0 stays out; s is in units of the mean squared norm of
        the gradients (their code divides by a constant that fits one model's gradients); the penalty for KL is part of every gradient.
    Hides: under conflict s is smallest for the objective that is hurt most, and the weights run to a vertex: eta says how soon.
    """

    eta: float = 0.01

    needs_gramian: ClassVar[bool] = True

    def __post_init__(self):
        if self.eta < 0:
            raise ConfigError("weighting influence: eta is not negative", found=f"eta = {self.eta:g}", remedy="0 keeps the preference")

    def start(self, count: int) -> State:
        return {"change": [0.0] * count}  # of the log weights, since the start

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        assert context.gramian_MM is not None, "the learner gives what a weighting needs"
        typical = np.trace(context.gramian_MM) / len(context.gramian_MM)
        change_M = np.array(state["change"])
        if typical > 0:
            change_M = change_M + self.eta * context.gramian_MM.sum(1) / typical
        return tilted(context.w_NM, change_M), {"change": (change_M - change_M.max()).tolist()}


def tilted(w_NM: np.ndarray, change_M: np.ndarray) -> np.ndarray:
    """(N, M) preferences times exp(change), summing to 1 again; what is 0 stays 0."""
    raw_NM = w_NM * np.exp(change_M - change_M.max())
    total_N1 = raw_NM.sum(1, keepdims=True)
    return np.where(total_N1 > 0, raw_NM / np.where(total_N1 > 0, total_N1, 1.0), w_NM)
