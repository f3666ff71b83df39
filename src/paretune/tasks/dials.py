"""The further dials of exact tasks: scale, sparsity, noise and context. Each is off by default, and verified where it is on.

They act on rewards in (0, 1) that have the wanted correlation and strength already, so that at their defaults nothing changes.

    scale    objective_1 is stretched until its spread is `scale` times that of each other one; linear, so correlations stay
    sparse   the last objective pays only for the best responses to each prompt, which the reference gives at this rate
    noise    what a learner sees of a reward; the truth has none
    context  which of two correlations a prompt has; its first letter says which
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import brentq
from scipy.special import logsumexp

from paretune.errors import TaskError
from paretune.seeds import generator
from paretune.tasks.rewards import spreads

if TYPE_CHECKING:
    from paretune.tasks.exact import ExactTask

__all__ = ["CONTEXTS", "add_noise", "check_dials", "choose_prompts", "factors", "pays_rarely", "stretch", "verify_noise"]

CONTEXTS = 2  # the first letter of a prompt is the first or the second of the alphabet
RATE_TOLERANCE = 0.1  # of the rate at which a sparse objective pays, relative, mean over prompts
SCALE_TOLERANCE = 0.01  # of the ratio of two spreads, relative
NOISE_TOLERANCE = 0.1  # of the noise's standard deviation, relative, and of its mean, in units of it
NOISE_DRAWS = 2000


def check_dials(task: ExactTask) -> None:
    """Raise TaskError for dials that contradict each other or leave a context empty; their ranges were checked before."""
    m = task.objective_count
    if task.scale != 1 and task.sparse:
        raise TaskError(
            "the spread of a sparse objective follows from its rate, so scale cannot set it too",
            found=f"scale = {task.scale:g} with sparse = {task.sparse:g}",
            remedy="leave scale at 1, or sparse at 0",
        )
    if not task.context:
        return
    low = -1 / (m - 1)
    both = (task.rho + task.context, task.rho - task.context)
    if both[0] > 0.99 or both[1] < low - 1e-9:
        raise TaskError(
            f"both contexts have a correlation between {low:.4g} and 0.99 for {m} objectives",
            found=f"rho + context = {both[0]:.4g}, rho - context = {both[1]:.4g}",
            remedy=f"at rho = {task.rho:g}, context is at most {max(0.0, min(0.99 - task.rho, task.rho - low)):.4g}",
        )
    if task.prompt_count < CONTEXTS:
        raise TaskError(
            "no context is empty: each has a training prompt and a test prompt",
            found=f"prompt_count = {task.prompt_count} for {CONTEXTS} contexts",
            remedy="ask for at least 2 prompts, or leave context at 0",
        )
    if task.prompt_count > task.alphabet**2:
        raise TaskError(
            "prompts of one context are distinct strings of 3 symbols with the same first one",
            found=f"{task.prompt_count} prompts of each context from {task.alphabet} symbols",
            remedy=f"at most {task.alphabet**2} prompts, or a larger alphabet",
        )


def choose_prompts(drawn_NT: np.ndarray, count: int, *, contexts: bool) -> np.ndarray:
    """(2 count, T) distinct prompts in the order in which they were drawn; with `contexts`, `count` of each first letter."""
    _, first = np.unique(drawn_NT, axis=0, return_index=True)
    distinct = drawn_NT[np.sort(first)]
    if contexts:
        rows = [np.flatnonzero(distinct[:, 0] == letter)[:count] for letter in range(CONTEXTS)]
        distinct = distinct[np.sort(np.concatenate(rows))]
    if len(distinct) < 2 * count:
        raise TaskError("prompts are distinct", found=f"{len(distinct)} distinct ones", remedy="ask for fewer prompts")
    return distinct[: 2 * count]


# Scale


def factors(count: int, scale: float) -> np.ndarray:
    """(M,) the ranges of the objectives: the first sqrt(scale), the others 1 / sqrt(scale), so that beta stays between them."""
    return np.array([scale**0.5] + [scale**-0.5] * (count - 1))


def stretch(rewards_PRM: np.ndarray, logp_PR: np.ndarray, scale: float) -> np.ndarray:
    """Rewards in (0, 1) -> rewards in (0, factor), the first with `scale` times the spread of each other one."""
    spread_M = spreads(rewards_PRM, logp_PR)
    equal_PRM = 0.5 + (rewards_PRM - 0.5) * (spread_M.min() / spread_M)
    stretched_PRM = equal_PRM * factors(len(spread_M), scale)
    found_M = spreads(stretched_PRM, logp_PR)
    off = np.abs(found_M[0] / found_M[1:] / scale - 1).max()
    if not off <= SCALE_TOLERANCE:
        raise TaskError(
            f"the spread of objective_1 is {scale:g} times that of the others, within {SCALE_TOLERANCE:.0%}",
            found=f"off by {off:.1%}",
            remedy="change the seed",
        )
    return stretched_PRM


# Sparsity


def pays_rarely(dense_PR: np.ndarray, logp_PR: np.ndarray, rate: float, strength: float, beta: float) -> np.ndarray:
    """(P, R) rewards of 0 or one payoff: the best responses of each prompt whose joint probability comes nearest to `rate`.

    Responses are taken in the order of `dense_PR`; one that alone would exceed the rate is passed over, because it is no rare event. The
    payoff puts the objective's optimum `strength` nats from the reference, as for any other objective.
    """
    paid_PR = np.zeros_like(dense_PR)
    for p, order in enumerate(np.argsort(-dense_PR, axis=1, kind="stable")):
        left = rate
        for r in order:
            mass = np.exp(logp_PR[p, r])
            if mass <= left * (1 + 1e-9):
                paid_PR[p, r], left = 1.0, left - mass
            if left < rate * RATE_TOLERANCE / 2:
                break
    rate_P = (np.exp(logp_PR) * paid_PR).sum(1)
    off = abs(rate_P.mean() / rate - 1)
    if off > RATE_TOLERANCE or rate_P.min() == 0:
        raise TaskError(
            f"the sparse objective pays at the rate sparse = {rate:g}, within {RATE_TOLERANCE:.0%}, and for every prompt",
            found=f"a mean rate of {rate_P.mean():.4g}, {rate_P.min():.4g} at the least: responses are too few or too likely",
            remedy="raise sparse, length or alphabet",
        )
    return paid_PR * _payoff(paid_PR, logp_PR, strength, beta)


def _payoff(paid_PR: np.ndarray, logp_PR: np.ndarray, strength: float, beta: float) -> float:
    """What a paid response must be worth; the KL of the optimum grows with it."""

    def excess(payoff: float) -> float:
        tilt_PR = logp_PR + payoff * paid_PR / beta
        optimum_PR = tilt_PR - logsumexp(tilt_PR, axis=1, keepdims=True)
        return float((np.exp(optimum_PR) * (optimum_PR - logp_PR)).sum(1).mean() - strength)

    if excess(1.0) < 0:
        raise TaskError(
            f"the sparse objective's optimum lies {strength:g} nats from the reference",
            found=f"a payoff of at most 1 at beta = {beta:g} cannot reach that",
            remedy="lower strength, sparse or beta",
        )
    return float(brentq(excess, 0.0, 1.0, xtol=1e-9))


# Noise


def add_noise(rewards_NM: np.ndarray, deviation_M: np.ndarray, streams: Sequence[int]) -> np.ndarray:
    """Gaussian noise of mean 0 on every reward: row n from the stream `streams[n]`, whatever stands beside it."""
    noise_NM = [generator(stream, "reward noise").standard_normal(len(deviation_M)) for stream in streams]
    return rewards_NM + deviation_M * np.reshape(noise_NM, rewards_NM.shape)


def verify_noise(noise: float, count: int, seed: int) -> list[float]:
    """(M,) the noise's measured standard deviation in units of the reward's; TaskError where it, or its mean, is not as asked."""
    streams = generator(seed, "check of the noise").integers(2**62, size=NOISE_DRAWS).tolist()
    drawn_NM = add_noise(np.zeros((NOISE_DRAWS, count)), np.full(count, noise), streams)
    off = max(np.abs(drawn_NM.std(0) / noise - 1).max(), np.abs(drawn_NM.mean(0)).max() / noise)
    if off > NOISE_TOLERANCE:
        raise TaskError(
            f"noise has mean 0 and {noise:g} times the reward's spread, within {NOISE_TOLERANCE:.0%}",
            found=f"off by {off:.1%} in {NOISE_DRAWS} draws",
            remedy="change the seed",
        )
    return [round(float(s), 4) for s in drawn_NM.std(0)]
