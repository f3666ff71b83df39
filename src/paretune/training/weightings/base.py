"""Weightings: how the weights of one training step follow from the preference and from what the training has seen.

A learner asks its weighting before every step, with the batch that the step will use, and then climbs sum_k weights_k * J_k. The answer
is constant during the step, so whatever depends on expected returns (Tchebycheff, worst case, constraints), on how the
objectives' gradients meet, or on a bandit, is a rule of weights, and both learners run it alike. State is a JSON value in the
checkpoint, so that a resumed training goes on with the same weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.objectives.utilities import Landmarks
from paretune.registry import Registry
from paretune.types import Prompt

__all__ = ["Balanced", "Fixed", "StepContext", "State", "WEIGHTINGS", "Weighting"]

WEIGHTINGS = Registry("weighting", "paretune.training.weightings")

State = dict[str, Any]
"""What a weighting carries from step to step: JSON."""


@dataclass(frozen=True)
class StepContext:
    """One batch before its step. The exact learner has a row per prompt, holding expectations; the sampled one a row per response."""

    step: int
    steps: int
    w_NM: np.ndarray  # the preference that each row was asked for
    returns_NM: np.ndarray  # rewards minus beta times the row's KL; NaN = unscored
    covariance_MM: np.ndarray  # of the rewards of one prompt's responses under the present policy, mean over prompts
    prompts: Sequence[Prompt]  # of the rows
    low_M: np.ndarray  # the objectives' ranges
    high_M: np.ndarray
    exact: bool = False  # True: `returns_NM` are expectations
    landmarks: Landmarks | None = None  # on exact tasks
    seed: int = 0  # of the training, for weightings that draw
    gramian_MM: np.ndarray | None = None  # inner products of the gradients of J_k; only for weightings with `needs_gramian`


class Weighting(ABC):
    """Base of all weightings; a frozen dataclass registered in WEIGHTINGS."""

    registered_name: ClassVar[str]
    version: ClassVar[int]
    takes_sampled_preferences: ClassVar[bool] = False  # True where rows may differ in their preference
    needs_gramian: ClassVar[bool] = False  # True: weights are the same for all rows, and the step is the sum of the objectives' gradients

    def check(self) -> None:  # noqa: B027
        """ConfigError where this installation cannot run it; asked before anything runs."""

    def start(self, count: int) -> State:
        """The state before the first step, for `count` objectives."""
        return {}

    @abstractmethod
    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        """(N, M) weights of this step, and the next state. A pure function. Not negative, but for weightings with `needs_gramian`."""

    def measures(self, state: State, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> dict[str, float]:
        """What returns `J_M` are worth to a training at `w_M`: "utility" is w . J, unless its weights climb another one."""
        return {"utility": float(np.where(w_M > 0, w_M * J_M, 0.0).sum())}


@WEIGHTINGS.register("fixed")
@dataclass(frozen=True)
class Fixed(Weighting):
    """The preference itself: the training climbs J_w.

    Source: the weighted sum. Differs: nothing. Hides: nothing.
    """

    takes_sampled_preferences: ClassVar[bool] = True

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        return context.w_NM, state


@WEIGHTINGS.register("balanced")
@dataclass(frozen=True)
class Balanced(Weighting):
    """The preference, scaled by how little there is to gain at it: every preference of a conditioned training counts alike.

    To second order the gain that is possible at w is w'Sw / (2 beta), S the covariance of the rewards under the reference. Where
    objectives conflict it is several times smaller between the vertices than at them, so that plain sampling of preferences hardly
    trains the middle. Rows are scaled by (mean of S's diagonal / w'Sw) ** power; S is the mean over the first `window` steps so far.

    Source: ours. Differs: nothing. Hides: S is estimated from the first batches, in which the policy is no longer quite the reference.
    """

    power: float = 1.0
    window: int = 10
    takes_sampled_preferences: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.power <= 2 or self.window < 1:
            raise ConfigError(
                "weighting balanced: power lies between 0 and 2, window is at least 1",
                found=f"power = {self.power:g}, window = {self.window}",
                remedy="power = 1 balances the gains that are possible",
            )

    def start(self, count: int) -> State:
        return {"covariance": [[0.0] * count for _ in range(count)], "steps": 0}

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        sum_MM, steps = np.array(state["covariance"]), state["steps"]
        if steps < self.window:
            sum_MM, steps = sum_MM + context.covariance_MM, steps + 1
        mean_MM = sum_MM / steps
        gain_N = np.einsum("nj,jk,nk->n", context.w_NM, mean_MM, context.w_NM)
        typical = np.trace(mean_MM) / len(mean_MM)
        scale_N = (typical / np.maximum(gain_N, 1e-2 * typical)) ** self.power if typical > 0 else np.ones(len(gain_N))
        return context.w_NM * scale_N[:, None], {"covariance": sum_MM.tolist(), "steps": steps}
