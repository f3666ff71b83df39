"""Adaptive weights: from the objectives' gradients, from returns and their covariance, from bandits, and from a utility of returns.

All of them bend a preference; an objective with weight 0 stays out.

`Climb` and `Multipliers` climb a utility of expected returns (`paretune.objectives.utilities`) instead of w . J. The weights are
lambda / sum lambda, lambda being the utility's gradient or its multipliers. Dividing by the sum changes the length of a step and
nothing else: each J_k contains the KL penalty, so the sum would multiply it as it multiplies the rewards, and beta stays what it is.
Only with sum 1 does this hold, too, where a learner adds the penalty once, in the loss.

J is exact where the learner enumerates. Elsewhere it is a mean over past batches, the older the less they count (`decay`), of a policy
that moves; a batch mean alone would be too noisy for a kink. The ideal point and the reference's returns are exact on exact tasks.
Elsewhere the ideal point is the upper end of each objective's range unless the utility declares it, and the reference's returns
are the mean of the first batch, which is that of the reference unless the training starts from an artifact.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import numpy as np

from paretune.errors import ConfigError
from paretune.objectives.utilities import UTILITIES, Constrained, Landmarks, MaxMin, Utility
from paretune.seeds import generator, seed_for
from paretune.training.weightings.base import WEIGHTINGS, State, StepContext, Weighting
from paretune.training.weightings.gramian import aggregate, check_aggregator
from paretune.types import Amount, Count, Fraction, Positive, Prompt

__all__ = [
    "Climb",
    "Contextual",
    "CovarianceTargeted",
    "Exp3",
    "GradientLevel",
    "Influence",
    "Multipliers",
    "exp3_probabilities",
    "prompt_features",
    "ridge",
]


def tilted(w_NM: np.ndarray, change_M: np.ndarray) -> np.ndarray:
    """(N, M) preferences times exp(change), summing to 1 again; what is 0 stays 0."""
    raw_NM = w_NM * np.exp(change_M - change_M.max())
    total_N1 = raw_NM.sum(1, keepdims=True)
    return np.where(total_N1 > 0, raw_NM / np.where(total_N1 > 0, total_N1, 1.0), w_NM)


def _means(returns_NM: np.ndarray) -> np.ndarray:
    """(M,) means of what is scored; 0 where nothing is."""
    scored = ~np.isnan(returns_NM)
    return np.where(scored, returns_NM, 0.0).sum(0) / np.maximum(scored.sum(0), 1)


# Gradients


@WEIGHTINGS.register("gradient")
@dataclass(frozen=True)
class GradientLevel(Weighting):
    """The step is an aggregator's combination of the objectives' gradients, computed from their Gramian.

    Source: MGDA, PCGrad, CAGrad, Nash-MTL, IMTL-G, UPGrad, Aligned-MTL; `weightings.gramian` has the papers and how a preference enters.
    Differs: the direction is the aggregator's, but the weights are divided by the sum of their absolute values, so that a step has the
        length of a weighted mean of gradients and a learning rate means the same for all.
    Hides: they stop wherever gradients oppose each other, and Adam or Muon with momentum blur weights that change from step to step.
    """

    aggregator: Literal["mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g", "upgrad", "aligned_mtl"] = "upgrad"
    c: Amount = 0.5  # of CAGrad: how far its step may be from the mean gradient

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


# Returns and their covariance


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
    rate: Amount = 0.05
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


@WEIGHTINGS.register("exp3", version=2)
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
        unit_M = np.where(np.isnan(context.returns_NM).all(0), _mean_so_far(state), unit_M)  # unscored: it has neither risen nor fallen
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


def _mean_so_far(state: State) -> np.ndarray:
    """(M,) over all batches; 0 before the first."""
    both = _add(state["past"], state["recent"]["sum"], state["recent"]["batches"])
    return np.array(both["sum"]) / max(both["batches"], 1)


def _add(history: State, sums: np.ndarray | list[float], batches: int) -> State:
    return {"sum": (np.array(history["sum"]) + np.array(sums)).tolist(), "batches": history["batches"] + batches}


# Prompts


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
    alpha: Positive = 0.1
    penalty: float = 1.0
    width: Count = 8

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
        rows: dict[str, list[int]] = {}
        for n, prompt in enumerate(context.prompts):
            rows.setdefault(prompt.digest, []).append(n)
        features = {digest: prompt_features(context.prompts[places[0]], self.width) for digest, places in rows.items()}
        values = {digest: _worth(unit_NM[places], context.w_NM[places]) for digest, places in rows.items()}
        for digest in rows:  # first learn from all, then choose
            arm, before = waiting.pop(digest, (0, None))
            if before is not None and values[digest] is not None:
                x_D = features[digest]
                arms[arm] = {
                    "gram": arms[arm]["gram"] + np.outer(x_D, x_D),
                    "sum": arms[arm]["sum"] + x_D * (values[digest] - before),
                }
        weights_NM = context.w_NM.copy()
        for digest, places in rows.items():
            arm = self._choose(arms, features[digest], context, digest)
            if arm < context.w_NM.shape[1]:
                weights_NM[places, arm] *= 1 + self.stress
                weights_NM[places] /= weights_NM[places].sum(1, keepdims=True)
            waiting[digest] = [arm, values[digest]]
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


def _worth(unit_NM: np.ndarray, w_NM: np.ndarray) -> float | None:
    """What a prompt's responses are worth at its preference: w times the means of what is scored; None where an objective is not at all."""
    scored_NM, w_M = ~np.isnan(unit_NM), w_NM.mean(0)
    if not scored_NM.any(0)[w_M > 0].all():
        return None
    return float(w_M @ _means(unit_NM))


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


@dataclass(frozen=True)
class _OfReturns(Weighting):
    """What both share: the estimate of J, and the landmarks."""

    utility: Mapping[str, Any]
    decay: Fraction = 0.9
    of_returns: ClassVar[bool] = True

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

    def measures(self, state: State, J_M: np.ndarray, w_M: np.ndarray, marks: Landmarks) -> dict[str, float]:
        if state.get("reference") is not None:
            marks = dataclasses.replace(marks, reference_M=np.array(state["reference"]))
        short = self.seeks.violation(J_M, marks)
        return {"utility": float(self.seeks.value(J_M, w_M, marks)), **({} if short is None else {"violation": float(short)})}


@WEIGHTINGS.register("climb", version=2)
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


@WEIGHTINGS.register("multipliers", version=2)
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

    rate: Amount = 1.0
    damping: Amount = 10.0
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
