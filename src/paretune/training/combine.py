"""How the objectives of a training are combined: one described object that every loop asks for weights and advantages.

A step turns the (N, M) rewards of its responses into one advantage per response. Six settings say how:

    weighting      the preference -> the weights of this step, from what the training has seen so far
    scalarizer     the rewards of a response and its weights -> one number ("linear": the weighted sum)
    scalarize_at   "reward": combine, then normalize; "advantage": normalize each objective, then combine
    baseline       what a response is compared with: the other responses to its prompt, or the mean of all
    normalize      by which spread a difference is divided: none, its own over the group or the batch, that of the batch's returns
    aggregation    "learner": the four settings above; another name: an advantage of its own, see `paretune.training.advantages`

The first three and the last come from the `TrainSpec`, the other two from the learner. The embedded learners, the exact learner, TRL's
learners and the drop-in reward ask the same object, so that a combination means the same in all of them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from paretune.errors import ConfigError, RewardError, nearest
from paretune.objectives.utilities import Landmarks, check_scalarizer, scalarize
from paretune.training.advantages import (
    AGGREGATIONS,
    BASELINES,
    CENTERED,
    NORMALIZED_OVER,
    advantages,
    aggregate_advantages,
    weighted_returns,
)
from paretune.training.spec import TrainSpec
from paretune.training.weightings.base import WEIGHTINGS, State, StepContext, Weighting
from paretune.types import Objectives, canonical_json, is_number

__all__ = ["Combine"]

LEARNER = "learner"  # the aggregation that leaves it to the other settings
AT = ("reward", "advantage")


def _named(name: str) -> Any:
    return field(default_factory=lambda: {"name": name})


@dataclass(frozen=True, kw_only=True)
class Combine:
    """The six settings, each named as a `TrainSpec` or a recipe names it. The defaults climb J_w without bias."""

    scalarizer: Mapping[str, Any] = _named("linear")
    scalarize_at: str = "reward"
    aggregation: Mapping[str, Any] = _named(LEARNER)
    weighting: Mapping[str, Any] = _named("fixed")
    baseline: str = "leave_one_out"
    normalize: str = "none"

    @classmethod
    def of(cls, spec: TrainSpec, **learners: Any) -> Combine:
        """What a training asks for; `learners` are `baseline` and `normalize`, where the learner has them."""
        names = ("scalarizer", "scalarize_at", "aggregation", "weighting")
        return cls(**{name: getattr(spec, name) for name in names}, **learners)

    @property
    def weighting_rule(self) -> Weighting:
        """The weighting itself; ConfigError where it cannot be built."""
        return _built(canonical_json(self.weighting))

    @property
    def linear(self) -> bool:
        return self.scalarizer["name"] == "linear"

    @property
    def aggregates(self) -> bool:
        """Whether an aggregation of its own makes the advantages."""
        return self.aggregation["name"] != LEARNER

    @property
    def needs_gramian(self) -> bool:
        """Whether the loop has to give the inner products of the objectives' gradients, and to step along their weighted sum."""
        return self.weighting_rule.needs_gramian

    def check(
        self,
        *,
        sampled: bool,
        offline: str = "",
        enumerated: bool = False,
        through_rewards: bool = False,
        epochs: int = 1,
        kl_in: str = "reward",
    ) -> None:
        """ConfigError where the settings do not go together, or the loop that asks cannot follow them. The only such check.

        sampled: every prompt has a preference of its own. offline: the name of a learner that weighs the objectives with the preference
        itself. enumerated: a loop over all responses. through_rewards: a trainer that is given one reward per response, from which it
        subtracts a mean of the group. `epochs` and `kl_in` are the learner's.
        """
        names = tuple(str(each.get("name", "")) for each in (self.scalarizer, self.aggregation, self.weighting))
        if offline and names != ("linear", LEARNER, "fixed"):
            raise ConfigError(
                f"{offline} weighs the objectives with the preference itself",
                found="scalarizer {}, aggregation {}, weighting {}".format(*names),
                remedy='leave these fields out, or use learner "pg"',
            )
        check_scalarizer(self.scalarizer)
        self._check_choices()
        self._check_aggregation()
        rule = self.weighting_rule
        rule.check()
        if sampled and not rule.takes_sampled_preferences:
            raise ConfigError(
                f"weighting {names[2]} follows one preference through a training",
                found="a training whose preferences are sampled",
                remedy='give the training a preference, or use the weighting "fixed" or "balanced"',
            )
        if rule.needs_gramian:
            self._check_gradients(through_rewards, epochs, kl_in)
        if enumerated and names[2] != "fixed" and not self.linear:
            raise ConfigError(
                "the exact learner weighs a scalarizer other than linear with the preference itself",
                found=f"scalarizer {names[0]} with the weighting {names[2]}",
                remedy='use the weighting "fixed", or the scalarizer "linear"',
            )
        if through_rewards and self.aggregates and names[1] not in CENTERED:
            raise ConfigError(
                "TRL subtracts a group's mean from what a reward function returns, so the advantages must have mean 0 in each group",
                found=f"aggregation {names[1]}",
                remedy=f'use one of {", ".join(CENTERED)}; or learner "pg", the embedded learner, for it',
            )

    def _check_choices(self) -> None:
        if self.scalarize_at not in AT:
            raise ConfigError(
                "objectives are scalarized at the reward or at the advantage",
                found=f"scalarize_at={self.scalarize_at!r}",
                remedy='use "reward" (sum, then normalize) or "advantage" (normalize, then sum)',
            )
        for name, known in (("baseline", BASELINES), ("normalize", NORMALIZED_OVER)):
            value = getattr(self, name)
            if str(value) not in known:
                raise ConfigError(f"{name} is known by its name", found=repr(value), remedy=nearest(str(value), known))

    def _check_aggregation(self) -> None:
        given = dict(self.aggregation)
        name = str(given.pop("name", ""))
        if name != LEARNER and name not in AGGREGATIONS:
            raise ConfigError("an aggregation is known by its name", found=repr(name), remedy=nearest(name, [LEARNER, *AGGREGATIONS]))
        known = (AGGREGATIONS[name].__kwdefaults__ or {}) if name != LEARNER else {}
        for setting in given:
            if setting not in known:
                shown = ", ".join(sorted(known)) or "none"
                raise ConfigError(f"aggregation {name} has the fields that it declares", found=repr(setting), remedy=f"its fields: {shown}")
        tau = given.get("tau", 0.2)
        if given.get("form", "hard") not in ("hard", "snr") or not (is_number(tau) and 0 <= tau <= 1):
            raise ConfigError(
                'aggregation gd2po: form is "hard" or "snr", tau lies between 0 and 1',
                found=", ".join(f"{setting}={value!r}" for setting, value in given.items()),
                remedy='leave them out for "hard" and 0.2',
            )
        if name != LEARNER and not (self.linear and self.scalarize_at == "reward"):
            raise ConfigError(
                f"aggregation {name} combines the objectives itself",
                found=f"scalarizer {self.scalarizer['name']}, scalarize_at={self.scalarize_at!r}",
                remedy='leave out scalarizer and scalarize_at, or the aggregation ("learner" is the default)',
            )

    def _check_gradients(self, through_rewards: bool, epochs: int, kl_in: str) -> None:
        name = self.weighting["name"]
        if through_rewards:
            raise ConfigError(
                f"weighting {name} needs the objectives' gradients, which a reward function does not see",
                found="TRL as the trainer",
                remedy='use learner "pg", the embedded learner, for it; or a weighting of returns, such as climb, multipliers or ctwa',
            )
        if self.aggregates or not self.linear or self.scalarize_at != "reward":
            raise ConfigError(
                f"weighting {name} combines the gradients of the returns J_k",
                found=f"aggregation {self.aggregation['name']}, scalarizer {self.scalarizer['name']}, scalarize_at={self.scalarize_at!r}",
                remedy="leave these three at their defaults, or choose a weighting that needs no gradients",
            )
        if (epochs, kl_in, self.normalize) != (1, "reward", "none"):
            raise ConfigError(
                f"weighting {name} needs the gradients of the returns J_k themselves",
                found=f"epochs={epochs}, kl_in={kl_in!r}, normalize={self.normalize!r}",
                remedy='use epochs=1, kl_in="reward" and normalize="none", the defaults',
            )

    def weights(self, state: State | None, objectives: Objectives, **seen: Any) -> tuple[np.ndarray, State]:
        """(N, M) the weights of a step and the weighting's next state; `state` is None before the first step, `seen` as `StepContext`."""
        rule = self.weighting_rule
        context = StepContext(low_M=np.array(objectives.low), high_M=np.array(objectives.high), **seen)
        return rule.weights(rule.start(objectives.count) if state is None else state, context)

    def told(self, weights_NM: np.ndarray, objectives: Objectives) -> dict[str, float]:
        """What the log says of a step's weights, "weights/name": their means; nothing where they are the preference itself."""
        fixed = self.weighting["name"] == "fixed"
        return {} if fixed else {f"weights/{name}": float(w) for name, w in zip(objectives.names, weights_NM.mean(0), strict=True)}

    def scores(self, rewards_NM: np.ndarray, w_NM: np.ndarray, objectives: Objectives) -> np.ndarray:
        """(N,) the scalarizer's number for each response; NaN where it cannot be said."""
        low_M, high_M = np.array(objectives.low), np.array(objectives.high)
        return scalarize(rewards_NM, w_NM, self.scalarizer, low_M=low_M, high_M=high_M)

    def mean_score(self, rewards_NM: np.ndarray, w_NM: np.ndarray, objectives: Objectives) -> float:
        """The mean of `scores`. Under "linear" an unscored objective counts as its mean over the batch, so that this is w times the means.

        RewardError where nothing can be said of it, because no response has a score that counts.
        """
        values_NX, weights_NX = self.compared(rewards_NM, w_NM, objectives)
        if not (~np.isnan(values_NX)).any(0)[(weights_NX > 0).any(0)].all():
            raise RewardError(
                "the mean score of a policy is over responses of which some are scored, by each objective that has a weight",
                found=f"none of {len(rewards_NM)} by one of them" if self.linear else f"none of {len(rewards_NM)} by all of them at once",
                remedy="choose prompts that all objectives can score, or look at more responses (learner.look_samples, validation_samples)",
            )
        return float(np.nanmean(weighted_returns(values_NX[None], weights_NX[None])))

    def measures(
        self, state: State | None, rewards_NM: np.ndarray, w_M: np.ndarray, objectives: Objectives, landmarks: Landmarks | None = None
    ) -> dict[str, float]:
        """What a batch is worth, without the price of KL: "utility" of the objectives' means, or the mean of a scalarizer's numbers."""
        scored_M = (~np.isnan(rewards_NM)).any(0)
        if not scored_M[w_M > 0].all():
            return {}
        if not self.linear:
            score_N = self.scores(rewards_NM, np.tile(w_M, (len(rewards_NM), 1)), objectives)
            return {} if np.isnan(score_N).all() else {"utility": float(np.nanmean(score_N))}
        low_M, high_M = np.array(objectives.low), np.array(objectives.high)
        mean_M = np.array(
            [np.nanmean(column) if scored else low for column, scored, low in zip(rewards_NM.T, scored_M, low_M, strict=True)]
        )
        marks = landmarks or Landmarks(low_M, high_M, high_M, mean_M)  # before the first batch the policy is the reference
        return self.weighting_rule.measures(state or {}, mean_M, w_M, marks)

    def compared(self, rewards_NM: np.ndarray, weights_NM: np.ndarray, objectives: Objectives) -> tuple[np.ndarray, np.ndarray]:
        """(N, X) the columns in which responses are compared, and their weights: the objectives, or what a scalarizer made of them."""
        if self.linear:
            return rewards_NM, weights_NM
        return self.scores(rewards_NM, weights_NM, objectives)[:, None], np.ones((len(weights_NM), 1))

    def advantages(
        self,
        rewards_NM: np.ndarray,
        weights_NM: np.ndarray,
        penalty_N: np.ndarray,
        objectives: Objectives,
        *,
        group: int,
        mass_N: np.ndarray | None = None,
    ) -> np.ndarray:
        """(N,) what each response is worth, compared with the others to its prompt; the only place where objectives are combined.

        `penalty_N` is the price of KL, part of every return. `mass_N`, for aggregations, are probabilities instead of samples.
        """
        if self.aggregates:
            return aggregate_advantages(self.aggregation, rewards_NM - penalty_N[:, None], weights_NM, group=group, mass_N=mass_N)
        values_NX, weights_NX = self.compared(rewards_NM, weights_NM, objectives)
        returns_NX, at = values_NX - penalty_N[:, None], self.scalarize_at
        return advantages(returns_NX, weights_NX, group=group, baseline=self.baseline, normalize=self.normalize, at=at)

    def credits(self, returns_NM: np.ndarray, *, group: int) -> np.ndarray:
        """(N, M) the advantages under each objective alone, 0 where it is unscored: what its own policy gradient needs."""
        each_PGM = BASELINES[self.baseline](returns_NM.reshape(-1, group, returns_NM.shape[1]))
        return np.nan_to_num(each_PGM, nan=0.0).reshape(returns_NM.shape)


@lru_cache(maxsize=64)
def _built(description: str) -> Weighting:
    """Every step asks for its weighting, and building one takes milliseconds."""
    return WEIGHTINGS.build(json.loads(description))
