"""The tables behind the figures: every number that a figure draws, and what failed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from paretune.report.data import PROMPTS, SPLITS, Cell, Results, Setting
from paretune.report.tables import CEILING, Column, Table, headline, leaderboard

__all__ = ["LOSS_PARTS", "attainment_table", "failure_table", "front_table", "glance_table", "loss_table", "relation_table"]


def glance_table(results: Results) -> Table:
    """Worst attainment of the headline: methods down, exact settings across, the worst of all of them, best first; test prompts last."""
    exact = [s for s in results.settings if s.exact]
    here = {s.label for s in exact}
    board = [row for row in leaderboard(results).rows if row["method"] != CEILING and row["setting"] in here]
    columns = [Column("method", "method", "text"), Column("category", "category", "text")]
    columns += [Column(s.label, s.label, "share") for s in exact]
    columns.append(Column("worst", "worst of all", "share"))
    if all(s.headline != "test" for s in exact):
        columns.append(Column("worst_test", f"worst of all, {PROMPTS['test']}", "share"))
    rows = []
    for label, family in results.families.items():
        mine = [row for row in board if row["method"] == label]
        values: dict[str, Any] = {row["setting"]: worst for row in mine if (worst := headline(row)) is not None}
        if values:
            there = [row["attainment_worst_test"] for row in mine if row["attainment_worst_test"] is not None]
            rows.append(
                {"method": label, "category": family, **values, "worst": min(values.values()), "worst_test": min(there, default=None)}
            )
    return Table("glance", tuple(columns), sorted(rows, key=lambda row: -row["worst"]))


def attainment_table(results: Results) -> Table:
    """Every measured point: returns, KL, attainment and regret per setting, method, seed, split and preference."""
    count = max(len(s.objectives) for s in results.settings)
    numbered = [Column(f"{what}_{k + 1}", f"{what} {k + 1}") for what in ("w", "reward", "return") for k in range(count)]
    columns = (
        *(Column(k, k.replace("_", " "), "text") for k in ("setting", "method", "task_seed", "seed", "split", "preference")),
        *numbered,
        *(Column(k, k) for k in ("kl", "utility", "utility_low", "utility_high", "gain", "attainment", "regret")),
    )
    rows = [row for setting in results.settings for cell in setting.cells for row in _points(setting, cell)]
    return Table("attainment", columns, rows)


def _points(setting: Setting, cell: Cell) -> Iterable[dict[str, Any]]:
    for split in SPLITS:
        measured = cell.measured(split)
        for number, w_M in enumerate(cell.metrics["preferences"] if measured else ()):
            row: dict[str, Any] = {
                "setting": setting.label,
                "method": cell.label,
                "task_seed": cell.task.get("seed"),
                "seed": cell.record.get("seed"),
                "split": split,
                "preference": number,
            }
            for what, values_M in (("w", w_M), ("reward", measured["rewards"][number]), ("return", measured["returns"][number])):
                row |= {f"{what}_{k + 1}": value for k, value in enumerate(values_M)}
            utility, gain = (measured[name]["per_preference"][number] for name in ("utility", "gain"))
            row |= {"kl": measured["kl"]["per_preference"][number], "gain": gain["value"]}
            row |= {"utility": utility["value"], "utility_low": utility["low"], "utility_high": utility["high"]}
            row |= {name: measured[name]["per_preference"][number] for name in ("attainment", "regret") if measured.get(name)}
            yield row


def front_table(results: Results) -> Table:
    """What the front figures draw: means over seeds of the exact front, of each method's curve and of the reference."""
    count = max(len(s.objectives) for s in results.settings)
    columns = (
        *(Column(k, k, "text") for k in ("setting", "split", "series")),
        *(Column(f"{what}_{k + 1}", f"{what} {k + 1}") for what in ("w", "return") for k in range(count)),
    )
    rows = []
    for setting in results.settings:
        for split in SPLITS:
            series = [(label, setting.of(label)[0].w_WM, setting.mean_points(label, split)) for label in _measured(setting, split)]
            front = setting.front(split)
            if front is not None:
                series.insert(0, (CEILING, front["w"], front["points"]))
            for name, w_WM, points_WM in series:
                for w_M, point_M in zip(w_WM, points_WM, strict=True):
                    row: dict[str, Any] = {"setting": setting.label, "split": split, "series": name}
                    row |= {f"w_{k + 1}": float(w) for k, w in enumerate(w_M)}
                    rows.append(row | {f"return_{k + 1}": float(j) if np.isfinite(j) else None for k, j in enumerate(point_M)})
    return Table("fronts", columns, rows)


def _measured(setting: Setting, split: str) -> list[str]:
    return [label for label in setting.labels if setting.shared_seeds and all(cell.measured(split) for cell in setting.of(label))]


def relation_table(results: Results) -> Table:
    """How the objectives of each exact task relate, as verified when it was built: one row per setting, task seed, split and pair."""
    columns = (
        *(Column(k, k.replace("_", " "), "text") for k in ("setting", "task_seed", "split", "objective_a", "objective_b")),
        Column("correlation", "correlation", "share"),
        Column("strength_a", "strength of a, nats", "share"),
        Column("strength_b", "strength of b, nats", "share"),
        Column("worst_composition_limit", "worst composition limit", "share"),
    )
    rows = []
    for setting in results.settings:
        verified = {cell.task.get("seed"): cell.record["verified"] for cell in setting.cells if cell.record.get("verified")}
        for seed, found in verified.items():
            for split, values in found.items():
                for a, name_a in enumerate(setting.objectives):
                    for b in range(a + 1, len(setting.objectives)):
                        row = {"setting": setting.label, "task_seed": seed, "split": split, "objective_a": name_a}
                        row |= {"objective_b": setting.objectives[b], "correlation": values["correlations"][a][b]}
                        row |= {"strength_a": values["strength_nats"][a], "strength_b": values["strength_nats"][b]}
                        rows.append(row | {"worst_composition_limit": values["worst_composition_limit"]})
    return Table("relations", columns, rows)


LOSS_PARTS = ("learning", "composition", "remainder")


def loss_table(results: Results) -> Table:
    """Where the headline's loss comes from, in units of attainment: means over preferences and seeds. The parts sum to the loss."""
    columns = (
        Column("setting", "setting", "text"),
        Column("method", "method", "text"),
        Column("prompts", "prompts", "text"),
        Column("learning", "learning", "share", "what optimal experts, mixed with the same gates, attain beyond this family; signed"),
        Column("composition", "composition", "share", "what optimal experts, mixed with the same gates, would still lose"),
        Column("remainder", "remainder", "share", "attributed to neither: 0 for logit mixing and its equals, everything for soups"),
        Column("loss", "1 − attainment", "share", "their sum, mean over preferences"),
    )
    rows = []
    for setting in results.settings:
        for label in results.families:
            losses = [loss for cell in setting.of(label) if (loss := cell.measured(setting.headline).get("loss"))]
            if losses:
                parts = {name: _mean_known([v for loss in losses for v in (loss[name] or ())]) for name in LOSS_PARTS}
                total = sum(v for v in parts.values() if v is not None)
                rows.append({"setting": setting.label, "method": label, "prompts": setting.headline, **parts, "loss": total})
    return Table("loss", columns, rows)


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return float(np.mean(known)) if known else None


def failure_table(results: Results) -> Table:
    """What failed, the message, and where its record lies."""
    columns = tuple(Column(k, k, "text") for k in ("label", "error", "message", "where"))
    return Table("failures", columns, [{c.key: failure.get(c.key) for c in columns} for failure in results.failures])
