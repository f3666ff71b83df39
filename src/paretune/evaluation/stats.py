"""Numbers with their uncertainty: the bootstrap with an explicit generator, and t intervals over prompts.

A *unit* is what was drawn independently: a task seed when methods are compared, a prompt when one policy is measured. Units are
resampled within their stratum (a dial), never across. Where the same unit was measured in every stratum it must say its
name, and is then drawn with all that was measured on it: exact tasks of one seed share language and reward features at every dial,
and taken for independent they would make intervals over several dials too narrow.

Intervals of `estimate` are percentile intervals, and they are NaN below 10 units in any stratum. A bootstrap of few units is too narrow:
for the mean of n normal draws the "95 %" interval covers 82 % at n = 5 and 90 % at n = 10 (the tests measure it), and for a skewed
quantity less. A reader cannot see that in a table, so no interval is printed where it would mislead.

Responses to one prompt are alike, and prompts may be few: `over_prompts` takes Student's t with the prompts as units, which covers 95 % of
normal means from any number of prompts, where a bootstrap over six prompts covers 85 %.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy.stats import beta, bootstrap, t, trim_mean

from paretune.seeds import generator
from paretune.types import Estimate

__all__ = [
    "MIN_UNITS",
    "Profile",
    "estimate",
    "iqm",
    "over_prompts",
    "paired_difference",
    "performance_profile",
    "share_of_wins",
]

MIN_UNITS = 10
MIN_PROMPTS = 3  # two may agree by chance, and the interval then has no width
LEVEL = 0.95
RESAMPLES = 2000

Statistic = Callable[[np.ndarray], np.ndarray]
"""(..., N) -> (...): reduces the last axis."""


def iqm(values: np.ndarray) -> np.ndarray:
    """Interquartile mean over the last axis: the mean of what is left when floor(N / 4) values are cut at either end.

    Source: Agarwal et al. 2021 (rliable). Differs: no. Hides: the worst quarter, which is often the point: print the worst beside it.
    """
    values = np.asarray(values, dtype=np.float64)
    return np.where(np.isnan(values).any(-1), np.nan, trim_mean(values, 0.25, axis=-1))


def estimate(
    values_N: Sequence[float] | np.ndarray,
    *,
    seed: int,
    strata_N: Sequence[object] | np.ndarray | None = None,
    units_N: Sequence[Hashable] | None = None,
    statistic: str = "mean",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """The statistic ("mean", "iqm" or "median") of N values with its bootstrap interval; `strata_N` names the stratum of each value.

    With `units_N` (the task seed of each value), a unit is drawn with all of its values, one in every stratum; n counts units then,
    values otherwise. A NaN among the values makes everything NaN: leave unscored units out yourself, and print how many there were.
    """
    reduce = _statistic(statistic)
    if units_N is not None:
        table_UD = _table(values_N, strata_N, units_N)
        low, high = _joint_interval(table_UD, reduce, seed, level, resamples)
        value = float(reduce(table_UD.ravel())) if table_UD.size else float("nan")
        return Estimate(value=value, low=low, high=high, n=len(table_UD))
    groups = _strata(values_N, strata_N)
    values = np.concatenate(groups)
    value = float(reduce(values)) if len(values) else float("nan")
    low, high = _interval(groups, lambda *parts: reduce(np.concatenate(parts, axis=-1)), seed, level, resamples)
    return Estimate(value=value, low=low, high=high, n=len(values))


def paired_difference(
    a_N: Sequence[float] | np.ndarray,
    b_N: Sequence[float] | np.ndarray,
    *,
    seed: int,
    strata_N: Sequence[object] | np.ndarray | None = None,
    units_N: Sequence[Hashable] | None = None,
    statistic: str = "mean",
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Estimate:
    """`estimate` of a - b where value n of both shares its seed, prompt and noise: far narrower than two intervals side by side."""
    a_N, b_N = _pairs(a_N, b_N)
    return estimate(a_N - b_N, seed=seed, strata_N=strata_N, units_N=units_N, statistic=statistic, level=level, resamples=resamples)


@dataclass(frozen=True, eq=False)
class PromptMeans:
    """Means over the known samples, (...), their standard errors, half the width of their intervals, and the known samples."""

    value: np.ndarray
    error: np.ndarray
    half: np.ndarray
    n: np.ndarray


def over_prompts(values_S: np.ndarray, prompt_S: np.ndarray, *, level: float = LEVEL) -> PromptMeans:
    """The mean over the first axis of sampled `values_S` (S, ...), whose samples of one prompt may be alike. NaN samples are left out.

    The error is that of the prompts' sums around the mean, so it holds for new prompts as well as for new responses to these. Without a
    second prompt nothing is known of it. The interval is unknown below 10 samples or 3 prompts.

    Source: the cluster-robust variance of a mean (Liang & Zeger 1986) with G / (G - 1) and t quantiles of G - 1 degrees for G prompts; with
    equally many samples of each it is the t interval of the prompts' means. Differs: no. Hides: intervals from few prompts of a skewed
    quality cover less (92 % from 6 exponential ones).
    """
    values_S = np.asarray(values_S, dtype=np.float64)
    known_SX = np.isfinite(values_S).reshape(len(values_S), -1)
    filled_SX = np.where(known_SX, values_S.reshape(known_SX.shape), 0.0)
    own_GS = (np.unique(prompt_S)[:, None] == np.asarray(prompt_S)).astype(np.float64)
    n_X, prompts_X = known_SX.sum(0), (own_GS @ known_SX > 0).sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        value_X = filled_SX.sum(0) / n_X
        sums_GX = own_GS @ np.where(known_SX, filled_SX - value_X, 0.0)
        error_X = np.where(prompts_X > 1, np.sqrt(prompts_X / (prompts_X - 1) * (sums_GX**2).sum(0)) / n_X, np.nan)
        enough_X = (n_X >= MIN_UNITS) & (prompts_X >= MIN_PROMPTS)
        half_X = np.where(enough_X, t.ppf((1 + level) / 2, prompts_X - 1) * error_X, np.nan)
    return PromptMeans(*(found_X.reshape(values_S.shape[1:]) for found_X in (value_X, error_X, half_X, n_X)))


def share_of_wins(
    a_N: Sequence[float] | np.ndarray,
    b_N: Sequence[float] | np.ndarray,
    *,
    strata_N: Sequence[object] | np.ndarray | None = None,
    units_N: Sequence[Hashable] | None = None,
    level: float = LEVEL,
) -> Estimate:
    """P(a is above b on the same unit), mean over strata, ties counted half: the probability of improvement on a new task seed.

    The interval is that of Clopper and Pearson for the number of units (10 wins of 10: 0.69 to 1), which a bootstrap would give no
    width. A unit that wins in some of its strata counts as that share of a win; it spreads less than a whole win would, so the
    interval is then wider than it need be.

    Source: the sign test; Clopper & Pearson 1934. Differs: ties and strata make wins fractional. Hides: by how much.
    """
    a_N, b_N = _pairs(a_N, b_N)
    wins_UD = _table((np.sign(a_N - b_N) + 1) / 2, strata_N, range(len(a_N)) if units_N is None else units_N)
    n, value = len(wins_UD), float(wins_UD.mean()) if wins_UD.size else float("nan")
    if n < MIN_UNITS or np.isnan(value):
        return Estimate(value=value, low=float("nan"), high=float("nan"), n=n)
    k, tail = n * value, (1 - level) / 2
    low = float(beta.ppf(tail, k, n - k + 1)) if k > 0 else 0.0
    high = float(beta.ppf(1 - tail, k + 1, n - k)) if k < n else 1.0
    return Estimate(value=value, low=low, high=high, n=n)


@dataclass(frozen=True, eq=False)
class Profile:
    """The share of runs above each threshold, (T,), with the ends of its pointwise band (NaN below 10 units); `n` counts units."""

    tau_T: np.ndarray
    share_T: np.ndarray
    low_T: np.ndarray
    high_T: np.ndarray
    n: int


def performance_profile(
    values_N: Sequence[float] | np.ndarray,
    tau_T: Sequence[float] | np.ndarray,
    *,
    seed: int,
    strata_N: Sequence[object] | np.ndarray | None = None,
    units_N: Sequence[Hashable] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
) -> Profile:
    """The share of runs whose value is above tau, for every tau: a whole distribution, where a mean is one number.

    A profile that is nowhere below another one is at least as good by every increasing measure. Units as in `estimate`.

    Source: Agarwal et al. 2021 (run-score distributions); Dolan & More 2002. Differs: a unit is drawn with all of its strata.
    Hides: which run is which, so that methods measured on the same seeds look less different than they are; and the band has no
    width where all runs agree.
    """
    tau_T = np.asarray(tau_T, dtype=np.float64)
    table_UD = _table(values_N, strata_N, range(len(values_N)) if units_N is None else units_N)
    unknown_T, n = np.full(len(tau_T), np.nan), len(table_UD)
    if not n:
        return Profile(tau_T, unknown_T, unknown_T, unknown_T, n)
    above_TU = np.where(np.isnan(table_UD), np.nan, table_UD > tau_T[:, None, None]).mean(-1)
    if n < MIN_UNITS:
        return Profile(tau_T, above_TU.mean(-1), unknown_T, unknown_T, n)
    places_SU = _draws(n, seed, resamples) + n * np.arange(resamples)[:, None]
    counts_SU = np.bincount(places_SU.ravel(), minlength=resamples * n).reshape(resamples, n)  # how often a resample holds each unit
    low_T, high_T = np.quantile(counts_SU @ above_TU.T / n, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return Profile(tau_T, above_TU.mean(-1), low_T, high_T, n)


def _pairs(a_N: Sequence[float] | np.ndarray, b_N: Sequence[float] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a_N, b_N = np.asarray(a_N, dtype=np.float64), np.asarray(b_N, dtype=np.float64)
    assert a_N.shape == b_N.shape, f"pairs: {a_N.shape} and {b_N.shape}"
    return a_N, b_N


def _table(
    values_N: Sequence[float] | np.ndarray, strata_N: Sequence[object] | np.ndarray | None, units_N: Sequence[Hashable]
) -> np.ndarray:
    """(U, D): one row per unit, one column per stratum, both in the order of their names."""
    values_N = np.asarray(values_N, dtype=np.float64)
    strata = [""] * len(values_N) if strata_N is None else [str(label) for label in strata_N]
    units = [str(unit) for unit in units_N]
    assert values_N.ndim == 1, f"one value per unit and stratum, not shape {values_N.shape}"
    assert len(units) == len(strata) == len(values_N), f"{len(units)} units and {len(strata)} strata for {len(values_N)} values"
    rows, columns = ({name: k for k, name in enumerate(sorted(set(names)))} for names in (units, strata))
    table_UD = np.empty((len(rows), len(columns)))
    places = [(rows[unit], columns[stratum]) for unit, stratum in zip(units, strata, strict=True)]
    assert len(set(places)) == len(places) == table_UD.size, "every unit has one value in every stratum"
    for place, value in zip(places, values_N, strict=True):
        table_UD[place] = value
    return table_UD


def _joint_interval(table_UD: np.ndarray, reduce: Statistic, seed: int, level: float, resamples: int) -> tuple[float, float]:
    """Percentile interval of `reduce` over all values of the table, its rows resampled."""
    if len(table_UD) < MIN_UNITS or np.isnan(table_UD).any():
        return float("nan"), float("nan")
    drawn_S = reduce(table_UD.take(_draws(len(table_UD), seed, resamples), axis=0).reshape(resamples, -1))
    low, high = np.quantile(drawn_S, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@lru_cache(maxsize=8)
def _draws(units: int, seed: int, resamples: int) -> np.ndarray:
    """(S, U) which units each resample holds: the same for every quantity, so that those of two methods are drawn together."""
    return generator(seed, "bootstrap of units", units).integers(units, size=(resamples, units))


def _interval(
    groups: Sequence[np.ndarray], statistic: Callable[..., np.ndarray], seed: int, level: float, resamples: int
) -> tuple[float, float]:
    """Percentile interval of `statistic(*groups)`, each group resampled by itself."""
    unknown = any(np.isnan(group).any() for group in groups)
    if unknown or not groups or min(map(len, groups)) < MIN_UNITS:
        return float("nan"), float("nan")
    result = bootstrap(
        tuple(groups),
        lambda *parts, axis=-1: statistic(*parts),
        n_resamples=resamples,
        confidence_level=level,
        method="percentile",
        vectorized=True,
        batch=200,
        axis=-1,
        rng=generator(seed, "bootstrap"),
    )
    return float(result.confidence_interval.low), float(result.confidence_interval.high)


def _strata(values_N: Sequence[float] | np.ndarray, strata_N: Sequence[object] | np.ndarray | None) -> list[np.ndarray]:
    values_N = np.asarray(values_N, dtype=np.float64)
    assert values_N.ndim == 1, f"one value per unit, not shape {values_N.shape}"
    if strata_N is None:
        return [values_N]
    labels = [str(label) for label in strata_N]
    assert len(labels) == len(values_N), f"{len(labels)} strata for {len(values_N)} units"
    return [values_N[[label == name for label in labels]] for name in sorted(set(labels))] or [values_N]


def _statistic(name: str) -> Statistic:
    known: dict[str, Statistic] = {
        "mean": lambda values: np.mean(values, axis=-1),
        "median": lambda values: np.median(values, axis=-1),
        "iqm": iqm,
    }
    assert name in known, f"statistic {name!r}: one of {', '.join(known)}"
    return known[name]
