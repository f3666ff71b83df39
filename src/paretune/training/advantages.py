"""Returns to advantages: what each response is compared with, and how the differences are scaled.

Rows stand group by group: N = P * G, a group being the G responses to one prompt under one preference. NaN means "unscored": such
an entry is left out of every mean and spread, and adds nothing to its row's advantage. A row of which only objectives without weight
are scored is unscored.

First a baseline and a normalization (`advantages`), the learner's own way:

    at        baseline        normalize      is
    reward    leave_one_out   none           the default: unbiased for the gradient of the expected weighted return
    reward    leave_one_out   batch          TRL's RLOO with normalize_advantages (one positive number for all rows of the batch)
    reward    group_mean      none           TRL's GRPO, sum_then_normalize with scale_rewards "none" (Dr. GRPO, 2503.20783)
    reward    group_mean      group          the same, scale_rewards "group" (biased: each prompt's gradient is divided by its own spread)
    reward    group_mean      batch_returns  the same, scale_rewards "batch": the spread of the batch's returns, prompts included
    advantage group_mean      group          TRL's GRPO, normalize_then_sum; GDPO (2601.05242): z-scores per objective, summed, whitened

These are TRL's numbers where everything is scored. Where a response lacks an objective they differ: TRL sums first, with nansum, so that
the missing score counts as 0 in RLOO and in GRPO's sum_then_normalize. Here, and in TRL's normalize_then_sum, it counts not at all.

Then aggregations (`aggregate_advantages`): published ways, known by name, in which the returns of a prompt's responses, a vector each,
become one advantage per response. All of them climb something other than J_w. Returns hold the penalty for KL in every objective.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

__all__ = [
    "AGGREGATIONS",
    "BASELINES",
    "CENTERED",
    "EPS",
    "EXPERIMENTAL",
    "NORMALIZED_OVER",
    "advantages",
    "aggregate_advantages",
    "dvao",
    "gd2po",
    "gdpo",
    "group_covariance",
    "group_mean",
    "grpo",
    "leave_one_out",
    "mo_grpo",
    "pama",
    "rdpo",
    "spread",
    "weighted_returns",
]

EPS = 1e-4  # added to every standard deviation before dividing, as in TRL
GROUP, BATCH = 1, (0, 1)  # axes of (P, G, M)
Axis = int | tuple[int, int]
NORMALIZED_OVER: Mapping[str, Axis | None] = {"none": None, "group": GROUP, "batch": BATCH, "batch_returns": BATCH}


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


BASELINES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"leave_one_out": leave_one_out, "group_mean": group_mean}


def spread(values: np.ndarray, axis: Axis) -> np.ndarray:
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
    centered_PGM = np.where(whole_PG1, kept_PGM - kept_PGM.sum(1, keepdims=True) / np.maximum(number_P11, 1), 0.0)
    degrees = np.maximum(number_P11[:, 0, 0] - 1, 0).sum()
    return np.einsum("pgj,pgk->jk", centered_PGM, centered_PGM) / max(degrees, 1)


def advantages(
    returns_NM: np.ndarray,
    w_NM: np.ndarray,
    *,
    group: int,
    baseline: str = "leave_one_out",
    normalize: str = "none",
    at: str = "reward",
    eps: float = EPS,
) -> np.ndarray:
    """(N,) advantages, finite everywhere: 0 where nothing is known.

    At "reward" the objectives are summed with weights `w_NM` and the sum is divided by its spread over the group or the batch;
    at "advantage" each objective is divided by its own spread first, and the weighted sum is whitened over the batch. The spread is
    that of the differences from the baseline, or of the returns themselves ("batch_returns"), which differ between prompts, too.

    An unscored objective adds nothing to its row. TRL's sum_then_normalize and its RLOO count it as 0, which pulls such a row away
    from the others of its group; return 0.0 instead of None where that is meant.
    """
    assert returns_NM.shape == w_NM.shape, "a weight for every return"
    assert len(returns_NM) % group == 0, "whole groups"
    returns_PGM = returns_NM.reshape(-1, group, returns_NM.shape[1])
    w_PGM = w_NM.reshape(returns_PGM.shape)
    each_PGM, over, whole = BASELINES[baseline](returns_PGM), NORMALIZED_OVER[normalize], normalize == "batch_returns"
    if at == "advantage" and over is not None:
        each_PGM = each_PGM / (spread(returns_PGM if whole else each_PGM, over) + eps)
    known = ~np.isnan(each_PGM) & (w_PGM != 0)
    summed_PG = (np.where(known, each_PGM, 0.0) * w_PGM).sum(-1)
    summed_PG[~known.any(-1)] = np.nan
    if at == "advantage" and over is not None:
        center = np.nanmean(summed_PG) if known.any() else 0.0
        summed_PG = (summed_PG - center) / (spread(summed_PG, BATCH) + eps)
    elif over is not None:
        summed_PG = summed_PG / (spread(weighted_returns(returns_PGM, w_PGM) if whole else summed_PG, over) + eps)
    return np.nan_to_num(summed_PG, nan=0.0).reshape(-1)


def weighted_returns(returns_PGM: np.ndarray, w_PGM: np.ndarray) -> np.ndarray:
    """(P, G) weighted sums, an unscored objective at the mean of its group, or else of the batch; NaN where all that counts is unscored."""
    filled_PGM, scored = returns_PGM, ~np.isnan(returns_PGM)
    for axis in (GROUP, BATCH):
        mean = np.where(scored, returns_PGM, 0.0).sum(axis, keepdims=True) / np.maximum(scored.sum(axis, keepdims=True), 1)
        mean = np.where(scored.any(axis, keepdims=True), mean, np.nan)
        filled_PGM = np.where(np.isnan(filled_PGM), mean, filled_PGM)
    counts = (scored & (w_PGM != 0)).any(-1)
    return np.where(counts, np.where(np.isnan(filled_PGM), 0.0, w_PGM * filled_PGM).sum(-1), np.nan)


class Groups:
    """Returns and weights of one batch, with means and spreads over groups or over the whole batch: what an aggregation is given.

    `mass_PG` is the probability of a response within its group. None is for samples, which count alike and whose spread has n - 1 in
    the denominator. The exact learner gives the policy's own probabilities of all responses, and so takes the step to which samples
    converge as groups grow.
    """

    def __init__(self, returns_PGM: np.ndarray, w_PGM: np.ndarray, mass_PG: np.ndarray | None):
        self.returns_PGM, self.w_PGM, self.sampled = returns_PGM, w_PGM, mass_PG is None
        self.mass_PG = np.full(returns_PGM.shape[:2], 1.0 / returns_PGM.shape[1]) if mass_PG is None else mass_PG

    def moments(self, values: np.ndarray, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation over `axis` of (P, G, X) values where known, axes kept; 0 where nothing is."""
        known = ~np.isnan(values)
        mass = self.mass_PG[:, :, None] * known
        total = mass.sum(axis, keepdims=True)
        safe = np.where(total > 0, total, 1.0)
        mean = (mass * np.where(known, values, 0.0)).sum(axis, keepdims=True) / safe
        variance = (mass * np.where(known, values - mean, 0.0) ** 2).sum(axis, keepdims=True) / safe
        if self.sampled:
            n = known.sum(axis, keepdims=True)
            variance = variance * n / np.maximum(n - 1, 1)
        return mean, np.sqrt(variance)

    def z_PGM(self) -> np.ndarray:
        """Each objective's z-scores within its group."""
        mean, spread = self.moments(self.returns_PGM, GROUP)
        return (self.returns_PGM - mean) / (spread + EPS)

    def weighted(self, each_PGM: np.ndarray) -> np.ndarray:
        """(P, G) weighted sums of what is known; NaN where nothing is that has a weight."""
        known = ~np.isnan(each_PGM) & (self.w_PGM != 0)
        summed = (np.where(known, each_PGM, 0.0) * self.w_PGM).sum(-1)
        return np.where(known.any(-1), summed, np.nan)

    def scaled(self, values_PG: np.ndarray, axis: Axis, *, center: bool) -> np.ndarray:
        """Divided by their spread over `axis`, after their mean has been subtracted where `center`."""
        mean, spread = self.moments(values_PG[:, :, None], axis)
        return ((values_PG[:, :, None] - (mean if center else 0.0)) / (spread + EPS))[:, :, 0]


def grpo(groups: Groups) -> np.ndarray:
    """z_G(sum_k w_k r_k): sum first, then normalize.

    Source: GRPO (2402.03300) on a weighted sum of rewards; TRL's sum_then_normalize.
    Differs: returns instead of rewards, here and below: the source has its KL in the loss. An unscored objective is left out, where
        TRL's sum_then_normalize counts it as 0; equal to TRL's where everything is scored.
    Hides: the objective with the larger spread dominates; each prompt's gradient is divided by its own spread.
    """
    mean, _ = groups.moments(groups.returns_PGM, GROUP)
    return groups.scaled(groups.weighted(groups.returns_PGM - mean), GROUP, center=False)


def mo_grpo(groups: Groups) -> np.ndarray:
    """sum_k w_k z_G(r_k): normalize each objective first, then sum.

    Source: MO-GRPO (2509.22047): each reward normalized within its group, then summed, so that all contribute evenly whatever their scale.
    Differs: a preference weighs the z-scores.
    Hides: the spread of a nearly constant objective is noise, and z-scores give it the weight of the others.
    """
    return groups.weighted(groups.z_PGM())


def gdpo(groups: Groups) -> np.ndarray:
    """The same sum, whitened over the batch.

    Source: GDPO (2601.05242); TRL's normalize_then_sum.
    Differs: nothing; equal to TRL's, which leaves an unscored objective out here, too.
    Hides: as MO-GRPO; whitening moves every advantage by the batch's mean, which is no baseline of a prompt.
    """
    return groups.scaled(groups.weighted(groups.z_PGM()), BATCH, center=True)


def gd2po(groups: Groups, *, form: str = "hard", tau: float = 0.2) -> np.ndarray:
    """GDPO without the responses on which objectives disagree in sign; a group counts by the share of its responses that is left.

    form "hard" drops every such response, "snr" those where |sum_k a_k| / sum_k |a_k| is below `tau`, with a_k = w_k z_G(r_k).
    Source: GD2PO (2606.16771), paper and the authors' code.
    Differs: weighted by the preference; whitened by response instead of by token.
    Hides: where objectives conflict most responses are dropped, so it learns from the few that are good or bad for all.
    """
    a_PGM = groups.w_PGM * groups.z_PGM()
    known = ~np.isnan(a_PGM) & (groups.w_PGM != 0)
    plain = np.where(known, a_PGM, 0.0)
    drop = (plain > 1e-8).any(-1) & (plain < -1e-8).any(-1)
    if form == "snr":
        size = np.abs(plain).sum(-1)
        drop &= np.abs(plain.sum(-1)) < tau * size
    scored = known.any(-1)
    keep = scored & ~drop
    mass = groups.mass_PG * scored
    share = (mass * keep).sum(1, keepdims=True) / np.maximum(mass.sum(1, keepdims=True), 1e-300)
    kept = np.where(keep, plain.sum(-1) * share, np.nan)
    return np.nan_to_num(groups.scaled(kept, BATCH, center=True), nan=0.0)


def dvao(groups: Groups) -> np.ndarray:
    """sum_k w_k (r_k - mean_k) / sum_j w_j s_j, s_j the spread within the group. Experimental: from the abstract.

    Source: DVAO (2605.25604), abstract: weights that follow the variances within a group, and bounded advantages.
    Differs: its exact weights were not at hand; this is the form that is consistent with what it claims.
    Hides: as `grpo`, but divided by the spread that the sum would have if all objectives agreed: conflict shortens steps.
    """
    mean, spread = groups.moments(groups.returns_PGM, GROUP)
    scale = (groups.w_PGM * spread).sum(-1) + EPS
    return groups.weighted(groups.returns_PGM - mean) / scale


def rdpo(groups: Groups) -> np.ndarray:
    """Normal scores of ranks within a group, decorrelated over the batch, then weighted. Experimental: from the abstract.

    Source: RDPO (2605.13641), abstract: quantile normalization, then Mahalanobis whitening in the subspace of active rewards.
    Differs: "magnitude-aware" is not said in the abstract and left out; ties share their middle rank; whitening is by the symmetric
        inverse root, with eigenvalues of at least 1 % of the largest; active are objectives with a weight that are not constant.
    Hides: the size of a difference is lost in ranks; whitening amplifies whatever objectives that agree still disagree on.
    """
    score_PGM = _normal_scores(groups)
    active = (groups.w_PGM > 0).any((0, 1)) & (np.abs(score_PGM) > 0).any((0, 1))
    out = np.zeros_like(score_PGM)
    if active.any():
        kept = score_PGM[:, :, active]
        mass = groups.mass_PG / groups.mass_PG.sum()
        values, vectors = np.linalg.eigh(np.einsum("pg,pgj,pgk->jk", mass, kept, kept))
        root = (vectors / np.sqrt(np.maximum(values, 0.01 * values.max()))) @ vectors.T
        out[:, :, active] = kept @ root
    return groups.weighted(np.where(np.isnan(groups.returns_PGM), np.nan, out))


def _normal_scores(groups: Groups) -> np.ndarray:
    """(P, G, M) normal quantiles of middle ranks by mass within a group; 0 where unscored."""
    from scipy.special import ndtri

    out = np.zeros_like(groups.returns_PGM)
    for p, k in np.ndindex(len(out), out.shape[2]):
        values, known = groups.returns_PGM[p, :, k], ~np.isnan(groups.returns_PGM[p, :, k])
        if known.any():
            mass = groups.mass_PG[p, known] / groups.mass_PG[p, known].sum()
            levels, place = np.unique(values[known], return_inverse=True)
            each = np.bincount(place, weights=mass, minlength=len(levels))
            middle = np.cumsum(each) - each / 2
            out[p, known, k] = np.where(len(levels) > 1, ndtri(np.clip(middle, 1e-4, 1 - 1e-4))[place], 0.0)
    return out


def pama(groups: Groups) -> np.ndarray:
    """The positive parts of z_G(r_k) of the one objective that is furthest behind its preference. Experimental.

    With a_k the batch mean of objective k's positive parts over w_k, PAMA's weights are those that bring sum_k c_k a_k nearest to 0: as
    no a_k is negative, all weight on the smallest, shared where several are.
    Source: PAMA (2508.07768): advantages clipped at 0 and the projection in closed form; the public re-implementation gives every token
    one scalar.
    Differs: each response keeps its own advantage; the preference divides a_k, for the source has none; without a weight, no part.
    Hides: the mean of positive z-scores is about 0.4 for any reward, so that what is chosen is the shape of its distribution.
    """
    z_PGM = np.where(np.isnan(groups.returns_PGM), np.nan, np.maximum(groups.z_PGM(), 0.0))
    mean_M = groups.moments(z_PGM, BATCH)[0][0, 0]
    w_M = (groups.mass_PG[:, :, None] * groups.w_PGM).sum(BATCH) / groups.mass_PG.sum()
    ratio_M = np.where(w_M > 0, mean_M / np.where(w_M > 0, w_M, 1.0), np.inf)
    first_M = (ratio_M <= ratio_M.min() * (1 + 1e-12)).astype(float)
    known = ~np.isnan(z_PGM)
    return (np.where(known, z_PGM, 0.0) * first_M).sum(-1) / max(first_M.sum(), 1.0)


AGGREGATIONS: Mapping[str, Callable[..., np.ndarray]] = {
    "grpo": grpo,
    "mo_grpo": mo_grpo,
    "gdpo": gdpo,
    "gd2po": gd2po,
    "dvao": dvao,
    "rdpo": rdpo,
    "pama": pama,
}
EXPERIMENTAL: Mapping[str, str] = {  # what no comparison takes as the published rule, and why
    "mo_grpo": "its abstract and others' descriptions agree with this form, but its equation was not read",
    "dvao": "its abstract alone was at hand, and the weights are a form that agrees with it",
    "rdpo": "its abstract alone was at hand, and magnitude-awareness is left out",
    "pama": "its weights are the source's, but each response keeps its own advantage",
}
CENTERED = ("grpo", "mo_grpo", "gdpo", "dvao")  # those whose advantages have mean 0 in every group


def aggregate_advantages(
    aggregation: Mapping[str, Any], returns_NM: np.ndarray, w_NM: np.ndarray, *, group: int, mass_N: np.ndarray | None = None
) -> np.ndarray:
    """(N,) advantages, finite everywhere: 0 where nothing is known. Rows stand group by group."""
    assert returns_NM.shape == w_NM.shape, "a weight for every return"
    shape = (-1, group, returns_NM.shape[1])
    groups = Groups(returns_NM.reshape(shape), w_NM.reshape(shape), None if mass_N is None else mass_N.reshape(-1, group))
    fields = {name: value for name, value in aggregation.items() if name != "name"}
    return np.nan_to_num(AGGREGATIONS[aggregation["name"]](groups, **fields), nan=0.0).reshape(-1)
