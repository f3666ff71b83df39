"""Weights by prompt: a contextual bandit learns from features of a prompt which objective to stress there."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.seeds import generator
from paretune.training.weightings.base import WEIGHTINGS, State, StepContext, Weighting
from paretune.types import Prompt

__all__ = ["Contextual", "prompt_features", "ridge"]


@WEIGHTINGS.register("contextual")
@dataclass(frozen=True)
class Contextual(Weighting):
    """For each prompt of a batch an arm: the preference itself (the last arm), or the preference with objective k stressed.

    Arm k turns w into w_j * (1 + stress * [j = k]), divided by its sum. What an arm earned is known when its prompt comes again: the
    preference's return there now, minus the return then, in units of the objectives' ranges. Each arm has a ridge regression of its
    pay on the features. `rule` "linucb" takes the largest estimate + alpha * its deviation, "thompson" the largest of one draw from
    each posterior.

    Source: LinUCB (1003.0146) and linear Thompson sampling (1209.3352) over what 2510.02850 and LASeR choose: which reward to train on.
    Differs: arms tilt a preference instead of selecting one reward, so that an objective with weight 0 stays out; features are hashed
        words (letters, where there is one word), not a model's embedding; pay is by prompt. Written out here because a bandit's state
        must be JSON in a checkpoint, which MABWiser's is not.
    Hides: prompts that come only once teach nothing; all the other prompts' updates are in an arm's pay, too.
    """

    rule: Literal["linucb", "thompson"] = "linucb"
    stress: float = 1.0
    alpha: float = 0.1
    penalty: float = 1.0
    width: int = 8

    def __post_init__(self):
        if min(self.stress, self.alpha) < 0 or self.penalty <= 0 or self.width < 1:
            raise ConfigError(
                "weighting contextual: stress and alpha are not negative, penalty is positive, width is at least 1",
                found=f"stress = {self.stress:g}, alpha = {self.alpha:g}, penalty = {self.penalty:g}, width = {self.width}",
                remedy="`stress` 0 keeps the preference; `alpha` 0 does not explore",
            )

    def start(self, count: int) -> State:
        d = self.width + 1
        empty = {"gram": np.zeros((d, d)).tolist(), "sum": [0.0] * d}
        return {"arms": [empty] * (count + 1), "waiting": {}}

    def weights(self, state: State, context: StepContext) -> tuple[np.ndarray, State]:
        arms = [{"gram": np.array(arm["gram"]), "sum": np.array(arm["sum"])} for arm in state["arms"]]
        waiting = dict(state["waiting"])
        unit_NM = (context.returns_NM - context.low_M) / (context.high_M - context.low_M)
        value_N = np.where(context.w_NM > 0, context.w_NM * np.nan_to_num(unit_NM), 0.0).sum(1)
        rows: dict[str, list[int]] = {}
        for n, prompt in enumerate(context.prompts):
            rows.setdefault(prompt.digest, []).append(n)
        features = {digest: prompt_features(context.prompts[places[0]], self.width) for digest, places in rows.items()}
        for digest, places in rows.items():  # first learn from all, then choose
            if digest in waiting:
                arm, before = waiting[digest]
                x_D = features[digest]
                arms[arm] = {
                    "gram": arms[arm]["gram"] + np.outer(x_D, x_D),
                    "sum": arms[arm]["sum"] + x_D * (value_N[places].mean() - before),
                }
        weights_NM = context.w_NM.copy()
        for digest, places in rows.items():
            arm = self._choose(arms, features[digest], context, digest)
            if arm < context.w_NM.shape[1]:
                weights_NM[places, arm] *= 1 + self.stress
                weights_NM[places] /= weights_NM[places].sum(1, keepdims=True)
            waiting[digest] = [arm, float(value_N[places].mean())]
        plain = [{"gram": arm["gram"].tolist(), "sum": arm["sum"].tolist()} for arm in arms]
        return weights_NM, {"arms": plain, "waiting": waiting}

    def _choose(self, arms: Sequence[State], x_D: np.ndarray, context: StepContext, digest: str) -> int:
        rng = generator(context.seed, "contextual", context.step, digest)
        scores = []
        for arm in arms:
            theta_D, covariance_DD = ridge(arm["gram"], arm["sum"], self.penalty)
            if self.rule == "linucb":
                scores.append(x_D @ theta_D + self.alpha * np.sqrt(x_D @ covariance_DD @ x_D))
            else:
                scores.append(x_D @ rng.multivariate_normal(theta_D, self.alpha**2 * covariance_DD, method="cholesky"))
        best = np.flatnonzero(np.array(scores) >= max(scores) - 1e-12)
        return int(rng.choice(best))  # ties at the start: an arm by chance


def ridge(gram_DD: np.ndarray, sum_D: np.ndarray, penalty: float) -> tuple[np.ndarray, np.ndarray]:
    """The ridge solution (X'X + penalty I)^-1 X'y from X'X and X'y, and that inverse."""
    inverse_DD = np.linalg.inv(gram_DD + penalty * np.eye(len(gram_DD)))
    return inverse_DD @ sum_D, inverse_DD


def prompt_features(prompt: Prompt, width: int) -> np.ndarray:
    """(width + 1,) a constant, and the hashed words of a prompt (letters, where it is one word) at length 1. Blind to their order."""
    text = prompt.text if prompt.messages is None else " ".join(str(message["content"]) for message in prompt.messages)
    parts = (text or "").split()
    counts = np.zeros(width)
    for part in parts if len(parts) > 1 else (text or ""):
        counts[zlib.crc32(part.encode()) % width] += 1
    size = np.linalg.norm(counts)
    return np.concatenate([[1.0], counts / size if size > 0 else counts])
