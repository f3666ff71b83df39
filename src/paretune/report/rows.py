"""Results small enough to be committed: one flat row per setting and method, as JSON, for programs that give advice from them.

    {"format": 2, "suite", "statistic", "level", "commits", "task_seeds", "rows": [
      {the task's dials (rho, objective_count, ...), "task", "setting", "objectives",
       "method", "name", "fields", "category", "learner", "n_seeds",
       "attainment_worst_train", "attainment_worst_train_low", "attainment_worst_train_high", "attainment_worst_train_min",
       the same for mean and for test, "own_utility", "own_worst_train", ..., "violation_worst_train", "trainings",
       "forwards_per_token", "evaluations", "samples", "samples_path", "tokens", "tokens_path", "seconds", "seconds_path"}]}

`attainment_worst_train` is the interquartile mean over task seeds of each seed's lowest attainment over the judged preferences, on
training prompts; `_low` and `_high` are its 95 % interval, null below 10 task seeds; `_min` is the lowest seed. Where the optimum is
not known the keys say gain instead of attainment. What was not measured has no key; what is unknown is null.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from paretune.report.comparison import Group, group_row
from paretune.report.data import NOT_DIALS, Results

__all__ = ["rows", "write_rows"]

FORMAT = 2
DIGITS = 6
STATISTIC = "interquartile mean over task seeds"
COSTS = {  # of one family, mean over cells: key in the comparison -> key here
    **{key: key for key in ("trainings", "forwards_per_token", "evaluations", "samples_path", "tokens_path", "seconds_path")},
    **{f"{key}_total": key for key in ("samples", "tokens", "seconds")},
}


def rows(results: Results) -> list[dict[str, Any]]:
    """One row per setting and method, in the order of the report; see the module's docstring."""
    return [
        _row(Group(setting.label, (setting,)), label) for setting in results.settings for label in results.families if setting.of(label)
    ]


def write_rows(results: Results, path: Path) -> Path:
    """Write the rows as JSON, one line each, numbers to six digits; returns the path."""
    commits = sorted({str(cell.env["commit"]) for cell in results.cells if cell.env.get("commit")})
    seeds = sorted({cell.unit for cell in results.cells})
    head = {"format": FORMAT, "suite": results.name, "statistic": STATISTIC, "level": 0.95, "commits": commits, "task_seeds": seeds}
    lines = ",\n".join(json.dumps(_rounded(row), allow_nan=False, ensure_ascii=False) for row in rows(results))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{json.dumps(head, ensure_ascii=False)[:-1]}, "rows": [\n{lines}\n]}}\n', encoding="utf-8")
    return path


def _row(group: Group, label: str) -> dict[str, Any]:
    cells, setting = group.of(label), group.settings[0]
    method, learner = cells[0].record["method"], cells[0].record.get("learner")
    row: dict[str, Any] = {
        **{key: value for key, value in setting.dials.items() if isinstance(value, int | float | str)},
        "task": setting.name,
        "setting": setting.label,
        "objectives": len(setting.objectives),
        "method": label,
        "name": method["name"],
        "fields": {key: value for key, value in method.items() if key not in NOT_DIALS},
        "category": cells[0].card["category"],
        "learner": learner["name"] if learner and cells[0].record["trainings"] else None,
        "n_seeds": len({cell.unit for cell in cells}),
    }
    cost: dict[str, Any] = dict.fromkeys(COSTS.values())
    for split in setting.splits:
        found = group_row(group, label, split)
        if found is None:
            row |= {f"{group.quality}_{which}_{split}": None for which in ("worst", "mean")}
            continue
        for which in ("worst", "mean"):
            key = f"{group.quality}_{which}_{split}"
            row |= {f"{key}{end}": found[f"{which}_iqm{end}"] for end in ("", "_low", "_high")}
            row[f"{key}_min"] = found[f"{which}_min"]
        if "own_name" in found:
            row["own_utility"] = found["own_name"]
            for which in ("worst", "mean"):
                row |= {f"own_{which}_{split}{end}": found.get(f"own_{which}_iqm{end}") for end in ("", "_low", "_high")}
        row |= {f"{key}_{split}": found[key] for key in ("violation_worst", "violation_mean") if key in found}
        cost = {name: _whole(found[key]) for key, name in COSTS.items()}
    return row | cost


def _whole(value: float) -> float:
    """A count as a whole number, where it is one; a mean over seeds need not be."""
    return int(value) if float(value).is_integer() else value


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value
