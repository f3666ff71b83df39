"""How the objectives of a task relate: what the reference policy's own responses score, and where the objectives' gradients point.

`relate` reads rewards, before anything is trained. Where responses can be enumerated every number is exact. Elsewhere `group` responses to
each prompt are drawn from the reference and scored; intervals resample prompts, then the responses of each, and are unknown below 10 of
these or 3 prompts.
NaN is unknown: an objective that gave all responses to a prompt the same score has no correlation there; such prompts are left out and
counted.

    within          correlation among the responses to one prompt, mean over prompts: what a group of responses is compared by
    overall         the same over all responses to all prompts, so that easy and hard prompts count too (Pearson, Spearman)
    conflict        share of the prompts at which a pair's correlation is negative
    rate            trade-off: what objective j gains while objective k gains 1, in the direction that is best for k (from the reference)
    spread          standard deviation among the responses to one prompt, root of the mean variance over prompts
    paid            how often an objective scores anything but its most common score
    flat            how often 8 responses to one prompt all score the same, so that a group of 8 teaches nothing

Source: correlations by definition; `rate` is the ratio of covariances that the natural gradient of E[r_k] gives at the reference.
Differs: Spearman's ranks are those of a distribution (half the mass of ties counts): the usual ones where weights are equal.
Hides: what is true of the reference need not be true of a trained policy, which visits other responses.

`probe` takes one gradient per objective, on the adapters that would be trained, at initialization or after a few steps at equal weights:

    cosine          of the gradients of J_j and J_k
    rate            what J_j gains while J_k gains 1, along the gradient of J_k: trade-offs as the parameters see them
    norm            length of each gradient: who dominates a plain sum

At initialization every B of LoRA is 0: only B has a gradient, and it is the gradient of the full weights seen through the random A, in
which angles are kept up to an error that falls with the rank. On an exact task the gradients are exact. Elsewhere inner products are means
over pairs of *different* batches: within a batch the noise of two gradients is correlated as the rewards are, and would be taken for
agreement. Where the mean squared length comes out negative, the gradient is smaller than its noise: unknown. Intervals leave out a batch
at a time (jackknife).

Source: gradient conflict as in PCGrad (Yu et al. 2020); inner products without the batch's own noise are a U-statistic (Hoeffding 1948).
Differs: whole-response returns with a leave-one-out baseline, no normalization, the KL of J_k included.
Hides: one place in parameter space; conflict may come and go during a training.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from scipy.special import comb

from paretune.errors import ConfigError
from paretune.evaluation.metrics import plain
from paretune.evaluation.stats import LEVEL, MIN_PROMPTS, MIN_UNITS
from paretune.policy.base import build_policy
from paretune.policy.mixing.parameter import ParameterMix
from paretune.policy.rollout import generate
from paretune.progress import counted
from paretune.registry import describe
from paretune.seeds import generator, seed_for
from paretune.tasks.base import Task
from paretune.tasks.exact.rewards import correlations_P, spreads
from paretune.training.learners.exact import ExactGradient, enumerated_returns
from paretune.training.learners.loss import policy_loss
from paretune.training.learners.policy_gradient import PolicyGradient
from paretune.training.spec import TrainSpec
from paretune.types import Estimate

__all__ = ["Probe", "Relations", "probe", "rank", "relate", "trade_off_rates"]

GROUP = 16  # responses per prompt, and
PROMPTS = 16  # prompts, where nothing else is asked
RESAMPLES = 500
FLAT = 8  # responses of the group that `flat` is about
RESCORED, FEW = 256, 32  # responses that are scored twice to see whether scores are noisy: of an exact task, of another one
BATCHES = MIN_UNITS  # of a probe
WIDE = 1.96  # standard errors to either side: an interval of LEVEL
SPARSE = 0.25  # an objective that pays less often than this is called sparse


@dataclass(frozen=True)
class Relations:
    """What was found. Matrices are (M, M); `within_PMM` is prompt by prompt; `dials` says where on the exact tasks' dials this lies."""

    task: Mapping[str, Any]
    names: tuple[str, ...]
    prompts: tuple[str, ...]
    exact: bool
    samples: int
    objectives: list[dict[str, Any]]  # per objective: name, mean, low, high, spread, between, paid, flat, noise, unscored, constant
    pairs: list[dict[str, Any]]  # per pair: names, within, overall, spearman, conflict (estimates), sure shares, known prompts
    within_PMM: np.ndarray
    within_MM: np.ndarray
    overall_MM: np.ndarray
    spearman_MM: np.ndarray
    rate_MM: np.ndarray  # [j, k]: what j gains while k gains 1
    dials: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Strict JSON; unknown is None."""
        matrices = {
            "within_by_prompt": self.within_PMM,
            "within": self.within_MM,
            "overall": self.overall_MM,
            "spearman": self.spearman_MM,
            "rate": self.rate_MM,
        }
        return plain(
            {
                "task": dict(self.task),
                "objectives": self.objectives,
                "pairs": self.pairs,
                "prompts": list(self.prompts),
                "exact": self.exact,
                "samples": self.samples,
                "matrices": matrices,
                "dials": self.dials,
            }
        )


def relate(task: Task, *, prompts: int = PROMPTS, group: int = GROUP, seed: int = 0, exact: bool | None = None) -> Relations:
    """Relate the objectives of `task` on its training prompts.

    `prompts` and `group` say how many prompts, and responses to each, are sampled where the task is not exact (or `exact` is False).
    Raises ConfigError for a task of one objective, and for groups in which nothing can be compared.
    """
    names = task.objectives.names
    if len(names) < 2:
        raise ConfigError("a relationship needs at least two objectives", found=", ".join(names), remedy="add an objective")
    exact = task.is_exact if exact is None else exact
    if (exact and not task.is_exact) or group < 2 or prompts < 1:
        raise ConfigError(
            "responses are enumerated on exact tasks only; elsewhere at least 2 are drawn to each of at least 1 prompt",
            found=f"exact = {exact} on task {task.registered_name!r}, {group} responses to {prompts} prompts",
            remedy="leave `exact` out, and draw 16 responses, for example",
        )
    found = _enumerated(task, seed) if exact else _sampled(task, prompts, group, seed)
    rewards_PRM, logw_PR = found.rewards_PRM, found.logw_PR
    within_PMM = _correlations_P(rewards_PRM, logw_PR)
    objectives = [{"name": name, **_one(rewards_PRM[:, :, k], logw_PR, exact)} for k, name in enumerate(names)]
    noise_M = _noise(task, found.rows, seed)
    for k, one in enumerate(objectives):
        one["noise"] = float(noise_M[k] / one["spread"]) if one["spread"] > 0 else float("nan")
        one["unscored"] = int(found.unscored_M[k])
    matrices = {name: statistic(rewards_PRM, logw_PR) for name, statistic in STATISTICS.items()}
    replicates = [] if exact else _resamples(logw_PR, seed)
    again = {
        name: np.array([statistic(rewards_PRM[drawn_P], logw) for drawn_P, logw in replicates]) for name, statistic in STATISTICS.items()
    }
    pairs = []
    for j, k in combinations(range(len(names)), 2):
        signs = _signs(within_PMM[:, j, k], logw_PR, exact)
        estimates = {name: _estimate(matrix[j, k], again[name], j, k, logw_PR, exact) for name, matrix in matrices.items()}
        pairs.append({"objectives": [names[j], names[k]], **estimates, **signs})
    return Relations(
        task=describe(task),
        names=names,
        prompts=tuple(found.prompts),
        exact=exact,
        samples=found.samples,
        objectives=objectives,
        pairs=pairs,
        within_PMM=within_PMM,
        within_MM=matrices["within"],
        overall_MM=matrices["overall"],
        spearman_MM=matrices["spearman"],
        rate_MM=trade_off_rates(rewards_PRM, logw_PR),
        dials=_dials(objectives, pairs, within_PMM, logw_PR, exact),
    )


# Statistics: rewards (P, R, M) with log-weights (P, R) that sum to 1 within each prompt


def rank(values_N: np.ndarray, weight_N: np.ndarray) -> np.ndarray:
    """(N,) the share of the weight below each value, half of that of its ties included."""
    distinct, which_N = np.unique(values_N, return_inverse=True)
    mass = np.bincount(which_N, weights=weight_N, minlength=len(distinct))
    return (np.cumsum(mass) - mass / 2)[which_N]


def trade_off_rates(rewards_PRM: np.ndarray, logw_PR: np.ndarray) -> np.ndarray:
    """(M, M) [j, k]: what objective j gains while k gains 1, if the policy moves from the reference as is best for k alone.

    Along exp(t r_k) times the reference, E[r_j] grows at the rate cov(r_j, r_k), mean over prompts. NaN where k is constant.
    """
    p_PR = np.exp(logw_PR)
    centred_PRM = rewards_PRM - (p_PR[:, :, None] * rewards_PRM).sum(1, keepdims=True)
    covariance_MM = np.einsum("pr,prm,prn->mn", p_PR, centred_PRM, centred_PRM) / len(p_PR)
    varies_M = ~_constant_PM(rewards_PRM, logw_PR).all(0)
    return covariance_MM / np.where(varies_M, np.diagonal(covariance_MM), np.nan)


def _constant_PM(rewards_PRM: np.ndarray, logw_PR: np.ndarray) -> np.ndarray:
    """(P, M) True where all responses that have weight score the same; rounding must not make a variance of it."""
    here_PR1 = np.isfinite(logw_PR)[:, :, None]
    return np.where(here_PR1, rewards_PRM, -np.inf).max(1) == np.where(here_PR1, rewards_PRM, np.inf).min(1)


def _correlations_P(rewards_PRM: np.ndarray, logw_PR: np.ndarray) -> np.ndarray:
    """(P, M, M) as `correlations_P`, NaN where an objective is constant."""
    varies_PM = ~_constant_PM(rewards_PRM, logw_PR)
    return np.where(varies_PM[:, :, None] & varies_PM[:, None], correlations_P(rewards_PRM, logw_PR), np.nan)


def _ranks(rewards_PRM: np.ndarray, logw_PR: np.ndarray) -> np.ndarray:
    """Ranks over all responses to all prompts, objective by objective."""
    weight_N = np.exp(logw_PR).ravel() / len(logw_PR)
    shape = rewards_PRM.shape
    return np.stack([rank(rewards_PRM[:, :, k].ravel(), weight_N).reshape(shape[:2]) for k in range(shape[2])], axis=2)


def _overall(rewards_PRM: np.ndarray, logw_PR: np.ndarray) -> np.ndarray:
    """(M, M) correlation over all responses to all prompts."""
    return _correlations_P(rewards_PRM.reshape(1, -1, rewards_PRM.shape[2]), logw_PR.reshape(1, -1) - np.log(len(logw_PR)))[0]


def _mean(values_P: np.ndarray) -> np.ndarray:
    """Mean over the first axis of what is known; NaN where nothing is."""
    known = ~np.isnan(values_P)
    return np.where(known, values_P, 0.0).sum(0) / np.where(known.any(0), known.sum(0), np.nan)


STATISTICS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "within": lambda rewards_PRM, logw_PR: _mean(_correlations_P(rewards_PRM, logw_PR)),
    "overall": _overall,
    "spearman": lambda rewards_PRM, logw_PR: _overall(_ranks(rewards_PRM, logw_PR), logw_PR),
}


def _one(values_PR: np.ndarray, logw_PR: np.ndarray, exact: bool) -> dict[str, Any]:
    """One objective by itself."""
    p_PR = np.exp(logw_PR)
    mean_P = (p_PR * values_PR).sum(1)
    drawn = np.isfinite(logw_PR)
    unbias = 1.0 if exact else 1 / (1 - np.square(p_PR).sum(1).mean())
    distinct, which = np.unique(values_PR, return_inverse=True)
    which_PR = which.reshape(values_PR.shape)
    mass_PV = np.stack([np.bincount(w_R, weights=p_R, minlength=len(distinct)) for w_R, p_R in zip(which_PR, p_PR, strict=True)])
    return {
        "mean": float(mean_P.mean()),
        "low": float(values_PR[drawn].min()),
        "high": float(values_PR[drawn].max()),
        "spread": float(spreads(values_PR[:, :, None], logw_PR)[0] * np.sqrt(unbias)),
        "between": float(mean_P.std()),
        "paid": float(1 - mass_PV.mean(0).max()),
        "flat": _flat(mass_PV, drawn.sum(1), exact),
        "constant": bool(np.ptp(values_PR[drawn]) == 0),
    }


def _flat(mass_PV: np.ndarray, n_P: np.ndarray, exact: bool) -> float:
    """The chance that 8 responses score the same; from n draws without replacement, which is unbiased, and unknown for n below 8."""
    if exact:
        return float((mass_PV**FLAT).sum(1).mean())
    enough = n_P >= FLAT
    alike_P = comb(np.rint(mass_PV * n_P[:, None]), FLAT).sum(1)[enough] / comb(n_P, FLAT)[enough]
    return float(alike_P.mean()) if enough.any() else float("nan")


def _estimate(value: float, again_BMM: np.ndarray, j: int, k: int, logw_PR: np.ndarray, exact: bool) -> Estimate:
    """Exact: the interval is the value. Sampled: percentiles of the replicates, unknown where there are none or many are unknown."""
    value = float(value)
    if exact:
        return Estimate(value=value, low=value, high=value, n=len(logw_PR))
    low, high = float("nan"), float("nan")
    if len(again_BMM) and np.isfinite(again_BMM[:, j, k]).mean() >= LEVEL:
        low, high = np.nanquantile(again_BMM[:, j, k], [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return Estimate(value=value, low=low, high=high, n=int(np.isfinite(logw_PR).sum()))


def _signs(within_P: np.ndarray, logw_PR: np.ndarray, exact: bool) -> dict[str, Any]:
    """At which share of the prompts a pair conflicts, and at which share the interval of its correlation leaves no doubt about the sign."""
    known_P = ~np.isnan(within_P)
    low_P, high_P = (within_P, within_P) if exact else _fisher(within_P, logw_PR)
    sure_P = known_P & ~np.isnan(low_P)

    def share(yes_P: np.ndarray, of_P: np.ndarray) -> float:
        return float(yes_P[of_P].mean()) if of_P.any() else float("nan")

    return {
        "conflict": share(within_P < 0, known_P),
        "surely_conflict": share(high_P < 0, sure_P),
        "surely_agree": share(low_P > 0, sure_P),
        "known_prompts": int(known_P.sum()),
    }


def _fisher(within_P: np.ndarray, logw_PR: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % intervals of a correlation of n draws by Fisher's transformation; unknown (NaN) for n below 10."""
    n_P = np.isfinite(logw_PR).sum(1)
    with np.errstate(invalid="ignore", divide="ignore"):
        half_P = np.where(n_P >= MIN_UNITS, WIDE / np.sqrt(np.maximum(n_P - 3, 1)), np.nan)
        z_P = np.arctanh(np.clip(within_P, -1 + 1e-12, 1 - 1e-12))
        return np.tanh(z_P - half_P), np.tanh(z_P + half_P)


def _resamples(logw_PR: np.ndarray, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Bootstrap replicates: which prompts (P,), and log-weights (P, R) of their responses, both drawn again. None from few of either."""
    n_P = np.isfinite(logw_PR).sum(1)
    if n_P.min() < MIN_UNITS or len(n_P) < MIN_PROMPTS:
        return []
    rng, p_PR = generator(seed, "relations", "bootstrap"), np.exp(logw_PR)
    drawn_BP = rng.integers(len(n_P), size=(RESAMPLES, len(n_P)))
    with np.errstate(divide="ignore"):
        return [(drawn_P, np.log(np.stack([rng.multinomial(n_P[p], p_PR[p]) / n_P[p] for p in drawn_P]))) for drawn_P in drawn_BP]


# Where this lies on the dials of exact tasks


def _dials(
    objectives: list[dict[str, Any]], pairs: list[dict[str, Any]], within_PMM: np.ndarray, logw_PR: np.ndarray, exact: bool
) -> dict[str, float]:
    """The relationship in the words of `exact-v1`, measured: what results are looked up by."""
    count = len(objectives)
    rows, columns = np.triu_indices(count, 1)
    within = within_PMM[:, rows, columns]
    each = [pair["within"].value for pair in pairs]
    spread_M = np.array([one["spread"] for one in objectives])
    some_M = spread_M[spread_M > 0]
    paid = min((one["paid"] for one in objectives if not one["constant"]), default=1.0)
    noises = [one["noise"] for one in objectives if np.isfinite(one["noise"])]
    # Correlations that differ between prompts by more than sampling explains.
    drawn = (
        0.0
        if exact
        else float(np.nanmean((1 - within**2) ** 2) if np.isfinite(within).any() else 0.0) / max(np.isfinite(logw_PR).sum(1).mean() - 1, 1)
    )
    known = within[:, np.isfinite(within).any(0)]
    variance = float(np.nanmean(np.nanvar(known, axis=0))) if known.size else float("nan")
    return {
        "objective_count": count,
        "rho": float(np.nanmean(each)) if np.isfinite(each).any() else float("nan"),
        "rho_lowest": float(np.nanmin(each)) if np.isfinite(each).any() else float("nan"),
        "rho_highest": float(np.nanmax(each)) if np.isfinite(each).any() else float("nan"),
        "scale": float(some_M.max() / some_M.min()) if len(some_M) else float("nan"),
        "sparse": paid if paid < SPARSE else 0.0,
        "noise": float(np.mean(noises)) if noises else 0.0,
        "context": float(np.sqrt(max(0.0, variance - drawn))),
    }


# Responses of the reference


@dataclass(frozen=True)
class _Found:
    """Prompts as text, what was scored, and some responses to score again."""

    prompts: list[str]
    rewards_PRM: np.ndarray
    logw_PR: np.ndarray
    unscored_M: np.ndarray
    samples: int
    rows: list[tuple[Any, str]]


def _enumerated(task: Any, seed: int) -> _Found:
    rewards_PRM, logp_PR = task.rewards_PRM("train"), task.reference_logp_PR("train")
    rng, prompts = generator(seed, "relations", "noise"), task.prompts("train")
    each, chance_PR = -(-RESCORED // len(prompts)), np.exp(logp_PR)
    rows = [
        (p, task.responses[r]) for p, c_R in zip(prompts, chance_PR, strict=True) for r in rng.choice(len(c_R), each, p=c_R / c_R.sum())
    ]
    return _Found([_shown(p) for p in prompts], rewards_PRM, logp_PR, np.zeros(rewards_PRM.shape[2], dtype=int), 0, rows)


def _sampled(task: Task, prompts: int, group: int, seed: int) -> _Found:
    """Responses that every objective scored count; a prompt with fewer than two of them is left out."""

    policy = build_policy(task, "reference", {})
    known = task.prompts("train")
    places = np.sort(generator(seed, "relations", "prompts").permutation(len(known))[:prompts])
    rewards, rows = [], []
    for prompt in counted("sampling prompt", [known[i] for i in places]):
        (made,) = generate(
            policy, [prompt], gates_NK=None, max_new_tokens=task.max_new_tokens, seed=seed_for(seed, "relations"), group=group
        )
        rewards.append(task.score(made.prompts, made.texts))
        rows += list(zip(made.prompts, made.texts, strict=True))
    raw_PGM = np.stack(rewards)
    unscored_M = np.isnan(raw_PGM).sum((0, 1))
    scored_PG = ~np.isnan(raw_PGM).any(2)
    kept = scored_PG.sum(1) >= 2
    if not kept.any():
        counts = ", ".join(f"{name} {n}" for name, n in zip(task.objectives.names, unscored_M, strict=True))
        raise ConfigError(
            "objectives are related by responses that all of them could score",
            found=f"no prompt has two such responses; unscored of {len(rows)}: {counts}",
            remedy="let objectives return a number where they can, or draw more responses",
        )
    with np.errstate(divide="ignore"):
        logw_PG = np.log(scored_PG[kept] / scored_PG[kept].sum(1, keepdims=True))
    shown = [_shown(known[i]) for i in places[kept]]
    few = rows[:: max(1, len(rows) // FEW)][:FEW]  # scoring may cost money
    return _Found(shown, np.nan_to_num(raw_PGM[kept]), logw_PG, unscored_M, len(rows), few)


def _noise(task: Task, rows: list[tuple[Any, str]], seed: int) -> np.ndarray:
    """(M,) standard deviation of a score around its mean, from scoring the same responses twice."""
    prompts, completions = [p for p, _ in rows], [c for _, c in rows]
    once, again = (
        task.observe(prompts, completions, streams=[seed_for(seed, "relations", "scored", time, n) for n in range(len(rows))])
        for time in (0, 1)
    )
    return np.sqrt(_mean((once - again) ** 2) / 2)


def _shown(prompt: Any) -> str:
    text = prompt.text if prompt.messages is None else str(prompt.messages[-1].get("content", ""))
    return " ".join(str(text).split())


# Gradients


@dataclass(frozen=True)
class Probe:
    """What a probe found: (M, M) matrices, [j, k]; `low` and `high` bound the cosine (NaN: unknown; the cosine itself where exact)."""

    names: tuple[str, ...]
    cosine_MM: np.ndarray
    low_MM: np.ndarray
    high_MM: np.ndarray
    rate_MM: np.ndarray
    norm_M: np.ndarray
    steps: int
    samples: int
    exact: bool

    def to_json(self) -> Mapping[str, Any]:
        """Strict JSON; unknown is None."""
        return plain({name.removesuffix("_MM").removesuffix("_M"): value for name, value in vars(self).items()})


def probe(
    task: Task,
    *,
    steps: int = 0,
    batches: int = BATCHES,
    learner: PolicyGradient | None = None,
    seed: int = 0,
    exact: bool | None = None,
) -> Probe:
    """Gradients of every objective's return after `steps` of training at equal weights; `learner` says how large and where adapters are.

    Raises ConfigError for a task of one objective, or fewer than 2 batches.
    """
    m = task.objectives.count
    exact = task.is_exact if exact is None else exact
    if m < 2 or steps < 0 or batches < 2:
        raise ConfigError(
            "a probe compares at least two objectives, on at least 2 batches, after 0 steps or more",
            found=f"{m} objectives, {batches} batches, {steps} steps",
            remedy=f"batches={BATCHES}, steps=0, for example",
        )
    if exact:
        gradients_BMD, samples = _exact_gradients(task, steps, seed, learner), 0
        products = np.einsum("bmd,bnd->mn", gradients_BMD, gradients_BMD)
        cosine_MM, rate_MM, norm_M = _cosines(products)
        low_MM = high_MM = cosine_MM
    else:
        gradients_BMD, samples = _sampled_gradients(task, steps, batches, seed, learner or PolicyGradient())
        inner = np.einsum("bmd,cnd->bcmn", gradients_BMD, gradients_BMD, optimize=True)
        cosine_MM, rate_MM, norm_M = _cosines(_across(inner))
        low_MM, high_MM = _jackknife(inner, cosine_MM)
    return Probe(task.objectives.names, cosine_MM, low_MM, high_MM, rate_MM, norm_M, steps, samples, exact)


def _across(inner_BBMM: np.ndarray) -> np.ndarray:
    """(M, M) mean inner product over pairs of different batches."""
    b = len(inner_BBMM)
    return (inner_BBMM.sum((0, 1)) - np.einsum("bbmn->mn", inner_BBMM)) / (b * (b - 1))


def _cosines(products_MM: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Cosines, trade-off rates and lengths from inner products; NaN where a squared length is not positive."""
    square_M = np.diagonal(products_MM)
    norm_M = np.sqrt(np.where(square_M > 0, square_M, np.nan))
    cosine_MM = np.clip(products_MM / (norm_M[:, None] * norm_M), -1, 1)
    return cosine_MM, products_MM / np.square(norm_M), norm_M


def _jackknife(inner_BBMM: np.ndarray, cosine_MM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Intervals of the cosines: each batch left out once; unknown below 10 batches, or where a replicate is."""
    b = len(inner_BBMM)
    if b < MIN_UNITS:
        return np.full_like(cosine_MM, np.nan), np.full_like(cosine_MM, np.nan)
    kept = [np.delete(np.delete(inner_BBMM, out, axis=0), out, axis=1) for out in range(b)]
    left_out = np.stack([_cosines(_across(inner))[0] for inner in kept])
    half_MM = WIDE * np.sqrt((b - 1) / b * np.square(left_out - left_out.mean(0)).sum(0))
    return np.clip(cosine_MM - half_MM, -1, 1), np.clip(cosine_MM + half_MM, -1, 1)


def _spec(task: Task, learner: Any, seed: int) -> TrainSpec:
    m = task.objectives.count
    return TrainSpec(task=describe(task), learner=describe(learner), preference=(1 / m,) * m, seed=seed)


def _gradients(values: list[torch.Tensor], weights: list[torch.Tensor]) -> np.ndarray:
    """(M, D) float64 gradients of M values."""
    rows = [torch.autograd.grad(value, weights, retain_graph=True) for value in values]
    return np.stack([torch.cat([g.flatten() for g in row]).double().cpu().numpy() for row in rows])


def _exact_gradients(task: Any, steps: int, seed: int, like: PolicyGradient | None) -> np.ndarray:
    """(1, M, D) by enumeration."""
    shape = {name: getattr(like, name) for name in ("rank", "alpha", "targets", "device", "dtype")} if like else {}
    learner = ExactGradient(**shape)
    spec = _spec(task, learner, seed)
    policy = learner.start(spec, task, {})
    weights = policy.bank.parameters()
    optimizer = torch.optim.Muon(weights, lr=learner.lr, weight_decay=0.0, momentum=learner.momentum)
    for step in range(steps):
        learner.update(policy, optimizer, task, spec, step)
    reward_PM, kl_P, _ = enumerated_returns(policy, task, torch.ones(task.prompt_count, 1, device=policy.device))
    returns_M = (reward_PM - task.beta * kl_P[:, None]).mean(0)
    return _gradients(list(returns_M), weights)[None]


def _sampled_gradients(task: Task, steps: int, batches: int, seed: int, learner: PolicyGradient) -> tuple[np.ndarray, int]:
    """(B, M, D), one per batch of the learner's size, and how many responses were drawn."""
    learner = replace(learner, samples=max(learner.samples, learner.batch * max(steps, 1)))
    spec = _spec(task, learner, seed)
    policy = learner.start(spec, task, {})
    weights = policy.bank.parameters()
    optimizer = learner.new_optimizer(weights)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learner.lr * learner.pace(step)
        learner.update(policy, optimizer, learner.collect(policy, task, spec, step), beta=task.beta, step=step)
    found = [_batch_gradients(policy, task, spec, learner, steps + number) for number in range(batches)]
    return np.stack(found), (steps + batches) * learner.batch


def _batch_gradients(policy: ParameterMix, task: Task, spec: TrainSpec, learner: PolicyGradient, step: int) -> np.ndarray:
    """(M, D) policy gradients of the M returns from one batch, with one forward."""
    bare = replace(learner, baseline="leave_one_out", normalize="none", kl_in="reward", kl_estimator="k1", length="sum", epochs=1)
    batch = bare.collect(policy, task, spec, step)
    made, m = batch.responses, task.objectives.count
    logp_NT = bare.logp(policy, made, slice(0, learner.batch), gates_NK=made.gates_NK)
    penalty_N, combine = task.beta * batch.kl_N, bare.combine(spec)
    values = []
    for e_M in np.eye(m):
        advantage_N = combine.advantages(made.rewards_NM, np.tile(e_M, (learner.batch, 1)), penalty_N, task.objectives, group=learner.group)
        loss = policy_loss(logp_NT, made.mask_NT, torch.from_numpy(advantage_N).to(policy.device), rows=learner.batch)
        values.append(-loss)
    return _gradients(values, weights=policy.bank.parameters())
