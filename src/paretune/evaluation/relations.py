"""How the objectives of a task relate, before anything is trained: what the reference policy's own responses say.

Where responses can be enumerated every number is exact. Elsewhere `group` responses to each prompt are drawn from the reference and
scored; intervals resample the responses of each prompt, and are unknown below 10 of them. NaN is "unknown": an objective that gave all
responses to a prompt the same score has no correlation there, and such prompts are left out and counted.

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
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import comb

from paretune.errors import ConfigError
from paretune.evaluation.metrics import plain
from paretune.evaluation.stats import LEVEL, MIN_UNITS
from paretune.policy.base import build_policy
from paretune.policy.rollout import generate
from paretune.registry import describe
from paretune.seeds import generator, seed_for
from paretune.tasks.exact.rewards import correlations_P, spreads
from paretune.types import Estimate

if TYPE_CHECKING:
    from paretune.tasks.base import Task

__all__ = ["Relations", "rank", "relate", "trade_off_rates"]

GROUP = 16  # responses per prompt, and
PROMPTS = 16  # prompts, where nothing else is asked
RESAMPLES = 500
FLAT = 8  # responses of the group that `flat` is about
RESCORED, FEW = 256, 32  # responses that are scored twice to see whether scores are noisy: of an exact task, of another one
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
    again = {name: np.array([statistic(rewards_PRM, logw) for logw in replicates]) for name, statistic in STATISTICS.items()}
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
        half_P = np.where(n_P >= MIN_UNITS, 1.96 / np.sqrt(np.maximum(n_P - 3, 1)), np.nan)
        z_P = np.arctanh(np.clip(within_P, -1 + 1e-12, 1 - 1e-12))
        return np.tanh(z_P - half_P), np.tanh(z_P + half_P)


def _resamples(logw_PR: np.ndarray, seed: int) -> list[np.ndarray]:
    """Log-weights (P, R) of bootstrap replicates: the responses of each prompt drawn again; none where a prompt has fewer than 10."""
    p_PR, n_P = np.exp(logw_PR), np.isfinite(logw_PR).sum(1)
    if n_P.min() < MIN_UNITS:
        return []
    rng = generator(seed, "relations", "bootstrap")
    with np.errstate(divide="ignore"):
        return [np.log(np.stack([rng.multinomial(n, p_R) / n for n, p_R in zip(n_P, p_PR, strict=True)])) for _ in range(RESAMPLES)]


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
    variance = float(np.nanmean(np.nanvar(within, axis=0))) if np.isfinite(within).any() else float("nan")
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
    for prompt in (known[i] for i in places):
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
