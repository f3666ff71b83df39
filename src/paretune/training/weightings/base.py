"""Weightings: how the weights of one training step follow from the preference and from what the training has seen.

A learner asks its weighting before every step, with the batch that the step will use, and then climbs sum_k weights_k * J_k. The answer
is constant during the step, so whatever depends on expected returns (Tchebycheff, worst case, constraints), on how the
objectives' gradients meet, or on a bandit, is a rule of weights, and both learners run it alike. State is a JSON value in the
checkpoint, so that a resumed training goes on with the same weights.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from paretune.errors import ConfigError
from paretune.objectives.terms import Course, Terms
from paretune.objectives.utilities import UTILITIES, Landmarks
from paretune.registry import Registry, checked, describe
from paretune.types import Prompt

__all__ = ["Balanced", "Fixed", "Scheduled", "StepContext", "State", "WEIGHTINGS", "Weighting", "under_terms"]

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
    of_returns: ClassVar[bool] = False  # True: its weights climb a utility of returns other than w . J, which `measures` says

    def check(self) -> None:  # noqa: B027
        """ConfigError where this installation cannot run it; asked before anything runs."""

    def start(self, count: int) -> State:
        """The state before the first step, for `count` objectives."""
        return {}

    @abstractmethod
    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        """(N, M) weights of this step, and the next state. A pure function. Not negative, but for weightings with `needs_gramian`."""

    def arrived(self, step: int, steps: int) -> bool:
        """Whether weights at `step` are those that the rule is about; before, stopping rules do not count."""
        return True

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


@WEIGHTINGS.register("schedule")
@dataclass(frozen=True)
class Scheduled(Weighting):
    """Weights by step: the preference that another weighting is given moves along a course to the one that was asked for.

    The preference of every row moves, so that trainings with sampled preferences are scheduled as well: their gates are those of the
    preference that was asked for from the first step on. A training is measured by the preference that was asked for, too.

    Source: curricula of reward weights, as users of TRL ask for (issue 3036). Differs: a share of the training instead of a number of
    steps, and it ends at the preference, so that what a family gives at w is still what was asked for at w.
    Hides: samples that were spent on other weights; a policy that has moved far from the reference for them may not come back.
    """

    course: Mapping[str, Any]
    weighting: Mapping[str, Any] = field(default_factory=lambda: {"name": "fixed"})

    def __post_init__(self):
        self._course, self._rule  # noqa: B018 - what does not fit is refused here

    @cached_property
    def _course(self) -> Course:
        given = checked("terms.schedule", Course, self.course)
        return given.named([f"{k + 1}" for k in range(len(given.start or given.rows[0][1]))])

    @cached_property
    def _rule(self) -> Weighting:
        return WEIGHTINGS.build(self.weighting)

    @property
    def takes_sampled_preferences(self) -> bool:  # type: ignore[override]
        return self._rule.takes_sampled_preferences

    @property
    def needs_gramian(self) -> bool:  # type: ignore[override]
        return self._rule.needs_gramian

    @property
    def of_returns(self) -> bool:  # type: ignore[override]
        return self._rule.of_returns

    def check(self) -> None:
        self._rule.check()

    def start(self, count: int) -> State:
        rows = self._course.rows or ((0.0, self._course.start or ()),)
        if any(len(row) != count for _, row in rows):
            raise ConfigError(
                "weighting schedule: its preferences have one weight per objective",
                found=f"{', '.join(str(list(row)) for _, row in rows)} for {count} objectives",
                remedy="give each row as many weights as there are objectives",
            )
        return self._rule.start(count)

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        if context.steps < 1:
            raise ConfigError(
                "weights by step need to know how many steps a training has",
                found="a trainer that does not say: no trainer_state, or no max_steps in it",
                remedy="hand trainer_state on to the drop-in, as TRL gives it",
            )
        share = min(1.0, context.step / (context.steps - 1)) if context.steps > 1 else 1.0
        moved_NM = self._course.at(share, context.w_NM)
        return self._rule.weights(state, dataclasses.replace(context, w_NM=moved_NM))

    def arrived(self, step: int, steps: int) -> bool:
        return step >= self._course.until * (steps - 1)

    def measures(self, state: State, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> dict[str, float]:
        return self._rule.measures(state, J_M, w_M, marks)


def under_terms(weighting: Mapping[str, Any], terms: Mapping[str, Any]) -> Mapping[str, Any]:
    """The weighting of a training whose task has these terms (as `describe` says them); the same where it is that already."""
    scheduled = weighting["name"] == Scheduled.registered_name
    inner: Mapping[str, Any] = weighting["weighting"] if scheduled else weighting
    if (utility := Terms(targets=terms.get("targets"), constraints=terms.get("constraints")).utility()) is not None:
        rule = {"name": "climb" if utility["name"] == "tchebycheff" else "multipliers", "utility": describe(UTILITIES.build(utility))}
        described = describe(WEIGHTINGS.build(rule))
        wanted = {**described, **inner}
        wanted["utility"] = describe(UTILITIES.build(wanted["utility"]))
        own = inner["name"] == described["name"] and describe(WEIGHTINGS.build(wanted)) != described
        if own or inner["name"] not in (Fixed.registered_name, described["name"]):
            raise ConfigError(
                "targets and constraints of terms: are the weighting of a training, which has one",
                found=f"a method whose trainings have the weighting {inner['name']}" + (" with settings of its own" if own else ""),
                remedy="use a method that leaves it to the terms, such as linear or experts; or leave targets and constraints out",
            )
        inner = described
    if (course := terms.get("schedule")) is None:
        return inner
    return describe(Scheduled(course=course, weighting=inner))
