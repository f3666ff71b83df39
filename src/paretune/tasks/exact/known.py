"""What is known of an exact task's rewards from its training prompts, and the best policy of who knows no more.

J is linear in the rewards. So where rewards are known as a distribution, the best policy is the optimum of their mean: pi_ref
exp(w . r / beta) with the mean in the place of r. Two such means bound what was trained, on prompts that it was not trained on:

    blind      the mean over training prompts, response by response: of a prompt only the reference's probabilities are used
    posterior  the mean given all rewards of the training prompts, under the prior from which the task was drawn

Rewards are squashed linear functions of normal weights (`rewards.fields`), so what is squashed is normal given others, in closed form. One
map colors all prompts alike, and every objective is seen at the same places; then its posterior mean depends on its own rewards alone.

Source: Bayesian linear regression without noise; as lines beside methods, ours.
Hides: `posterior` knows how the task was drawn, and the size of its weights. It reads the reward of every response to a training prompt,
without the noise that a learner sees. `blind` is no bound from below: a policy that learned something wrong is worse.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy.special import expit, logit

__all__ = ["posterior_mean"]

KNOWN = 1e-9  # a direction of the weights is known where it has more than this share of the largest information
POINTS_Q, SHARES_Q = np.polynomial.hermite_e.hermegauss(21)


def posterior_mean(
    seen: Sequence[np.ndarray], rewards_PRM: np.ndarray, others: Sequence[np.ndarray], deviation_M: np.ndarray
) -> np.ndarray:
    """(P, R, M) posterior means of the rewards in (0, 1) of other prompts, given those of seen ones.

    `seen` and `others` hold an (R, D) design per prompt: by it logit(rewards) is linear in weights with variance `deviation_M` ** 2.
    """
    information_DD = np.sum([design_RD.T @ design_RD for design_RD in seen], axis=0)
    values_D, vectors_DD = np.linalg.eigh(information_DD)
    known_D = values_D > values_D[-1] * KNOWN
    values_K, known_DK = values_D[known_D], vectors_DD[:, known_D]
    told_DM = np.sum([design_RD.T @ logit(rewards_RM) for design_RD, rewards_RM in zip(seen, rewards_PRM, strict=True)], axis=0)
    weights_DM = known_DK @ (known_DK.T @ told_DM / values_K[:, None])
    found = []
    for design_RD in others:
        left_R = np.sqrt(np.maximum((design_RD**2).sum(1) - ((design_RD @ known_DK) ** 2).sum(1), 0.0))
        latent_RMQ = (design_RD @ weights_DM)[..., None] + (left_R[:, None] * deviation_M)[..., None] * POINTS_Q
        found.append(expit(latent_RMQ) @ (SHARES_Q / SHARES_Q.sum()))
    return np.stack(found)
