"""Tables: every number of a report, made once for the page, the CSV files, the terminal and `--json`.

The leaderboard is what methods are ranked by. Each of the other tables holds the numbers of one figure or one section of the page.
A number whose key names no split is on the prompts of its setting's headline, which the column "prompts" names.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import combinations
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from paretune.report.data import PROMPTS, SPLITS, Cell, Results, Setting
from paretune.types import Estimate

__all__ = [
    *("CEILING", "COSTS", "LEADERBOARD", "LOSS_PARTS", "TABLES", "Column", "Table", "keyed", "minus", "short_count", "signed"),
    *("attainment_table", "board", "cost_table", "costs", "failure_table", "front_table", "generation_table", "glance_table", "headline"),
    *("known_table", "leaderboard", "loss_table", "relation_table"),
]

CEILING = "the exact optimum"


@dataclass(frozen=True)
class Column:
    """`kind` says how a value is shown: text | share (attainment, 1 is all) | change (of one) | number | count | yes. In `group`,
    {prompts} stands for those of the headline. `shade` is how strongly the page colors a cell by its value; 0 leaves it white."""

    key: str
    title: str
    kind: str = "number"
    help: str = ""
    group: str = ""
    shade: float = 0.0

    def show(self, value: Any) -> str:
        """The value as a reader sees it, an estimate with its interval; an unknown one is a dash."""
        if isinstance(value, Estimate):
            return " ".join(text for text in (self.show(value.value), self.interval(value)) if text)
        if value is None or (isinstance(value, float) and not np.isfinite(value)):
            return "–"
        return SHOWN.get(self.kind, str)(value)

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

    @cached_property
    def placed(self) -> dict[tuple[Any, Any], list[dict[str, Any]]]:
        """The rows by setting and prompts, in their order."""
        found: dict[tuple[Any, Any], list[dict[str, Any]]] = {}
        for row in self.rows:
            found.setdefault((row.get("setting"), row.get("prompts")), []).append(row)
        return found

    @cached_property
    def shown(self) -> list[Column]:
        return [c for c in self.columns if any(row.get(c.key) is not None for row in self.rows)]

    def to_json(self) -> list[dict[str, Any]]:
        return [{c.key: row.get(c.key) for c in self.columns} for row in self.rows]

    def write_csv(self, folder: Path) -> Path:
        """One line per row, numbers in full, an unknown value empty, and no text that a spreadsheet would compute."""
        path = folder / f"{self.name}.csv"
        with path.open("w", newline="", encoding="utf-8") as file:
            writer, keys = csv.writer(file), [c.key for c in self.columns]
            writer.writerow(map(_inert, keys))
            for row in self.rows:
                values = map(row.get, keys)
                writer.writerow([_inert(value) if type(value) is str else value for value in values])
        return path


FORMULA = tuple("=+-@\t\r\n\uff1d\uff0b\uff0d\uff20")  # spreadsheets compute a cell that begins with one; the last four are wide forms


def _inert(value: Any) -> Any:
    """The value; a text that a spreadsheet would take for a formula, with an apostrophe before it. Numbers stay numbers."""
    if not isinstance(value, str) or not value.startswith(FORMULA):
        return value
    try:
        float(value)
    except ValueError:
        return f"'{value}"
    return value


def keyed(*keys: str) -> tuple[Column, ...]:
    """Columns of texts, or of a table that only becomes a file: titled by their keys."""
    return tuple(Column(key, key, "text") for key in keys)


def minus(text: str) -> str:
    """A number with a real minus sign, and without one where it is zero."""
    return text.replace("-", "\u2212" if float(text) != 0 else "")


def signed(value: float) -> str:
    """A difference: +0.43, −0.05, 0.00."""
    text = f"{value:+.2f}"
    return minus(text) if float(text) else "0.00"


def short_count(value: float) -> str:
    """40000 -> 40k, 999960 -> 1M: three digits."""
    value = float(f"{value:.3g}")
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


LEAST_SHOWN = -10  # a share below it only says that little could be gained: how much is lost stands in units of return

SHOWN: dict[str, Callable[[Any], str]] = {  # how a value of a column's kind is written; the others as they are
    "yes": lambda value: "yes" if value else "no",
    "share": lambda value: minus(f"{value:.2f}") if value >= LEAST_SHOWN else f"< {minus(str(LEAST_SHOWN))}",
    "change": signed,
    "number": lambda value: minus(f"{value:.3f}" if abs(value) < 100 else f"{value:.4g}"),
    "count": short_count,
}


# The leaderboard

WORST_HELP = "the lowest attainment over all judged preferences and seeds: 1 is the exact optimum, 0 the untrained reference, below 0 harm"
MEAN_HELP = "the mean over judged preferences and seeds"
ON, GAIN, TOTAL, PATH = "on {prompts}", "gain, {prompts}", "cost in total", "critical path"
SHARE_HELP = "share of the exact front's hypervolume; hides failures between good points"
LOST_HELP = "what is lost at the worst preference if the best of ALL points served it"
OWN_HELP = (
    "the lowest attainment of the utility that the method was trained for, where that is not w . J; the linear one does not judge it. "
    "Below −10 the share says only that hardly anything could be gained there: the CSV file has it"
)
PATH_HELP = "the same where trainings of one wave run side by side"
CONTROLLED = "agreement of the path over preferences with the optimum's: 1 moves as it does, 0 does not react, \u22121 is its mirror image"

LEADERBOARD = (
    *keyed("setting", "method", "category"),
    Column("prompts", "prompts", "text", "train or test: where every number was measured whose heading says no other"),
    *(
        Column(f"attainment_{which}_{split}", which, "share", f"on {PROMPTS[split]}, {text}", f"attainment, {split}", shade=1)
        for split in SPLITS
        for which, text in (("worst", WORST_HELP), ("mean", MEAN_HELP))
    ),
    Column("gain_mean", "mean", "number", "utility above the reference, paired: same prompts, same noise", GAIN),
    Column("gain_low", "low", "number", "lower end of its 95 % interval", GAIN),
    Column("gain_high", "high", "number", "upper end of its 95 % interval", GAIN),
    Column("gain_worst", "worst", "number", "the lowest gain at a judged preference", GAIN),
    Column("own_utility_worst", "own utility, worst", "share", OWN_HELP, ON),
    Column("violation_worst", "violation", "number", "the largest shortfall of a constraint, in units of return; 0 keeps all", ON),
    Column("hypervolume_share", "hyper\u00advolume share", "share", SHARE_HELP, ON),
    Column("igd_plus", "IGD+", "number", "mean distance by which the front lies above the method's points; 0 is best", ON),
    Column("regret_worst", "worst regret", "number", "the largest loss of return at a judged preference; 0 is best", ON),
    Column("utility_loss_max", "max utility loss", "number", LOST_HELP, ON),
    Column(
        "kl_mean",
        "KL",
        "share",
        "nats per response from the reference, mean over preferences; sampled, it may fall below 0",
        ON,
    ),
    Column("controllability", "control", "share", CONTROLLED, ON),
    Column("trainings", "train\u00adings", "count", "trainings that the method needs on its own, mean over seeds", "cost"),
    Column("forwards_per_token", "forwards per token", "count", "runs of the model per generated token", "cost"),
    Column("evaluations", "search evals", "count", "calls of the outer level's score, over all judged preferences", "cost"),
    Column("samples_total", "samples", "count", "responses drawn, for training and for validation and search", TOTAL),
    Column("tokens_total", "tokens", "count", "tokens generated or enumerated", TOTAL),
    Column("samples_path", "samples", "count", PATH_HELP, PATH),
    Column("tokens_path", "tokens", "count", PATH_HELP, PATH),
    Column("seconds_total", "seconds", "count", "wall clock of the trainings and the search, one after the other", TOTAL),
    Column("zero_shot", "zero-shot", "yes", "yes: a new preference costs neither a training nor a search"),
    Column("cells", "seeds", "count", "seeds measured"),
    Column("unknown", "un\u00adknown", "count", "values that could not be known: attainments without a gain to attain, unscored samples"),
)
MEASURED: dict[str, tuple[Callable, tuple[str, ...]]] = {  # how a column is reduced over cells, and where it stands in their metrics
    "own_utility_worst": (min, ("own_utility", "attainment", "worst")),
    "violation_worst": (max, ("own_utility", "violation", "worst")),
    "hypervolume_share": (np.mean, ("hypervolume", "share")),
    "igd_plus": (np.mean, ("igd_plus", "value")),
    "regret_worst": (max, ("regret", "worst")),
    "utility_loss_max": (max, ("utility_loss", "maximum")),
    "kl_mean": (np.mean, ("kl", "mean")),
    "controllability": (np.mean, ("controllability",)),
}
OPTIMUM = {"regret_worst": 0.0, "utility_loss_max": 0.0, "controllability": 1.0}
COSTS = ("trainings", "forwards_per_token", "evaluations", "samples_total", "samples_path", "tokens_total", "tokens_path")


@lru_cache(maxsize=2)
def leaderboard(results: Results) -> Table:
    """One row per setting and method, best worst attainment (or gain) of the headline first; the exact optimum on top."""

    rows = [row for setting in results.settings for row in board(setting, setting.headline)]
    return Table("leaderboard", LEADERBOARD, rows)


def headline(row: Mapping[str, Any], which: str = "worst") -> float | None:
    """What a row of the leaderboard or of the cost table is compared by: its worst (or mean) attainment, or gain, on its own prompts."""
    attained = row.get(f"attainment_{which}_{row['prompts']}")
    return row.get(f"gain_{which}") if attained is None else attained


def board(setting: Setting, split: str) -> list[dict[str, Any]]:
    """The leaderboard's rows of one setting, on one split's prompts: the best worst value first, the exact optimum on top."""

    def rank(row: Mapping[str, Any]) -> list[float]:
        return [-np.inf if (value := headline(row, which)) is None else value for which in ("worst", "mean")]

    ranked = sorted((_row(setting, label, split) for label in setting.labels), key=rank, reverse=True)
    return [*([_ceiling(setting, split)] if setting.exact else []), *ranked]


def _row(setting: Setting, label: str, on: str) -> dict[str, Any]:
    cells = setting.of(label)
    row: dict[str, Any] = {"setting": setting.label, "method": label, "category": cells[0].record["card"]["category"], "prompts": on}
    for split in SPLITS:
        row[f"attainment_worst_{split}"] = _over(min, (cell.summary(split, "worst", "attainment") for cell in cells))
        row[f"attainment_mean_{split}"] = _over(np.mean, (cell.summary(split, "mean", "attainment") for cell in cells))
    if not setting.exact:
        row["gain_mean"] = _over(np.mean, (cell.summary(on, "mean", "gain") for cell in cells))
        row["gain_worst"] = _over(min, (cell.summary(on, "worst", "gain") for cell in cells))
        if len(cells) == 1:
            row |= {f"gain_{end}": cells[0].measured(on, "gain", "mean", end) for end in ("low", "high")}
    row |= {key: _over(how, (cell.measured(on, *path) for cell in cells)) for key, (how, path) in MEASURED.items()}
    row |= costs(cells)
    row["trainings"] = int(row["trainings"]) if row["trainings"].is_integer() else row["trainings"]
    paths = (("attainment", "undefined"), ("unscored", "count"))
    unknown = [cell.measured(split, *path) for cell in cells for split in SPLITS for path in paths]
    row |= {"zero_shot": bool(cells[0].record["card"]["zero_shot"]), "cells": len({cell.unit for cell in cells})}
    return row | {"unknown": sum(count or 0 for count in unknown)}


def _ceiling(setting: Setting, on: str) -> dict[str, Any]:
    row = {"setting": setting.label, "method": CEILING, "prompts": on, "cells": len(setting.task_seeds), **OPTIMUM}
    row |= {f"attainment_{which}_{split}": 1.0 for which in ("worst", "mean") for split in setting.splits}
    for key, path in {"hypervolume_share": ("hypervolume", "share_of_optimum"), "igd_plus": ("igd_plus", "of_optimum")}.items():
        row[key] = _over(np.mean, (cell.measured(on, *path) for cell in setting.cells))
    return row


def _over(how: Callable, values: Iterable[float | None]) -> float | None:
    """`how` over the values that are known; None where none is."""
    known = [float(value) for value in values if value is not None]
    return float(how(known)) if known else None


def costs(cells: Sequence[Cell]) -> dict[str, Any]:
    """What one family costs, mean over its cells."""
    row: dict[str, Any] = {
        "trainings": float(np.mean([len(cell.record["trainings"]) for cell in cells])),
        "forwards_per_token": cells[0].record.get("forwards_per_token"),
        "evaluations": float(np.mean([cell.cost("evaluations") for cell in cells])),
    }
    for kind, name in (("total", "total"), ("critical_path", "path")):
        row |= {f"{key}_{name}": float(np.mean([cell.cost(key, kind) for cell in cells])) for key in ("samples", "tokens", "seconds")}
    return row


def cost_table(results: Results) -> Table:
    """Cost against quality, one row per setting and method."""
    quality = ("attainment_worst_train", "attainment_worst_test", "gain_mean", "gain_worst")
    columns = keyed("setting", "method", "prompts", *quality, *COSTS, "seconds_total", "zero_shot")
    return Table("cost", columns, [row for row in leaderboard(results).rows if row["method"] != CEILING])


def glance_table(results: Results) -> Table:
    """Worst attainment of the headline: methods down, exact settings across, the worst of all of them, best first; test prompts last.

    Methods that were measured in most settings come first: the worst of fewer is no rank among the worst of all.
    """
    exact = [s for s in results.settings if s.exact]
    here = {s.label for s in exact}
    board = [row for row in leaderboard(results).rows if row["method"] != CEILING and row["setting"] in here]
    columns = [*keyed("method", "category"), *(Column(s.label, s.label, "share", shade=1) for s in exact)]
    columns.append(Column("worst", "worst of all", "share", shade=1))
    if all(s.headline != "test" for s in exact):
        columns.append(Column("worst_test", f"worst of all, {PROMPTS['test']}", "share", shade=1))
    rows = []
    for label, family in results.families.items():
        mine = [row for row in board if row["method"] == label]
        values: dict[str, Any] = {row["setting"]: worst for row in mine if (worst := headline(row)) is not None}
        if values:
            ends = {"worst": min(values.values()), "worst_test": _over(min, (row["attainment_worst_test"] for row in mine))}
            rows.append({"method": label, "category": family, **values, **ends})
    return Table("glance", tuple(columns), sorted(rows, key=lambda row: (-len(here & row.keys()), -row["worst"])))


# The numbers of the figures

PLACE = ("setting", "method", "task_seed", "seed")


def _place(setting: Setting, cell: Cell) -> dict[str, Any]:
    return dict(zip(PLACE, (setting.label, cell.label, cell.seed, cell.record.get("seed")), strict=True))


def attainment_table(results: Results) -> Table:
    """Every measured point: returns, KL, attainment and regret per setting, method, seed, split and preference."""
    numbered = [f"{what}_{k + 1}" for what in ("w", "reward", "return") for k in range(_most_objectives(results))]
    measured = ("kl", "utility", "utility_low", "utility_high", "gain", "attainment", "regret")
    columns = keyed(*PLACE, "split", "preference", *numbered, *measured)
    return Table("attainment", columns, [row for setting in results.settings for cell in setting.cells for row in _points(setting, cell)])


def _most_objectives(results: Results) -> int:
    return max((len(setting.objectives) for setting in results.settings), default=0)


def _numbered(**vectors_M: Iterable[float]) -> dict[str, Any]:
    """w=(.2, .8) -> {"w_1": .2, "w_2": .8}; what is unknown is None."""
    known = {f"{name}_{k + 1}": x for name, values_M in vectors_M.items() for k, x in enumerate(values_M)}
    return {name: x if x is None or isfinite(x) else None for name, x in known.items()}


def _points(setting: Setting, cell: Cell) -> Iterator[dict[str, Any]]:
    for split in SPLITS:
        measured = cell.measured(split)
        for number, w_M in enumerate(cell.record["metrics"]["preferences"] if measured else ()):
            names = ("kl", "utility", "gain", "attainment", "regret")
            found = {name: measured[name]["per_preference"][number] for name in names if measured.get(name)}
            row = _place(setting, cell) | {"split": split, "preference": number}
            row |= _numbered(w=w_M, reward=measured["rewards"][number], **{"return": measured["returns"][number]})
            row |= {f"utility_{end}": found["utility"][end] for end in ("low", "high")}
            yield row | {name: value["value"] if name in ("utility", "gain") else value for name, value in found.items()}


def front_table(results: Results) -> Table:
    """What the front figures draw: means over seeds of the exact front, of each method's curve and of the reference."""
    columns = keyed("setting", "split", "series", *(f"{x}_{k + 1}" for x in ("w", "return") for k in range(_most_objectives(results))))
    rows = []
    for setting in results.settings:
        for split in SPLITS:
            series = [(label, setting.of(label)[0].w_WM, setting.mean_points(label, split)) for label in setting.drawn(split)]
            if (front := setting.front(split)) is not None:
                series.insert(0, (CEILING, front["w"], front["points"]))
            for name, w_WM, points_WM in series:
                for w_M, point_M in zip(w_WM.tolist(), points_WM.tolist(), strict=True):
                    rows.append({"setting": setting.label, "split": split, "series": name, **_numbered(w=w_M, **{"return": point_M})})
    return Table("fronts", columns, rows)


def known_table(results: Results) -> Table:
    """What nothing that was trained can exceed, or should fall below: attainment of each line at each judged preference, mean over seeds.

    representable  the best policy with the reference's own head
    blind          the optimum under the mean reward over training prompts: what can be had without knowing the prompt
    posterior      the optimum under what the rewards of the training prompts tell of all others
    """
    columns = keyed("setting", "split", "line", *(f"w_{k + 1}" for k in range(_most_objectives(results))), "attainment")
    rows = []
    for setting, split in ((s, split) for s in results.settings for split in s.splits):
        for name, attained_W in setting.known(split).items():
            for w_M, value in zip(setting.cells[0].w_WM.tolist(), attained_W.tolist(), strict=True):
                rows.append({"setting": setting.label, "split": split, "line": name, **_numbered(w=w_M), "attainment": value})
    return Table("known", columns, rows)


LOSS_PARTS = ("learning", "composition", "remainder", "representation")


def loss_table(results: Results) -> Table:
    """Where the headline's loss comes from, in units of attainment: means over preferences and seeds. The parts sum to the loss.

    representation  what the best policy with the frozen head would still lose; unknown, and in the others, in cells of before
    composition     what optimal experts, mixed with the same gates, would still lose
    learning        what those attain beyond this family, less what the head costs; signed
    remainder       attributed to none: 0 for logit mixing and its equals, everything but representation for soups
    """
    rows = []
    for setting in results.settings:
        for label in results.families:
            losses = [loss for cell in setting.of(label) if (loss := cell.measured(setting.headline, "loss"))]
            if losses:
                parts = {name: _over(np.mean, (v for loss in losses for v in loss.get(name) or ())) for name in LOSS_PARTS}
                ceiling_W = setting.known(setting.headline).get("representable")
                if ceiling_W is not None:
                    parts["representation"] = head = float(1 - ceiling_W.mean())
                    rest = "remainder" if parts["learning"] is None else "learning"
                    parts[rest] = (parts[rest] or 0.0) - head
                same = {"setting": setting.label, "method": label, "prompts": setting.headline}
                rows.append({**same, **parts, "loss": sum(v for v in parts.values() if v is not None)})
    return Table("loss", keyed("setting", "method", "prompts", *LOSS_PARTS, "loss"), rows)


# What else a run directory says


def relation_table(results: Results) -> Table:
    """How the objectives of each exact task relate, as verified when it was built: one row per setting, task seed, split and pair."""
    names = ("correlation", "strength_a", "strength_b", "worst_composition_limit")
    rows = []
    for setting in results.settings:
        for seed, verified in setting.verified.items():
            for split, found in verified.items():
                for (a, name_a), (b, name_b) in combinations(enumerate(setting.objectives), 2):
                    row = {"setting": setting.label, "task_seed": seed, "split": split, "objective_a": name_a, "objective_b": name_b}
                    strengths = found["strength_nats"]
                    values = (found["correlations"][a][b], strengths[a], strengths[b], found["worst_composition_limit"])
                    rows.append(row | dict(zip(names, values, strict=True)))
    return Table("relations", keyed("setting", "task_seed", "split", "objective_a", "objective_b", *names), rows)


def generation_table(results: Results) -> Table:
    """Every kept response: one row per setting, method, seeds, split, prompt and preference; the reference's have no preference."""
    rows = []
    for setting, cell, split in ((s, cell, split) for s in results.settings for cell in s.cells for split in s.splits):
        kept = cell.measured(split, "generations") or {"prompts": (), "reference": (), "preferences": (), "texts": ()}
        for number, texts in zip((None, *kept["preferences"]), (kept["reference"], *kept["texts"]), strict=True):
            for prompt, text in zip(kept["prompts"], texts, strict=True):
                row = _place(setting, cell) | {"split": split, "prompt": prompt, "preference": number}
                rows.append(row | {"response": text})
    return Table("generations", keyed(*PLACE, "split", "prompt", "preference", "response"), rows)


def failure_table(results: Results) -> Table:
    """What failed, the message, and where its record lies."""
    return Table("failures", keyed("label", "error", "message", "where"), [dict(failure) for failure in results.failures])


TABLES = (
    *(leaderboard, glance_table, front_table, attainment_table, known_table, cost_table, loss_table, relation_table),
    *(generation_table, failure_table),
)
