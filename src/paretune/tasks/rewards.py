"""The rewards of exact tasks: seeded score fields with shared compositional features, then the dials.

A field scores a response symbol by symbol: a weight per symbol, a weight per pair (prompt symbol, response symbol), and, scaled by
`interaction`, a weight per pair of neighbouring symbols. The same tables serve training and test prompts, so a policy that
learns the features can do well on prompts it never saw. M independent fields are whitened under the reference policy, coloured to
the wanted correlation, and squashed to (0, 1).
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import expit, logsumexp

from paretune.errors import TaskError
from paretune.seeds import generator
from paretune.tasks.tree import PrefixTree

__all__ = ["correlations", "correlations_P", "fields", "gains_for", "mix_to_correlation", "spreads"]

TOLERANCE = 0.03  # of a correlation, mean over prompts


def fields(tree: PrefixTree, prompts_PT: np.ndarray, count: int, interaction: float, seed: int) -> np.ndarray:
    """(P, R, M) raw scores of all responses to all prompts. Symbols are independent of each other where `interaction` is 0."""
    rng = generator(seed, "reward fields")
    symbols = tree.alphabet + 1
    own = rng.normal(size=(count, symbols))
    context = rng.normal(size=(count, prompts_PT.shape[1], tree.alphabet, symbols)) / np.sqrt(prompts_PT.shape[1])
    pair = rng.normal(size=(count, symbols, symbols))

    with_eos_RL = np.where(np.arange(tree.length)[None] == tree.depth_R[:, None], tree.eos, tree.symbols_RL)
    scored_RL = with_eos_RL >= 0
    before_PRL = np.empty((len(prompts_PT), *with_eos_RL.shape), dtype=np.int64)
    before_PRL[:, :, 1:] = with_eos_RL[None, :, :-1]
    before_PRL[:, :, 0] = prompts_PT[:, -1:]
    scores_PRM = np.zeros((len(prompts_PT), tree.responses, count))
    places = np.arange(prompts_PT.shape[1])
    for k in range(count):
        prompt_PV = own[k] + context[k, places, prompts_PT].sum(1)
        token_PRL = prompt_PV[:, with_eos_RL] + interaction * pair[k][before_PRL, with_eos_RL[None]]
        scores_PRM[:, :, k] = np.where(scored_RL, token_PRL, 0.0).sum(-1)
    return scores_PRM


def correlations(rewards_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """(M, M) Pearson correlation of the objectives under the policy `logp_PR`, mean over prompts."""
    return correlations_P(rewards_PRM, logp_PR).mean(0)


def correlations_P(rewards_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """(P, M, M) Pearson correlation of the objectives, prompt by prompt; NaN where an objective is constant."""
    covariance_PMM = _covariance(rewards_PRM, logp_PR)
    deviation_PM = np.sqrt(np.einsum("pmm->pm", covariance_PMM))
    with np.errstate(invalid="ignore", divide="ignore"):
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
        colour = vectors * np.sqrt(np.clip(values, 0.0, None)) @ vectors.T
        coloured_PRM = white_PRM @ (colour / np.linalg.norm(colour, axis=1, keepdims=True)).T
        rewards_PRM = expit(coloured_PRM * gains_for(coloured_PRM, logp_PR, strength, beta))
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
        gains.append(np.exp(brentq(excess, -9.0, above, args=(k,), xtol=1e-6)))
    return np.array(gains)


def _whiten(fields_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    """Centre per prompt under the reference, then one linear map for all prompts that makes the mean covariance the identity."""
    centred_PRM = fields_PRM - (np.exp(logp_PR)[:, :, None] * fields_PRM).sum(1, keepdims=True)
    values, vectors = np.linalg.eigh(_covariance(fields_PRM, logp_PR).mean(0))
    return centred_PRM @ (vectors / np.sqrt(values) @ vectors.T)


def _covariance(values_PRM: np.ndarray, logp_PR: np.ndarray) -> np.ndarray:
    p_PR = np.exp(logp_PR)
    centred_PRM = values_PRM - (p_PR[:, :, None] * values_PRM).sum(1, keepdims=True)
    return np.einsum("pr,prm,prn->pmn", p_PR, centred_PRM, centred_PRM)
