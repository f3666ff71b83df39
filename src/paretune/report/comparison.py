"""Comparison over task seeds: what methods reach with intervals, what they cost, and who beats whom on the same seeds.

A *score* is one number per setting and task seed: the worst or the mean attainment over the judged preferences (the gain, where the
optimum is not known). Task seeds are the units of every interval. Over several settings a seed is drawn with all of them, because
tasks of one seed share language and features at every dial. Only seeds that were measured in all settings, and for a difference by
both methods, are counted.

The tables `comparison`, `pairs` and `profiles` hold every number; what the page and the terminal show of them is below, and `write_rows`
writes what programs read (`paretune relate` gives advice from it):

    {"format": 2, "suite", "statistic", "level", "commits", "task_seeds", "rows": [{the task's dials (rho, objective_count, ...), "task",
      "setting", "objectives", "method", "name", "fields", "category", "learner", "n_seeds", "attainment_worst_train" and the same with
      _low, _high and _min, for mean and for test, "own_utility", "own_worst_train", ..., "violation_worst_train", "trainings",
      "forwards_per_token", "evaluations", "samples", "samples_path", "tokens", "tokens_path", "seconds", "seconds_path"}]}

`attainment_worst_train` is the interquartile mean over task seeds of each seed's lowest attainment over the judged preferences, on
training prompts; `_low` and `_high` are its 95 % interval, null below 10 task seeds; `_min` is the lowest seed. Where the optimum is
not known the keys say gain instead of attainment. What was not measured has no key; what is unknown is null.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from paretune.files import disk_errors, write_text
from paretune.report.data import NOT_DIALS, SPLITS, Results, Setting
from paretune.report.tables import COSTS, PATH_HELP, Column, Table, costs, keyed
from paretune.types import Estimate

__all__ = [
    *("ALL", "BASELINES", "QUALITIES", "TABLES", "Heat", "baselines", "board_tables", "comparison_table", "difference_heats"),
    *("enough_for_intervals", "estimate_of", "groups", "note", "on_headline", "pair_table", "profile_table", "relationship_tables"),
    *("rows", "scores", "shared", "write_rows"),
]

ALL = "all settings"
QUALITIES = ("worst", "mean")  # over the judged preferences of one task seed
BASELINES = ("linear", "uniform")  # what a method has to beat: a sweep of single policies, and one training for everybody
BOOTSTRAP = 0  # the seed of every interval, so that the same results give the same report
TAUS = 61  # thresholds of a profile

Scores = Mapping[tuple[str, str], float]  # (label of the setting, task seed) -> score


@lru_cache(maxsize=2)
def groups(results: Results) -> list[Setting]:
    """The finished settings together (where all are exact: gains on different tasks are no scale), then each setting by itself. None
    without two methods that have two task seeds.

    A setting is finished where its methods share at least half as many task seeds as elsewhere: one just begun would leave nothing.
    """
    found = list(results.settings)
    most = max((len(setting.shared_seeds) for setting in results.settings), default=0)
    whole = tuple(setting for setting in results.settings if 2 * len(setting.shared_seeds) >= most)
    if len(whole) > 1 and all(setting.exact for setting in results.settings):
        label = ALL if len(whole) == len(found) else f"{len(whole)} of {len(found)} settings"
        found.insert(0, Setting(label, label, {}, tuple(cell for setting in whole for cell in setting.cells), whole))
    return [group for group in found if len([count for count in _seeds(group) if count > 1]) > 1]


def _seeds(group: Setting) -> list[int]:
    """The number of task seeds that each method has in all settings of the group."""
    return [len(shared(group, scores(group, label, group.headline, "mean"))) for label in group.labels]


def enough_for_intervals(results: Results) -> tuple[bool, int]:
    """Whether some group has intervals, and the largest number of task seeds."""
    from paretune.evaluation.stats import MIN_UNITS

    most = max((count for group in groups(results) for count in _seeds(group)), default=0)
    return most >= MIN_UNITS, most


def scores(group: Setting, label: str, split: str, which: str, *path: str) -> Scores:
    """What a method reached on one split; seeds where it is unknown are left out. `path` leads to another summary than the quality's."""
    asked = (label, split, which, *path)
    if asked not in group.scores:
        found: dict[tuple[str, str], list[float]] = {}
        for setting in group.parts or (group,):
            for cell in setting.of(label):
                value = cell.summary(split, which, *(path or (setting.quality,)))
                if value is not None:
                    found.setdefault((setting.label, cell.unit), []).append(value)
        group.scores[asked] = {place: float(np.mean(values) if len(values) > 1 else values[0]) for place, values in found.items()}
    return group.scores[asked]


def shared(group: Setting, *several: Scores) -> list[str]:
    """The task seeds at which all of these scores are known in every setting of the group."""
    seeds = {seed for _, seed in several[0]} if several else set()
    return sorted(seed for seed in seeds if all((s.label, seed) in one for s in group.parts or (group,) for one in several))


def _long(group: Setting, one: Scores, seeds: Sequence[str]) -> dict[str, Any]:
    """Values, strata and units as `paretune.evaluation.stats` takes them."""
    places = [(setting.label, seed) for setting in group.parts or (group,) for seed in seeds]
    return {"values_N": [one[place] for place in places], "strata_N": [s for s, _ in places], "units_N": [u for _, u in places]}


def baselines(group: Setting) -> list[str]:
    """The labels of the methods that others are compared with by default; of several variants, the one with most cells."""
    found = []
    for name in BASELINES:
        labels = [label for label in group.labels if group.of(label)[0].record["method"]["name"] == name]
        found += sorted(labels, key=lambda label: (-len(group.of(label)), label))[:1]
    return found


def _ends(*keys: str) -> list[str]:
    """Each key with those of its interval."""
    return [f"{key}{end}" for key in keys for end in ("", "_low", "_high")]


def _flat(key: str, found: Estimate) -> dict[str, float | None]:
    values = (found.value, found.low, found.high)
    return {name: float(value) if np.isfinite(value) else None for name, value in zip(_ends(key), values, strict=True)}


def estimate_of(row: Mapping[str, Any], key: str) -> Estimate | None:
    """The estimate that stands in a row as `key`, `key`_low and `key`_high; None where it is unknown."""
    value, low, high = (row.get(name) for name in _ends(key))
    ends = {"low": np.nan if low is None else low, "high": np.nan if high is None else high}
    return None if value is None else Estimate(value=value, n=row["seeds"], **ends)


# The tables


@lru_cache(maxsize=2)
def comparison_table(results: Results) -> Table:
    """One row per group, split and method: scores over task seeds (interquartile mean, mean, lowest) with intervals; the scores of the
    utility that the method optimizes, and its violation of constraints; the cost of one family."""
    each = [key for which in QUALITIES for key in (*_ends(f"{which}_iqm", f"{which}_mean"), f"{which}_min")]
    own = ("own_name", *_ends("own_worst_iqm", "own_mean_iqm"), "violation_worst", "violation_mean")
    places = [(g, split, label) for g in groups(results) for split in SPLITS for label in results.families if label in g.labels]
    found = [row for group, split, label in places if (row := _group_row(group, label, split)) is not None]
    columns = keyed("setting", "method", "category", "prompts", "seeds", *each, *own, *COSTS, "seconds_total", "seconds_path")
    return Table("comparison", columns, found)


def _group_row(group: Setting, label: str, split: str) -> dict[str, Any] | None:
    """A row of the comparison; None where no task seed is known in every setting."""
    cells = group.of(label)
    row: dict[str, Any] = {"setting": group.label, "method": label, "category": cells[0].record["card"]["category"], "prompts": split}
    for which in QUALITIES:
        one = scores(group, label, split, which)
        seeds = shared(group, one)
        if not seeds:
            return None
        row |= {"seeds": len(seeds), f"{which}_min": min(_long(group, one, seeds)["values_N"])}
        row |= _estimates(group, one, seeds, which, "iqm", "mean")
    own = [found for cell in cells if (found := cell.measured(split, "own_utility"))]
    row |= {"own_name": ", ".join(sorted({str(found["name"]) for found in own}))} if own else {}
    for which in QUALITIES if own else ():
        one = scores(group, label, split, which, "own_utility", "attainment")
        seeds = shared(group, one)
        row |= _estimates(group, one, seeds, f"own_{which}", "iqm") if seeds else {}
        missed = [value for cell in cells if (value := cell.measured(split, "own_utility", "violation", which)) is not None]
        row |= {f"violation_{which}": float(max(missed) if which == "worst" else np.mean(missed))} if missed else {}
    return row | costs(cells)


def _estimates(group: Setting, one: Scores, seeds: Sequence[str], name: str, *statistics: str) -> dict[str, float | None]:
    from paretune.evaluation.stats import estimate

    found: dict[str, float | None] = {}
    for statistic in statistics:
        found |= _flat(f"{name}_{statistic}", estimate(**_long(group, one, seeds), seed=BOOTSTRAP, statistic=statistic))
    return found


@lru_cache(maxsize=2)
def pair_table(results: Results) -> Table:
    """Every method against every other on shared task seeds: all pairs on the headline's prompts, elsewhere against the baselines.

    `difference` is the mean of a method's scores minus the other's, `improvement` how often it is ahead on the same seed (ties half).
    """
    found = []
    for group in groups(results):
        default, labels = baselines(group), [label for label in results.families if label in group.labels]
        for split in SPLITS:
            known = {label: {which: scores(group, label, split, which) for which in QUALITIES} for label in labels}
            for a, b in combinations(labels, 2):
                if split == group.headline or a in default or b in default:
                    found += _pair(group, split, known, a, b)
    each = _ends(*(f"{what}_{which}" for which in QUALITIES for what in ("difference", "improvement")))
    return Table("pairs", keyed("setting", "prompts", "method", "against", "seeds", *each), found)


def _pair(group: Setting, split: str, known: Mapping[str, Mapping[str, Scores]], a: str, b: str) -> list[dict[str, Any]]:
    """a against b, and b against a: the same numbers, turned round."""
    from paretune.evaluation.stats import paired_difference, share_of_wins

    there: dict[str, Any] = {"setting": group.label, "prompts": split, "method": a, "against": b}
    back = there | {"method": b, "against": a}
    for which in QUALITIES:
        one, other = known[a][which], known[b][which]
        seeds = shared(group, one, other)
        if not seeds:
            return []
        first, second = _long(group, one, seeds), _long(group, other, seeds)
        names = {key: first[key] for key in ("strata_N", "units_N")}
        ahead = paired_difference(first["values_N"], second["values_N"], seed=BOOTSTRAP, **names)
        wins = share_of_wins(first["values_N"], second["values_N"], **names)
        for key, found, whole in ((f"difference_{which}", ahead, 0.0), (f"improvement_{which}", wins, 1.0)):
            turned = Estimate(value=whole - found.value, low=whole - found.high, high=whole - found.low, n=found.n)
            there |= {"seeds": len(seeds), **_flat(key, found)}
            back |= {"seeds": len(seeds), **_flat(key, turned)}
    return [there, back]


@lru_cache(maxsize=2)
def profile_table(results: Results) -> Table:
    """The share of runs (task seeds, in every setting) whose worst score is above tau, on the headline's prompts."""
    from paretune.evaluation.stats import performance_profile

    found = []
    for group in groups(results):
        known = {label: scores(group, label, group.headline, "worst") for label in results.families if label in group.labels}
        tau_T = _thresholds(group, [v for label, one in known.items() if results.families[label] != "baseline" for v in one.values()])
        for label, one in known.items():
            seeds = shared(group, one)
            if not seeds:
                continue
            profile = performance_profile(**_long(group, one, seeds), tau_T=tau_T, seed=BOOTSTRAP)
            same = {"setting": group.label, "method": label, "prompts": group.headline, "seeds": profile.n}
            for tau, value, low, high in zip(profile.tau_T, profile.share_T, profile.low_T, profile.high_T, strict=True):
                found.append({**same, "tau": float(tau), **_flat("share", Estimate(value=value, low=low, high=high, n=profile.n))})
    return Table("profiles", keyed("setting", "method", "prompts", "seeds", "tau", *_ends("share")), found)


def _thresholds(group: Setting, contest: Sequence[float]) -> np.ndarray:
    """Where profiles are drawn: from the lowest score of any method that is no baseline (attainments: at least -1) to the highest."""
    values = np.array([*contest, 0.0])
    if group.exact:
        return np.linspace(max(-1.0, np.floor(20 * values.min()) / 20), 1.0, TAUS)
    pad = 0.05 * (float(np.ptp(values)) or 1.0)
    return np.linspace(values.min() - pad, values.max() + pad, TAUS)


TABLES = (comparison_table, pair_table, profile_table)


# What a reader sees of them


def note(results: Results) -> str:
    """What the numbers are over, and why there are no intervals where there are none; "" where nothing can be compared."""
    enough, seeds = enough_for_intervals(results)
    if seeds < 2:
        return ""
    if not enough:
        return (
            f"Over {seeds} seeds. No intervals: they need at least 10 seeds. With fewer, a bootstrap interval is narrower "
            "than the truth (of 3 seeds, its lower end is the lowest of them), so these differences may be chance."
        )
    return (
        f"Over {seeds} seeds. In brackets: 95 % intervals by a bootstrap over seeds; they say what would change on other "
        "tasks of the same kind, not on other kinds. A seed is drawn with all of its settings."
        + (" From so few seeds the interval of a mean holds the truth about 9 times in 10." if seeds < 20 else "")
    )


def on_headline(table: Table, of: Sequence[Setting]) -> list[dict[str, Any]]:
    """The rows of these groups on their headline's prompts."""
    wanted = {(group.label, group.headline) for group in of}
    return [row for place, rows in table.placed.items() if place in wanted for row in rows]


def relationship_tables(results: Results) -> dict[str, Table]:
    """Quality ("worst", "mean") -> methods down, exact settings across: the IQM over seeds, best first; the headline's prompts."""
    found = {}
    across = sorted((group for group in groups(results) if group.exact), key=lambda group: bool(group.parts))
    overall = across[-1].label if across and across[-1].parts else ""

    def level(line: Mapping[str, Any]) -> tuple[int, float]:
        """Those measured in most settings first; then by the value over all settings, or the mean of what is there."""
        values = [value.value for value in line.values() if isinstance(value, Estimate)]
        return len(values), line[overall].value if line.get(overall) else float(np.mean(values))

    for which in QUALITIES if len(across) > 1 else ():
        lines: dict[str, dict[str, Any]] = {}
        for row in on_headline(comparison_table(results), across):
            line = lines.setdefault(row["method"], {"method": row["method"], "category": row["category"]})
            line[row["setting"]] = estimate_of(row, f"{which}_iqm")
        columns = (*keyed("method", "category"), *(Column(group.label, group.label, "share", shade=1) for group in across))
        found[which] = Table(f"relationships-{which}", columns, sorted(lines.values(), key=level, reverse=True))
    return found


IQM_HELP = "interquartile mean over seeds of the {} over preferences"
OWN = "by its own utility"
BOARD = (
    *keyed("method", "category"),
    Column("worst", "IQM", "share", IQM_HELP.format("lowest value"), "worst {quality}", shade=1),
    Column("lowest", "lowest", "share", "the lowest of all seeds", "worst {quality}", shade=1),
    Column("mean", "IQM", "share", IQM_HELP.format("mean"), "mean {quality}", shade=1),
    Column("own_name", "utility", "text", "the utility that the method optimizes", OWN),
    Column("own_worst", "worst", "share", "IQM of the worst attainment of that utility", OWN, shade=1),
    Column("own_mean", "mean", "share", "IQM of the mean attainment of that utility", OWN, shade=1),
    Column("violation", "violation", "number", "largest violation of a constraint", OWN),
)
BOARD_COSTS = (
    Column("samples_total", "samples", "count", "responses drawn for one family, in total", "cost"),
    Column("samples_path", "critical path", "count", PATH_HELP, "cost"),
    Column("tokens_total", "tokens", "count", "tokens generated or enumerated for one family, in total", "cost"),
    Column("tokens_path", "critical path", "count", PATH_HELP, "cost"),
    Column("seeds", "seeds", "count", "seeds"),
)


def board_tables(results: Results) -> list[tuple[Setting, Table]]:
    """Per group: scores with intervals, differences from the baselines, own utility and cost; best first."""
    return [(group, _board(results, group)) for group in groups(results)]


def _board(results: Results, group: Setting) -> Table:
    against = {(row["method"], row["against"]): row for row in on_headline(pair_table(results), [group])}
    columns = [replace(column, group=column.group.format(quality=group.quality)) for column in BOARD]
    for name in baselines(group):
        said = ("mean difference of worst values, same seeds", "how often it is ahead on the same seed")
        columns.append(Column(f"ahead {name}", "difference", "change", said[0], f"against {name}", shade=2))
        columns.append(Column(f"wins {name}", "P(better)", "share", said[1], f"against {name}"))
    lines = []
    for row in on_headline(comparison_table(results), [group]):
        line = {key: row.get(key) for key in ("method", "category", "own_name", "seeds")}
        line |= {key: estimate_of(row, f"{key}_iqm") for key in ("worst", "mean", "own_worst", "own_mean")}
        line |= {"lowest": row["worst_min"], "violation": row.get("violation_worst")}
        line |= {key: row[key] or None for key in COSTS}
        for name in baselines(group):
            if pair := against.get((row["method"], name)):
                line |= {f"ahead {name}": estimate_of(pair, "difference_worst"), f"wins {name}": estimate_of(pair, "improvement_worst")}
        lines.append(line)
    left_out: tuple[str, ...] = ("tokens_total", "tokens_path") if any(line["samples_total"] for line in lines) else ()
    left_out += ("seeds",) if len({line["seeds"] for line in lines}) == 1 else ()
    columns += [column for column in BOARD_COSTS if column.key not in left_out]
    return Table(f"comparison-{group.slug}", tuple(columns), sorted(lines, key=lambda line: -line["worst"].value))


@dataclass(frozen=True)
class Heat:
    """A matrix of differences, row minus column, best methods first; `sure` where the interval leaves 0 out, None where there is none."""

    group: Setting
    labels: list[str]
    values: list[list[float | None]]
    sure: list[list[bool | None]]
    hover: list[list[str]]


def difference_heats(results: Results) -> list[Heat]:
    """Per group, the mean paired difference of worst scores between all methods that are no mere scale."""
    found, change, share = [], Column("", "", "change"), Column("", "", "share")
    for group, board in board_tables(results):
        labels = [row["method"] for row in board.rows if results.families[row["method"]] != "baseline" or row["method"] in baselines(group)]
        known = {(row["method"], row["against"]): row for row in on_headline(pair_table(results), [group])}
        heat = Heat(group, labels, [], [], [])
        for a in labels:
            pairs = [known.get((a, b), {}) for b in labels]
            ahead = [estimate_of(pair, "difference_worst") for pair in pairs]
            wins = [share.show(estimate_of(pair, "improvement_worst")) for pair in pairs]
            told = [f"{a} minus {b}: {change.show(x)}; better: {y}" for b, x, y in zip(labels, ahead, wins, strict=True)]
            heat.values.append([None if x is None else x.value for x in ahead])
            heat.sure.append([None if x is None or not np.isfinite(x.low) else not x.low <= 0 <= x.high for x in ahead])
            heat.hover.append([text if x else "" for text, x in zip(told, ahead, strict=True)])
        found += [heat] if len(labels) > 2 else []
    return found


# What programs read

DIGITS = 6
TOTALS = {f"{key}_total": key for key in ("samples", "tokens", "seconds")}  # key in the comparison -> key in a row


def rows(results: Results) -> list[dict[str, Any]]:
    """One row per setting and method, in the order of the report; see the module's docstring."""
    return [_result(setting, label) for setting in results.settings for label in results.families if setting.of(label)]


def write_rows(results: Results, path: Path) -> Path:
    """Write the rows as JSON, one line each, numbers to six digits; returns the path."""
    commits = sorted({str(cell.env["commit"]) for cell in results.cells if cell.env.get("commit")})
    head = {"format": 2, "suite": results.name, "statistic": "interquartile mean over task seeds", "level": 0.95, "commits": commits}
    head["task_seeds"] = sorted({cell.unit for cell in results.cells})
    lines = ",\n".join(json.dumps(_rounded(row), allow_nan=False, ensure_ascii=False) for row in rows(results))
    with disk_errors(path, "a file of rows"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, f'{json.dumps(head, ensure_ascii=False)[:-1]}, "rows": [\n{lines}\n]}}\n')
    return path


def _result(setting: Setting, label: str) -> dict[str, Any]:
    cells = setting.of(label)
    method, learner = cells[0].record["method"], cells[0].record.get("learner")
    row: dict[str, Any] = {key: value for key, value in setting.dials.items() if isinstance(value, int | float | str)}
    row |= {"task": setting.name, "setting": setting.label, "objectives": len(setting.objectives), "method": label, "name": method["name"]}
    row |= {"fields": {k: v for k, v in method.items() if k not in NOT_DIALS}, "category": cells[0].record["card"]["category"]}
    row |= {"learner": learner["name"] if learner and cells[0].record["trainings"] else None, "n_seeds": len({c.unit for c in cells})}
    keys = ("trainings", "forwards_per_token", "evaluations", "samples_path", "tokens_path", "seconds_path", *TOTALS)
    cost: dict[str, Any] = dict.fromkeys(TOTALS.get(key, key) for key in keys)
    for split in setting.splits:
        found = _group_row(setting, label, split) or {}
        for which in QUALITIES:
            key = f"{setting.quality}_{which}_{split}"
            ends = ("", "_low", "_high", "_min") if found else ("",)
            row |= {f"{key}{end}": found.get(f"{which}_min" if end == "_min" else f"{which}_iqm{end}") for end in ends}
        if "own_name" in found:
            row["own_utility"] = found["own_name"]
            row |= {f"own_{which}_{split}{end}": found.get(f"own_{which}_iqm{end}") for which in QUALITIES for end in ("", "_low", "_high")}
        row |= {f"{key}_{split}": found[key] for key in ("violation_worst", "violation_mean") if key in found}
        # A mean over seeds need not be a whole number; a count that is one is written as one.
        cost |= {TOTALS.get(key, key): int(found[key]) if float(found[key]).is_integer() else found[key] for key in keys if found}
    return row | cost


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
