"""The tables of a report, made once: the page, the CSV files, the terminal and `--json` show the same rows."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from paretune.report.data import PROMPTS, SPLITS, Cell, Results, Setting
from paretune.types import Estimate

__all__ = [
    "CEILING",
    "Column",
    "Table",
    "all_samples",
    "cost_table",
    "headline",
    "leaderboard",
    "minus",
    "short_count",
    "signed",
]

CEILING = "the exact optimum"


@dataclass(frozen=True)
class Column:
    """`kind` says how a value is shown: text | share (attainment, 1 is all) | change (of one) | number | count | yes. In `group`,
    {prompts} stands for those of the headline."""

    key: str
    title: str
    kind: str = "number"
    help: str = ""
    group: str = ""

    def show(self, value: Any) -> str:
        """The value as a reader sees it, an estimate with its interval; an unknown one is a dash."""
        if isinstance(value, Estimate):
            return " ".join(text for text in (self.show(value.value), self.interval(value)) if text)
        if value is None or (isinstance(value, float) and not np.isfinite(value)):
            return "–"
        if self.kind == "yes":
            return "yes" if value else "no"
        if self.kind == "share":
            return minus(f"{value:.2f}")
        if self.kind == "change":
            return signed(value)
        if self.kind == "number":
            return minus(f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}")
        if self.kind == "count":
            return short_count(value)
        return str(value)

    def interval(self, value: Any) -> str:
        """[low, high] of an estimate; "" where it has none."""
        if not isinstance(value, Estimate) or not np.isfinite([value.low, value.high]).all():
            return ""
        return f"[{self.show(value.low)}, {self.show(value.high)}]"


@dataclass(frozen=True)
class Table:
    """Rows are dicts by column key. Columns in which nothing is known are left out of `shown`; the CSV file keeps them."""

    name: str
    columns: tuple[Column, ...]
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def shown(self) -> list[Column]:
        return [c for c in self.columns if any(row.get(c.key) is not None for row in self.rows)]

    def to_json(self) -> list[dict[str, Any]]:
        return [{c.key: row.get(c.key) for c in self.columns} for row in self.rows]

    def write_csv(self, folder: Path) -> Path:
        """One line per row, numbers in full, an unknown value empty."""
        path = folder / f"{self.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [c.key for c in self.columns])
            writer.writeheader()
            writer.writerows({k: "" if v is None else v for k, v in row.items()} for row in self.to_json())
        return path


def minus(text: str) -> str:
    """A number with a real minus sign, and without one where it is zero."""
    return text.replace("-", "\u2212" if float(text) != 0 else "")


def signed(value: float) -> str:
    """A difference: +0.43, −0.05, 0.00."""
    text = f"{value:+.2f}"
    return minus(text) if float(text) else "0.00"


def short_count(value: float) -> str:
    """40000 -> 40.0k."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


# The leaderboard. A number whose key names no split is on the prompts of its setting's headline, which the column "prompts" names.

WORST_HELP = "the lowest attainment over all judged preferences and seeds: 1 is the exact optimum, 0 the untrained reference, below 0 harm"
MEAN_HELP = "the mean over judged preferences and seeds"
HEADLINE = "on {prompts}"

LEADERBOARD = (
    Column("setting", "setting", "text"),
    Column("method", "method", "text"),
    Column("category", "category", "text"),
    Column("prompts", "prompts", "text", "train or test: where every number was measured whose heading says no other"),
    *(
        Column(f"attainment_{which}_{split}", which, "share", f"on {PROMPTS[split]}, {text}", f"attainment, {split}")
        for split in SPLITS
        for which, text in (("worst", WORST_HELP), ("mean", MEAN_HELP))
    ),
    Column("gain_mean", "mean", "number", "utility above the reference, paired: same prompts, same noise", "gain, {prompts}"),
    Column("gain_low", "low", "number", "lower end of its 95 % interval", "gain, {prompts}"),
    Column("gain_high", "high", "number", "upper end of its 95 % interval", "gain, {prompts}"),
    Column("gain_worst", "worst", "number", "the lowest gain at a judged preference", "gain, {prompts}"),
    Column(
        "own_utility_worst",
        "own utility, worst",
        "share",
        "the lowest attainment of the utility that the method was trained for, where that is not w . J; the linear one does not judge it",
        HEADLINE,
    ),
    Column("violation_worst", "violation", "number", "the largest shortfall of a constraint, in units of return; 0 keeps all", HEADLINE),
    Column(
        "hypervolume_share",
        "hyper\u00advolume share",
        "share",
        "share of the exact front's hypervolume; hides failures between good points",
        HEADLINE,
    ),
    Column("igd_plus", "IGD+", "number", "mean distance by which the front lies above the method's points; 0 is best", HEADLINE),
    Column("regret_worst", "worst regret", "number", "the largest loss of return at a judged preference; 0 is best", HEADLINE),
    Column(
        "utility_loss_max",
        "max utility loss",
        "number",
        "what is lost at the worst preference if the best of ALL points served it",
        HEADLINE,
    ),
    Column("kl_mean", "KL", "share", "nats per response away from the reference, mean over preferences", HEADLINE),
    Column(
        "controllability",
        "control",
        "share",
        "agreement of the path over preferences with the optimum's: 1 moves as it does, 0 does not react, \u22121 is its mirror image",
        HEADLINE,
    ),
    Column("trainings", "train\u00adings", "count", "trainings that the method needs on its own", "cost"),
    Column("forwards_per_token", "forwards per token", "count", "runs of the model per generated token", "cost"),
    Column("evaluations", "search evals", "count", "calls of the outer level's score, over all judged preferences", "cost"),
    Column("samples_total", "samples", "count", "responses drawn, for training and for validation and search", "cost in total"),
    Column("tokens_total", "tokens", "count", "tokens generated or enumerated", "cost in total"),
    Column("samples_path", "samples", "count", "the same where trainings of one wave run side by side", "critical path"),
    Column("tokens_path", "tokens", "count", "the same where trainings of one wave run side by side", "critical path"),
    Column("seconds_total", "seconds", "count", "wall clock of the trainings and the search, one after the other", "cost in total"),
    Column("zero_shot", "zero-shot", "yes", "yes: a new preference costs neither a training nor a search"),
    Column("cells", "seeds", "count", "seeds measured"),
    Column("unknown", "un\u00adknown", "count", "values that could not be known: attainments without a gain to attain, unscored samples"),
)


def leaderboard(results: Results) -> Table:
    """One row per setting and method, best worst attainment (or gain) of the headline first; the exact optimum on top."""
    rows = []
    for setting in results.settings:
        ranked = sorted((_row(setting, label) for label in setting.labels), key=_rank, reverse=True)
        rows += [*_ceiling(setting), *ranked]
    return Table("leaderboard", LEADERBOARD, rows)


def headline(row: Mapping[str, Any], which: str = "worst") -> float | None:
    """What a row of the leaderboard or of the cost table is compared by: its worst (or mean) attainment, or gain, on its own prompts."""
    attained = row.get(f"attainment_{which}_{row['prompts']}")
    return row.get(f"gain_{which}") if attained is None else attained


def _rank(row: Mapping[str, Any]) -> tuple[float, ...]:
    return tuple(float("-inf") if value is None else value for value in (headline(row), headline(row, "mean")))


def _row(setting: Setting, label: str) -> dict[str, Any]:
    cells, on = setting.of(label), setting.headline
    row: dict[str, Any] = {"setting": setting.label, "method": label, "category": cells[0].card["category"], "prompts": on}
    for split in SPLITS:
        row[f"attainment_worst_{split}"] = _reduce(min, cells, split, "attainment", "worst")
        row[f"attainment_mean_{split}"] = _reduce(_mean, cells, split, "attainment", "mean")
    if not setting.exact:
        row |= {
            "gain_mean": _reduce(_mean, cells, on, "gain", "mean", "value"),
            "gain_low": _reduce(_mean, cells, on, "gain", "mean", "low") if len(cells) == 1 else None,
            "gain_high": _reduce(_mean, cells, on, "gain", "mean", "high") if len(cells) == 1 else None,
            "gain_worst": _lowest_gain(cells, on),
        }
    return row | {
        "own_utility_worst": _reduce(min, cells, on, "own_utility", "attainment", "worst"),
        "violation_worst": _reduce(max, cells, on, "own_utility", "violation", "worst"),
        "hypervolume_share": _reduce(_mean, cells, on, "hypervolume", "share"),
        "igd_plus": _reduce(_mean, cells, on, "igd_plus", "value"),
        "regret_worst": _reduce(max, cells, on, "regret", "worst"),
        "utility_loss_max": _reduce(max, cells, on, "utility_loss", "maximum"),
        "kl_mean": _reduce(_mean, cells, on, "kl", "mean"),
        "controllability": _reduce(_mean, cells, on, "controllability"),
        "trainings": len(cells[0].record["trainings"]),
        "forwards_per_token": cells[0].record.get("forwards_per_token"),
        "samples_total": _mean([all_samples(c, "total") for c in cells]),
        "tokens_total": _mean([c.cost("total")["tokens"] for c in cells]),
        "samples_path": _mean([all_samples(c, "critical_path") for c in cells]),
        "tokens_path": _mean([c.cost("critical_path")["tokens"] for c in cells]),
        "evaluations": _mean([c.cost("total")["evaluations"] for c in cells]),
        "seconds_total": _mean([c.cost("total")["seconds"] for c in cells]),
        "zero_shot": bool(cells[0].card["zero_shot"]),
        "cells": len(cells),
        "unknown": _unknown(cells),
    }


def _ceiling(setting: Setting) -> list[dict[str, Any]]:
    if not setting.exact:
        return []
    ones = {f"attainment_{which}_{split}": 1.0 for which in ("worst", "mean") for split in setting.splits}
    return [
        {
            "setting": setting.label,
            "method": CEILING,
            "prompts": setting.headline,
            **ones,
            "hypervolume_share": _reduce(_mean, setting.cells, setting.headline, "hypervolume", "share_of_optimum"),
            "igd_plus": _reduce(_mean, setting.cells, setting.headline, "igd_plus", "of_optimum"),
            "regret_worst": 0.0,
            "utility_loss_max": 0.0,
            "controllability": 1.0,
            "cells": len(setting.task_seeds),
        }
    ]


def all_samples(cell: Cell, kind: str) -> float:
    """Responses drawn for training, and for validation and search; `kind` as in `Cell.cost`."""
    return cell.cost(kind)["samples"] + cell.cost(kind)["validation_samples"]


def _lowest_gain(cells: Iterable[Cell], split: str) -> float | None:
    values = [e["value"] for cell in cells for e in (cell.measured(split).get("gain") or {}).get("per_preference", ())]
    known = [v for v in values if v is not None]
    return min(known) if known else None


def _unknown(cells: Iterable[Cell]) -> int:
    count = 0
    for cell in cells:
        for split in SPLITS:
            measured = cell.measured(split)
            count += (measured.get("attainment") or {}).get("undefined", 0) + (measured.get("unscored") or {}).get("count", 0)
    return count


def _reduce(how: Callable[[Sequence[float]], float], cells: Iterable[Cell], split: str, *path: str) -> float | None:
    """`how` over the cells' values at `path`; None where none is known."""
    values = []
    for cell in cells:
        value: Any = cell.measured(split)
        for name in path:
            value = value.get(name) if isinstance(value, Mapping) else None
        if value is not None:
            values.append(float(value))
    return how(values) if values else None


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


COST_KEYS = (
    *("setting", "method", "prompts", "attainment_worst_train", "attainment_worst_test", "gain_mean", "gain_worst"),
    *("trainings", "forwards_per_token", "evaluations"),
    *("samples_total", "samples_path", "tokens_total", "tokens_path", "seconds_total", "zero_shot"),
)


def cost_table(results: Results) -> Table:
    """Cost against quality, one row per setting and method."""
    columns = tuple(column for key in COST_KEYS for column in LEADERBOARD if column.key == key)
    return Table("cost", columns, [row for row in leaderboard(results).rows if row["method"] != CEILING])
