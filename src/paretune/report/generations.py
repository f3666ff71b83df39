"""Responses side by side: the same prompts and the same noise at a few preferences, for every method of a task that was sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from paretune.report.data import PROMPTS, Cell, Results, Setting
from paretune.report.tables import Column, Table, leaderboard, minus

__all__ = ["generation_boards", "generation_table"]


def generation_boards(results: Results) -> list[dict[str, Any]]:
    """Per setting with responses: {"label", "note", "boards"}, one board per method, the best one first; its first seed is shown."""
    ranks = [(row["setting"], row["method"]) for row in leaderboard(results).rows] if results.cells else []
    found = []
    for setting in results.settings:
        labels = [method for where, method in ranks if where == setting.label and method in setting.labels]
        boards = [_board(setting, label) for label in labels if _kept(setting.of(label)[0], setting.headline)]
        if boards:
            found.append({"label": setting.label, "note": PROMPTS[setting.headline], "boards": boards})
    return found


def _kept(cell: Cell, split: str) -> Mapping[str, Any] | None:
    return cell.measured(split).get("generations")


def _board(setting: Setting, label: str) -> dict[str, Any]:
    cell, split = setting.of(label)[0], setting.headline
    kept = _kept(cell, split)
    assert kept is not None
    measured = cell.measured(split)
    heads = []
    for number in kept["preferences"]:
        returns, errors = measured["returns"][number], measured.get("returns_error")
        widths = errors[number] if errors else [None] * len(returns)
        lines = [
            {"objective": name, "weight": f"{w:.2f}", "value": _with_error(value, width)}
            for name, w, value, width in zip(setting.objectives, cell.w_WM[number], returns, widths, strict=True)
        ]
        heads.append({"lines": lines, "kl": _with_error(measured["kl"]["per_preference"][number], None)})
    texts = [[column[row] for column in kept["texts"]] for row in range(len(kept["prompts"]))]
    rows = list(zip(kept["prompts"], kept["reference"], texts, strict=True))
    return {"method": label, "heads": heads, "rows": rows}


def _with_error(value: float | None, width: float | None) -> str:
    if value is None:
        return "–"
    return minus(f"{value:.2f}") + ("" if width is None else f" ± {width:.2f}")


def generation_table(results: Results) -> Table:
    """Every kept response: one row per setting, method, seeds, split, prompt and preference; the reference's have no preference."""
    names = ("setting", "method", "task_seed", "seed", "split", "prompt", "preference", "response")
    rows = [row for setting in results.settings for cell in setting.cells for row in _responses(setting, cell)]
    return Table("generations", tuple(Column(name, name.replace("_", " "), "text") for name in names), rows)


def _responses(setting: Setting, cell: Cell) -> list[dict[str, Any]]:
    rows = []
    for split in setting.splits:
        kept = _kept(cell, split)
        if kept is None:
            continue
        same = {"setting": setting.label, "method": cell.label, "task_seed": cell.task.get("seed"), "seed": cell.record.get("seed")}
        series: Sequence[tuple[int | None, Sequence[str]]] = [
            (None, kept["reference"]),
            *zip(kept["preferences"], kept["texts"], strict=True),
        ]
        for number, texts in series:
            pairs = zip(kept["prompts"], texts, strict=True)
            rows += [{**same, "split": split, "prompt": prompt, "preference": number, "response": text} for prompt, text in pairs]
    return rows
