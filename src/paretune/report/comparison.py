"""Methods against each other over task seeds: what they reach with intervals, what they cost, and who beats whom on the same seeds.

A *score* is one number per setting and task seed: the worst or the mean attainment over the judged preferences (the gain, where the
optimum is not known). Task seeds are the units of every interval. Over several settings a seed is drawn with all of them, because
tasks of one seed share language and features at every dial. Only seeds that were measured in all settings, and for a difference by
both methods, are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.report.data import SPLITS, Cell, Results, Setting
from paretune.report.tables import LEADERBOARD, Column, Table, all_samples

if TYPE_CHECKING:
    from paretune.types import Estimate

__all__ = [
    "ALL",
    "BASELINES",
    "QUALITIES",
    "Group",
    "baselines",
    "comparison_table",
    "enough_for_intervals",
    "estimate_of",
    "group_row",
    "groups",
    "pair_table",
    "profile_table",
    "scores",
    "shared",
]

ALL = "all settings"
QUALITIES = ("worst", "mean")  # over the judged preferences of one task seed
BASELINES = ("linear", "uniform")  # what a method has to beat: a sweep of single policies, and one training for everybody
BOOTSTRAP = 0  # the seed of every interval, so that the same results give the same report
TAUS = 61  # thresholds of a profile

Scores = Mapping[tuple[str, str], float]
"""(label of the setting, task seed) -> score."""


@dataclass(frozen=True)
class Group:
    """Settings that are looked at together: one, or all of them."""

    label: str
    settings: tuple[Setting, ...]

    @property
    def slug(self) -> str:
        return "all" if self.pooled else self.settings[0].slug

    @property
    def pooled(self) -> bool:
        return len(self.settings) > 1

    @property
    def exact(self) -> bool:
        return self.settings[0].exact

    @property
    def quality(self) -> str:
        return self.settings[0].quality

    @property
    def headline(self) -> str:
        return self.settings[0].headline

    @property
    def labels(self) -> list[str]:
        """The methods measured in every setting."""
        return [label for label in self.settings[0].labels if all(label in setting.labels for setting in self.settings)]

    def of(self, label: str) -> list[Cell]:
        return [cell for setting in self.settings for cell in setting.of(label)]


@lru_cache(maxsize=2)
def groups(results: Results) -> list[Group]:
    """The finished settings together (where all are exact: gains on different tasks are no scale), then each setting by itself. None
    without two methods that have two task seeds.

    A setting is finished where its methods share at least half as many task seeds as elsewhere: one just begun would leave nothing.
    """
    found = [Group(setting.label, (setting,)) for setting in results.settings]
    most = max((len(setting.shared_seeds) for setting in results.settings), default=0)
    whole = tuple(setting for setting in results.settings if 2 * len(setting.shared_seeds) >= most)
    if len(whole) > 1 and all(setting.exact for setting in results.settings):
        missing = len(whole) < len(results.settings)
        found.insert(0, Group(f"{len(whole)} of {len(results.settings)} settings" if missing else ALL, whole))
    return [group for group in found if len([count for count in _seeds(group) if count > 1]) > 1]


def _seeds(group: Group) -> list[int]:
    """The number of task seeds that each method has in all settings of the group."""
    return [len(shared(group, scores(group, label, group.headline, "mean"))) for label in group.labels]


def enough_for_intervals(results: Results) -> tuple[bool, int]:
    """Whether some group has intervals, and the largest number of task seeds."""
    from paretune.evaluation.stats import MIN_UNITS

    most = max((count for group in groups(results) for count in _seeds(group)), default=0)
    return most >= MIN_UNITS, most


def scores(group: Group, label: str, split: str, which: str, *path: str) -> Scores:
    """What a method reached on one split; seeds where it is unknown are left out. `path` leads to another summary than the quality's."""
    found: dict[tuple[str, str], list[float]] = {}
    for setting in group.settings:
        for cell in setting.of(label):
            value = _score(cell.measured(split), path or (setting.quality,), which)
            if value is not None:
                found.setdefault((setting.label, cell.unit), []).append(value)
    return {place: float(np.mean(values)) for place, values in found.items()}


def _score(measured: Mapping[str, Any], path: Sequence[str], which: str) -> float | None:
    for name in path:
        measured = measured.get(name) or {}
    value = measured.get(which)
    if value is None and which == "worst":  # a gain has no worst of its own
        known = [e["value"] for e in measured.get("per_preference", ()) if isinstance(e, Mapping) and e["value"] is not None]
        value = min(known) if known else None
    return value["value"] if isinstance(value, Mapping) else value


def shared(group: Group, *several: Scores) -> list[str]:
    """The task seeds at which all of these scores are known in every setting of the group."""
    seeds = {seed for _, seed in several[0]} if several else set()
    return sorted(seed for seed in seeds if all((s.label, seed) in one for s in group.settings for one in several))


def _long(group: Group, one: Scores, seeds: Sequence[str]) -> dict[str, Any]:
    """Values, strata and units as `paretune.evaluation.stats` takes them."""
    places = [(setting.label, seed) for setting in group.settings for seed in seeds]
    return {"values_N": [one[place] for place in places], "strata_N": [s for s, _ in places], "units_N": [u for _, u in places]}


def baselines(group: Group) -> list[str]:
    """The labels of the methods that others are compared with by default; of several variants, the one with most cells."""
    found = []
    for name in BASELINES:
        labels = [label for label in group.labels if group.of(label)[0].record["method"]["name"] == name]
        found += sorted(labels, key=lambda label: (-len(group.of(label)), label))[:1]
    return found


def estimate_of(row: Mapping[str, Any], key: str) -> Estimate | None:
    """The estimate that stands in a row as `key`, `key`_low and `key`_high; None where it is unknown."""
    from paretune.types import Estimate

    if row.get(key) is None:
        return None
    low, high = (float("nan") if row.get(f"{key}_{end}") is None else row[f"{key}_{end}"] for end in ("low", "high"))
    return Estimate(value=row[key], low=low, high=high, n=row["seeds"])


def _flat(key: str, found: Estimate) -> dict[str, float | None]:
    known = {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
    return {name: float(value) if np.isfinite(value) else None for name, value in known.items()}


# What each method reaches, and what it costs


def _ends(key: str, title: str, text: str) -> tuple[Column, ...]:
    return (
        Column(key, title, "share", text),
        Column(f"{key}_low", f"{title}, low", "share", "lower end of its 95 % interval over task seeds"),
        Column(f"{key}_high", f"{title}, high", "share", "upper end of its 95 % interval over task seeds"),
    )


HELP = {
    "worst": "of each task seed's lowest attainment (or gain) over the judged preferences",
    "mean": "of each task seed's mean attainment (or gain) over the judged preferences",
}
COSTS = ("trainings", "forwards_per_token", "evaluations", "samples_total", "samples_path", "tokens_total", "tokens_path")
COMPARISON = (
    *(Column(key, key, "text") for key in ("setting", "method", "category", "prompts")),
    Column("seeds", "seeds", "count", "task seeds measured in every setting"),
    *(
        column
        for which in QUALITIES
        for column in (
            *_ends(f"{which}_iqm", f"{which}: IQM", f"interquartile mean over task seeds {HELP[which]}"),
            *_ends(f"{which}_mean", f"{which}: mean", f"mean over task seeds {HELP[which]}"),
            Column(f"{which}_min", f"{which}: lowest", "share", f"lowest value over task seeds {HELP[which]}"),
        )
    ),
    Column("own_name", "own utility", "text", "the utility that the method optimizes, where that is not the weighted sum"),
    *_ends("own_worst_iqm", "own: worst, IQM", "interquartile mean over task seeds of the worst attainment of the method's own utility"),
    *_ends("own_mean_iqm", "own: mean, IQM", "interquartile mean over task seeds of the mean attainment of the method's own utility"),
    Column("violation_worst", "violation, worst", "number", "the largest violation of a constraint over preferences and seeds"),
    Column("violation_mean", "violation, mean", "number", "the mean violation of the constraints over preferences and seeds"),
    *(column for key in COSTS for column in LEADERBOARD if column.key == key),
    Column("seconds_total", "seconds", "count", "wall clock of trainings and search, one after the other"),
    Column("seconds_path", "seconds, critical path", "count", "the same where trainings of one wave run side by side"),
)


@lru_cache(maxsize=2)
def comparison_table(results: Results) -> Table:
    """One row per group, split and method: scores over task seeds with intervals, own utility, and the cost of one family."""
    rows = [
        row
        for group in groups(results)
        for split in SPLITS
        for label in results.families
        if label in group.labels and (row := group_row(group, label, split)) is not None
    ]
    return Table("comparison", COMPARISON, rows)


def group_row(group: Group, label: str, split: str) -> dict[str, Any] | None:
    """A row of the comparison; None where no task seed is known in every setting."""
    cells = group.of(label)
    row: dict[str, Any] = {"setting": group.label, "method": label, "category": cells[0].card["category"], "prompts": split}
    for which in QUALITIES:
        one = scores(group, label, split, which)
        seeds = shared(group, one)
        if not seeds:
            return None
        row |= {"seeds": len(seeds), f"{which}_min": min(one[s.label, seed] for s in group.settings for seed in seeds)}
        row |= _measured(group, one, seeds, which, ("iqm", "mean"))
    return row | _own(group, label, split) | _cost(cells)


def _measured(group: Group, one: Scores, seeds: Sequence[str], name: str, statistics: Sequence[str]) -> dict[str, float | None]:
    from paretune.evaluation.stats import estimate

    found: dict[str, float | None] = {}
    for statistic in statistics:
        found |= _flat(f"{name}_{statistic}", estimate(**_long(group, one, seeds), seed=BOOTSTRAP, statistic=statistic))
    return found


def _own(group: Group, label: str, split: str) -> dict[str, Any]:
    """Attainment of the utility that the method optimizes, and how far it misses its constraints, where its cells know."""
    found = [own for cell in group.of(label) if (own := cell.measured(split).get("own_utility"))]
    row: dict[str, Any] = {"own_name": ", ".join(sorted({str(own["name"]) for own in found}))} if found else {}
    for which in QUALITIES if found else ():
        one = scores(group, label, split, which, "own_utility", "attainment")
        seeds = shared(group, one)
        row |= _measured(group, one, seeds, f"own_{which}", ("iqm",)) if seeds else {}
    missed = [own["violation"] for own in found if own.get("violation")]
    for which, reduce in (("worst", max), ("mean", np.mean)):
        values = [violation[which] for violation in missed if violation.get(which) is not None]
        row |= {f"violation_{which}": float(reduce(values))} if values else {}
    return row


def _cost(cells: Sequence[Cell]) -> dict[str, Any]:
    """What one family costs, mean over cells."""
    row: dict[str, Any] = {
        "trainings": float(np.mean([len(cell.record["trainings"]) for cell in cells])),
        "forwards_per_token": cells[0].record.get("forwards_per_token"),
        "evaluations": float(np.mean([cell.cost("total")["evaluations"] for cell in cells])),
    }
    for kind, name in (("total", "total"), ("critical_path", "path")):
        row[f"samples_{name}"] = float(np.mean([all_samples(cell, kind) for cell in cells]))
        row |= {f"{key}_{name}": float(np.mean([cell.cost(kind)[key] for cell in cells])) for key in ("tokens", "seconds")}
    return row


# Who beats whom


PAIRS = (
    *(Column(key, key, "text") for key in ("setting", "prompts", "method", "against")),
    Column("seeds", "shared seeds", "count", "task seeds that both have in every setting"),
    *(
        column
        for which in QUALITIES
        for column in (
            *_ends(f"difference_{which}", f"difference, {which}", f"method minus the other, mean over shared task seeds {HELP[which]}"),
            *_ends(f"improvement_{which}", f"P(better), {which}", "how often the method is ahead on the same task seed; ties count half"),
        )
    ),
)


@lru_cache(maxsize=2)
def pair_table(results: Results) -> Table:
    """Every method against every other on shared task seeds: all pairs on the headline's prompts, elsewhere against the baselines."""
    rows = []
    for group in groups(results):
        default, labels = baselines(group), [label for label in results.families if label in group.labels]
        for split in SPLITS:
            known = {label: {which: scores(group, label, split, which) for which in QUALITIES} for label in labels}
            for a, b in combinations(labels, 2):
                if split == group.headline or a in default or b in default:
                    rows += _pair(group, split, known, a, b)
    return Table("pairs", PAIRS, rows)


def _pair(group: Group, split: str, known: Mapping[str, Mapping[str, Scores]], a: str, b: str) -> list[dict[str, Any]]:
    """a against b, and b against a: the same numbers, turned round."""
    from paretune.evaluation.stats import paired_difference, share_of_wins

    there, back = ({"setting": group.label, "prompts": split, "method": x, "against": y} for x, y in ((a, b), (b, a)))
    for which in QUALITIES:
        one, other = known[a][which], known[b][which]
        seeds = shared(group, one, other)
        if not seeds:
            return []
        first, second = _long(group, one, seeds), _long(group, other, seeds)
        names = {key: first[key] for key in ("strata_N", "units_N")}
        ahead = paired_difference(first["values_N"], second["values_N"], seed=BOOTSTRAP, **names)
        wins = share_of_wins(first["values_N"], second["values_N"], **names)
        for row, sign in ((there, 1), (back, -1)):
            row["seeds"] = len(seeds)  # type: ignore[assignment]
            row |= _turned(f"difference_{which}", ahead, sign, 0.0) | _turned(f"improvement_{which}", wins, sign, 1.0)  # type: ignore[arg-type]
    return [there, back]


def _turned(key: str, found: Estimate, sign: int, whole: float) -> dict[str, float | None]:
    """The estimate as it is (sign 1), or subtracted from `whole`."""
    from paretune.types import Estimate

    back = Estimate(value=whole - found.value, low=whole - found.high, high=whole - found.low, n=found.n)
    return _flat(key, found if sign > 0 else back)


# Profiles


@lru_cache(maxsize=2)
def profile_table(results: Results) -> Table:
    """The share of runs (task seeds, in every setting) whose worst score is above tau, on the headline's prompts."""
    from paretune.evaluation.stats import performance_profile

    columns = (
        *(Column(key, key, "text") for key in ("setting", "method", "prompts")),
        Column("seeds", "seeds", "count"),
        Column("tau", "tau", "number", "threshold of the worst attainment (or gain) over the judged preferences"),
        *_ends("share", "share of runs above", "share of runs whose worst score is above tau"),
    )
    rows = []
    for group in groups(results):
        split = group.headline
        known = {label: scores(group, label, split, "worst") for label in results.families if label in group.labels}
        tau_T = thresholds(group, [v for label, one in known.items() if results.families[label] != "baseline" for v in one.values()])
        for label, one in known.items():
            seeds = shared(group, one)
            if not seeds:
                continue
            found = performance_profile(**_long(group, one, seeds), tau_T=tau_T, seed=BOOTSTRAP)
            shares = zip(found.tau_T, found.share_T, found.low_T, found.high_T, strict=True)
            start = {"setting": group.label, "method": label, "prompts": split, "seeds": found.n}
            for tau, share, low, high in shares:
                ends = {f"share_{name}": float(end) if np.isfinite(end) else None for name, end in (("low", low), ("high", high))}
                rows.append({**start, "tau": float(tau), "share": float(share), **ends})
    return Table("profiles", columns, rows)


def thresholds(group: Group, contest: Sequence[float]) -> np.ndarray:
    """Where profiles are drawn: from the lowest score of any method that is no baseline (attainments: at least -1) to the highest."""
    values = np.array([*contest, 0.0])
    if group.exact:
        return np.linspace(max(-1.0, np.floor(20 * values.min()) / 20), 1.0, TAUS)
    pad = 0.05 * (float(np.ptp(values)) or 1.0)
    return np.linspace(values.min() - pad, values.max() + pad, TAUS)
