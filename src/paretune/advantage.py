"""Returns to advantages: what each response is compared with, and how the differences are scaled.

Rows stand group by group: N = P * G, a group being the G responses to one prompt under one preference. NaN means "unscored": such
an entry is left out of its objective's baseline and spread, and adds nothing to its row's advantage.

    at        baseline        normalise  is
    reward    leave_one_out   none       the default: unbiased for the gradient of the expected weighted return
    reward    leave_one_out   batch      TRL's RLOO with normalize_advantages (one positive number for all rows of the batch)
    reward    group_mean      group      TRL's GRPO, sum_then_normalize (biased: each prompt's gradient is divided by its own spread)
    advantage group_mean      group      TRL's GRPO, normalize_then_sum; GDPO (2601.05242): z-scores per objective, summed, whitened
"""

from __future__ import annotations

import numpy as np

__all__ = ["EPS", "advantages", "group_covariance", "group_mean", "leave_one_out", "spread"]

EPS = 1e-4  # added to every standard deviation before dividing, as in TRL


def leave_one_out(values_PGM: np.ndarray) -> np.ndarray:
    """(P, G, M) each value minus the mean of the *other* scored ones of its group; NaN where it or all the others are unscored.

    The baseline does not depend on the row it is subtracted from, so the policy gradient stays unbiased.
    """
    scored = ~np.isnan(values_PGM)
    total = np.where(scored, values_PGM, 0.0).sum(1, keepdims=True)
    others = scored.sum(1, keepdims=True) - 1
    return np.where(others > 0, values_PGM - (total - values_PGM) / np.maximum(others, 1), np.nan)


def group_mean(values_PGM: np.ndarray) -> np.ndarray:
    """(P, G, M) each value minus the mean of the scored ones of its group, itself included; NaN where it is unscored.

    (G - 1) / G times `leave_one_out` where everything is scored: the same direction, a shorter step.
    """
    scored = ~np.isnan(values_PGM)
    mean = np.where(scored, values_PGM, 0.0).sum(1, keepdims=True) / np.maximum(scored.sum(1, keepdims=True), 1)
    return values_PGM - mean


def spread(values: np.ndarray, axis: int | tuple[int, ...]) -> np.ndarray:
    """Standard deviation over `axis` of what is scored, with n - 1 in the denominator; 0 where fewer than two are. Keeps the axes."""
    scored = ~np.isnan(values)
    n = scored.sum(axis=axis, keepdims=True)
    mean = np.where(scored, values, 0.0).sum(axis=axis, keepdims=True) / np.maximum(n, 1)
    square = np.where(scored, (values - mean) ** 2, 0.0).sum(axis=axis, keepdims=True)
    return np.sqrt(square / np.maximum(n - 1, 1))


def group_covariance(rewards_NM: np.ndarray, *, group: int) -> np.ndarray:
    """(M, M) covariance of the objectives within a prompt's group, mean over groups; rows with an unscored objective are left out."""
    m = rewards_NM.shape[1]
    each_PGM = rewards_NM.reshape(-1, group, m)
    whole_PG1 = ~np.isnan(each_PGM).any(-1, keepdims=True)
    number_P11 = whole_PG1.sum(1, keepdims=True)
    kept_PGM = np.where(whole_PG1, each_PGM, 0.0)
    centred_PGM = np.where(whole_PG1, kept_PGM - kept_PGM.sum(1, keepdims=True) / np.maximum(number_P11, 1), 0.0)
    degrees = np.maximum(number_P11[:, 0, 0] - 1, 0).sum()
    return np.einsum("pgj,pgk->jk", centred_PGM, centred_PGM) / max(degrees, 1)


def advantages(
    returns_NM: np.ndarray,
    w_NM: np.ndarray,
    *,
    group: int,
    baseline: str = "leave_one_out",
    normalise: str = "none",
    at: str = "reward",
    eps: float = EPS,
) -> np.ndarray:
    """(N,) advantages, finite everywhere: 0 where nothing is known.

    At "reward" the objectives are summed with weights `w_NM` and the sum is divided by its spread over the group or the batch;
    at "advantage" each objective is divided by its own spread first, and the weighted sum is whitened over the batch.
    """
    assert returns_NM.shape == w_NM.shape, "a weight for every return"
    assert len(returns_NM) % group == 0, "whole groups"
    returns_PGM = returns_NM.reshape(-1, group, returns_NM.shape[1])
    w_PGM = w_NM.reshape(returns_PGM.shape)
    each_PGM = {"leave_one_out": leave_one_out, "group_mean": group_mean}[baseline](returns_PGM)
    over = {"none": None, "group": 1, "batch": (0, 1)}[normalise]
    if at == "advantage" and over is not None:
        each_PGM = each_PGM / (spread(each_PGM, over) + eps)
    known = ~np.isnan(each_PGM)
    summed_PG = (np.where(known, each_PGM, 0.0) * w_PGM).sum(-1)
    summed_PG[~known.any(-1)] = np.nan
    if at == "advantage" and over is not None:
        centre = np.nanmean(summed_PG) if known.any() else 0.0
        summed_PG = (summed_PG - centre) / (spread(summed_PG, (0, 1)) + eps)
    elif over is not None:
        summed_PG = summed_PG / (spread(summed_PG, over) + eps)
    return np.nan_to_num(summed_PG, nan=0.0).reshape(-1)
