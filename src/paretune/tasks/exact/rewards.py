"""Rewards of exact tasks: seeded score fields with shared compositional features, and the dials of their relationship.

A field scores a response symbol by symbol: a weight per symbol, a weight per pair (prompt symbol, response symbol), and, scaled by
`interaction`, a weight per pair of neighboring symbols. The same tables serve training and test prompts, so that a policy that learns
the features can do well on prompts that it never saw. M independent fields are whitened under the reference policy, colored to the
wanted correlation, and squashed to (0, 1). Four more dials act on these rewards; each is off by default, and verified where it is on.

    scale    objective_1 is stretched until its spread is `scale` times that of each other one; linear, so correlations stay
    sparse   the last objective pays only for the best responses to each prompt, which the reference gives at this rate
    noise    what a learner sees of a reward; `score` has none
    context  which of two correlations a prompt has; its first letter says which
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy.special import expit, logsumexp

from paretune.errors import TaskError
from paretune.seeds import generator
from paretune.tasks.exact.tree import PrefixTree

__all__ = [
    "CONTEXTS",
    "add_noise",
    "choose_prompts",
    "correlations",
    "correlations_P",
    "design",
    "factors",
    "fields",
    "gains_for",
    "mix_to_correlation",
    "pays_rarely",
    "prompts_of_contexts",
    "spreads",
    "stretch",
    "verify_noise",
]

TOLERANCE = 0.03  # of a correlation, mean over prompts
CONSTANT = 1e-14  # of the largest value: a standard deviation below is rounding
ALIKE = 1e-12  # of the largest variance of a combination of scores: what is below is rounding


def fields(
    tree: PrefixTree, prompts_PT: np.ndarray, count: int, interaction: float, seed: int, features_PF: np.ndarray | None = None
) -> np.ndarray:
    """(P, R, M) raw scores of all responses to all prompts. Symbols are independent of each other where `interaction` is 0.

    A symbol's weight is linear in what the prompt is given by: its own symbols, place by place, or `features_PF`.
    """
    rng = generator(seed, "reward fields")
    symbols = tree.alphabet + 1
    own = rng.normal(size=(count, symbols))
    if features_PF is None:
        context = rng.normal(size=(count, prompts_PT.shape[1], tree.alphabet, symbols)) / np.sqrt(prompts_PT.shape[1])
        context_MPV = context[:, np.arange(prompts_PT.shape[1]), prompts_PT].sum(2)
    else:
        context_MPV = features_PF @ rng.normal(0, features_PF.shape[1] ** -0.5, (count, features_PF.shape[1], symbols))
    pair = rng.normal(size=(count, symbols, symbols))

    with_eos_RL = _with_eos(tree)
    scored_RL = with_eos_RL >= 0
    before_PRL = np.empty((len(prompts_PT), *with_eos_RL.shape), dtype=np.int64)
    before_PRL[:, :, 1:] = with_eos_RL[None, :, :-1]
    before_PRL[:, :, 0] = prompts_PT[:, -1:]
    scores_PRM = np.zeros((len(prompts_PT), tree.responses, count))
    for k in range(count):
        prompt_PV = own[k] + context_MPV[k]
        token_PRL = prompt_PV[:, with_eos_RL] + interaction * pair[k][before_PRL, with_eos_RL[None]]
        scores_PRM[:, :, k] = np.where(scored_RL, token_PRL, 0.0).sum(-1)
    return scores_PRM


def design(tree: PrefixTree, prompt_T: np.ndarray, interaction: float, features_F: np.ndarray | None = None) -> np.ndarray:
    """(R, D) by which the raw scores of a prompt's responses are linear in weights that `fields` draws, each with variance 1."""
    with_eos_RL, v = _with_eos(tree), tree.alphabet + 1
    given_F = np.eye(tree.alphabet)[prompt_T].ravel() if features_F is None else features_F
    scale = (len(prompt_T) if features_F is None else len(features_F)) ** -0.5
    before_RL = np.concatenate([np.full((tree.responses, 1), prompt_T[-1]), with_eos_RL[:, :-1]], axis=1)
    own_RV, pair_RV = np.zeros((tree.responses, v)), np.zeros((tree.responses, v * v))
    for before_R, symbol_R in zip(before_RL.T, with_eos_RL.T, strict=True):
        rows = np.flatnonzero(symbol_R >= 0)
        own_RV[rows, symbol_R[rows]] += 1
        pair_RV[rows, before_R[rows] * v + symbol_R[rows]] += interaction
    return np.concatenate([own_RV, (scale * given_F[:, None] * own_RV[:, None]).reshape(tree.responses, -1), pair_RV], axis=1)


def _with_eos(tree: PrefixTree) -> np.ndarray:
    """(R, L) symbols of every response with the EOS that ends it, -1 after it."""
    return np.where(np.arange(tree.length)[None] == tree.depth_R[:, None], tree.eos, tree.symbols_RL)


def correlations(rewards_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """(M, M) Pearson correlation of the objectives under the policy `logp_PR`, mean over prompts."""
    return correlations_P(rewards_PRM, logp_PR).mean(0)


def correlations_P(rewards_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """(P, M, M) Pearson correlation of the objectives, prompt by prompt; NaN where an objective is constant."""
    covariance_PMM = _covariance(rewards_PRM, logp_PR)
    deviation_PM = np.sqrt(np.einsum("pmm->pm", covariance_PMM))
    deviation_PM[deviation_PM <= CONSTANT * np.abs(rewards_PRM).max(1)] = np.nan
    return covariance_PMM / (deviation_PM[:, :, None] * deviation_PM[:, None])


def spreads(rewards_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """(M,) standard deviation of each objective among the responses to one prompt: root of the mean variance over prompts."""
    return np.sqrt(np.einsum("pmm->pm", _covariance(rewards_PRM, logp_PR)).mean(0))


def mix_to_correlation(fields_PRM: np.ndarray, logp_PR: np.ndarray, rho: float, strength: float, beta: float) -> np.ndarray:
    """(P, R, M) rewards in (0, 1) whose pairwise correlation is rho (mean over prompts) and whose strength is as asked.

    Strength is the KL in nats from the reference to each objective's own optimum. Latent correlations are corrected until the
    squashed ones are right. Raises TaskError where the dial is missed by more than 0.03.
    """
    count = fields_PRM.shape[-1]
    white_PRM = _whiten(fields_PRM, logp_PR)
    target = np.full((count, count), rho)
    np.fill_diagonal(target, 1.0)
    latent = target.copy()
    rewards_PRM, missed, best = white_PRM, np.inf, (np.inf, white_PRM)
    for _ in range(60):
        values, vectors = np.linalg.eigh(latent)
        color = vectors * np.sqrt(np.clip(values, 0.0, None)) @ vectors.T
        colored_PRM = white_PRM @ (color / np.linalg.norm(color, axis=1, keepdims=True)).T
        rewards_PRM = expit(colored_PRM * gains_for(colored_PRM, logp_PR, strength, beta))
        measured = correlations(rewards_PRM, logp_PR)
        missed = np.abs(measured - target).max()
        best = min(best, (missed, rewards_PRM), key=lambda pair: pair[0])
        if missed < TOLERANCE / 30:
            break
        latent = latent + 0.7 * (target - measured)
        np.fill_diagonal(latent, 1.0)
        latent = np.clip(latent, -1.0, 1.0)
    missed, rewards_PRM = best
    if missed > TOLERANCE:
        raise TaskError(
            f"the objectives' correlation is within {TOLERANCE} of rho = {rho:g} (mean over prompts, after squashing)",
            found=f"off by {missed:.3f} at best for {count} objectives",
            remedy=f"move rho away from its bound {-1 / (count - 1):.3g}, or change the seed",
        )
    return rewards_PRM


def gains_for(scores_PRM: np.ndarray, logp_PR: np.ndarray, strength: float, beta: float) -> np.ndarray:
    """(M,) factors before squashing that put each objective's optimum `strength` nats (mean over prompts) from the reference."""

    def excess(log_gain: float, k: int) -> float:
        tilt_PR = logp_PR + expit(scores_PRM[:, :, k] * np.exp(log_gain)) / beta
        optimum_PR = tilt_PR - logsumexp(tilt_PR, axis=1, keepdims=True)
        return float((np.exp(optimum_PR) * (optimum_PR - logp_PR)).sum(1).mean() - strength)

    gains = []
    for k in range(scores_PRM.shape[-1]):
        # The KL grows with the gain, then falls again as rewards saturate towards 0 and 1: take the first crossing.
        above = next((g for g in np.arange(-6.0, 3.0, 0.25) if excess(g, k) > 0), None)
        if above is None:
            raise TaskError(
                f"each objective's optimum lies {strength:g} nats from the reference",
                found=f"rewards in (0, 1) at beta = {beta:g} cannot reach that for objective {k}",
                remedy="lower strength, or lower beta",
            )
        gains.append(np.exp(_root(excess, -9.0, above, args=(k,), xtol=1e-6)))
    return np.array(gains)


def _whiten(fields_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """Center per prompt under the reference, then one linear map for all prompts that makes the mean covariance the identity."""
    centred_PRM = fields_PRM - (np.exp(logp_PR)[:, :, None] * fields_PRM).sum(1, keepdims=True)
    values, vectors = np.linalg.eigh(_covariance(fields_PRM, logp_PR).mean(0))
    if values[0] <= values[-1] * ALIKE:
        raise TaskError(
            "no objective's scores follow from those of the others",
            found=f"{int((values > values[-1] * ALIKE).sum())} that do not, of {len(values)} objectives",
            remedy="ask for fewer objectives, or for more responses and prompts: raise length, alphabet or prompt_count",
        )
    return centred_PRM @ (vectors / np.sqrt(values) @ vectors.T)


def _covariance(values_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    p_PR = np.exp(logp_PR)
    centred_PRM = values_PRM - (p_PR[:, :, None] * values_PRM).sum(1, keepdims=True)
    return np.einsum("pr,prm,prn->pmn", p_PR, centred_PRM, centred_PRM)


CONTEXTS = 2  # the first letter of a prompt is the first or the second of the alphabet


RATE_TOLERANCE = 0.1  # of the rate at which a sparse objective pays, relative, mean over prompts


SCALE_TOLERANCE = 0.01  # of the ratio of two spreads, relative


NOISE_TOLERANCE = 0.1  # of the noise's standard deviation, relative, and of its mean, in units of it


NOISE_DRAWS = 2000


def prompts_of_contexts(trained: int, tested: int) -> list[tuple[int, int]]:
    """(training prompts, test prompts) of each context: an odd training prompt is the first one's, an odd test prompt the second's."""
    return [((trained + 1 - context) // CONTEXTS, (tested + context) // CONTEXTS) for context in range(CONTEXTS)]


def choose_prompts(drawn_NT: np.ndarray, count: int, *, by_letter: Sequence[int] = ()) -> np.ndarray:
    """(count, T) distinct prompts in the order in which they were drawn; so many of each first letter where `by_letter` says how many."""
    _, first = np.unique(drawn_NT, axis=0, return_index=True)
    distinct = drawn_NT[np.sort(first)]
    if by_letter:
        rows = [np.flatnonzero(distinct[:, 0] == letter)[:many] for letter, many in enumerate(by_letter)]
        distinct = distinct[np.sort(np.concatenate(rows))]
    if len(distinct) < count:
        raise TaskError("prompts are distinct", found=f"{len(distinct)} distinct ones", remedy="ask for fewer prompts")
    return distinct[:count]


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
    return float(_root(excess, 0.0, 1.0, xtol=1e-9))


def _root(excess: Callable[..., float], low: float, high: float, **given: Any) -> float:
    """Brent's method; scipy.optimize is loaded by those who need it."""
    from scipy.optimize import brentq

    return brentq(excess, low, high, **given)


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
