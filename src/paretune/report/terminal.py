"""The same tables in a terminal: rich, in the colors of the page, and as wide as the terminal allows."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from paretune.report.compared import against_tables, note
from paretune.report.data import PROMPTS, Results
from paretune.report.findings import findings
from paretune.report.plot import looks
from paretune.report.tables import CEILING, Column, Table, leaderboard

__all__ = ["console", "print_leaderboard", "print_table"]

WIDE = 132  # columns of output that goes to a file or a pipe

# The leaderboard's columns in a terminal, in order; those with a higher number go first where the terminal is narrow.
SHOWN = {
    "attainment_worst_train": ("worst", 0),
    "attainment_mean_train": ("mean", 0),
    "attainment_worst_test": ("worst,\ntest", 1),
    "attainment_mean_test": ("mean,\ntest", 4),
    "gain_mean": ("gain", 0),
    "gain_worst": ("worst gain", 0),
    "hypervolume_share": ("hyper-\nvolume", 2),
    "utility_loss_max": ("max\nloss", 5),
    "kl_mean": ("KL", 1),
    "controllability": ("control", 6),
    "trainings": ("train-\nings", 3),
    "forwards_per_token": ("fwd /\ntoken", 3),
    "samples_total": ("samples", 2),
    "samples_path": ("samples,\ncritical", 4),
    "tokens_total": ("tokens", 5),
    "tokens_path": ("tokens,\ncritical", 5),
    "zero_shot": ("zero-\nshot", 1),
}


def console(*, stderr: bool = False) -> Console:
    """A console for tables: as wide as the terminal, or wide enough where there is none."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else WIDE, highlight=False)


def print_table(table: Table, to: Console, *, title: str = "") -> None:
    """Any table, whole: texts wrap, numbers do not."""
    grid = Grid(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for column in table.shown:
        grid.add_column(column.title, justify="left" if column.kind in ("text", "yes") else "right", no_wrap=column.key == "name")
    for row in table.rows:
        grid.add_row(*(column.show(row.get(column.key)) for column in table.shown))
    to.print(grid)


def print_leaderboard(results: Results, to: Console) -> None:
    """One table per task setting, then what the numbers say and what failed."""
    board = leaderboard(results)
    known = looks(results.families)
    columns = [c for c in board.shown if c.key in SHOWN and any(row.get(c.key) not in (None, 0) for row in board.rows)]
    width = max((len(row["method"]) for row in board.rows), default=0) + 4
    while len(columns) > 3 and width + sum(_width(column) for column in columns) > to.width:
        columns.remove(max(columns, key=lambda column: SHOWN[column.key][1]))
    for setting in results.settings:
        rows = [row for row in board.rows if row["setting"] == setting.label]
        seeds = len(setting.task_seeds)
        title = Text.assemble((setting.label, "bold"), f"  ({PROMPTS[setting.headline]}, {seeds} seed{'s' if seeds > 1 else ''})")
        grid = Grid(title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column("method", no_wrap=True, vertical="bottom")
        for column in columns:
            grid.add_column(SHOWN[column.key][0], justify="right", vertical="bottom", no_wrap=True)
        for row in rows:
            style = "italic" if row["method"] == CEILING else "dim" if row["category"] == "baseline" else ""
            grid.add_row(_name(row["method"], known), *(_cell(column, row) for column in columns), style=style)
        to.print(grid)
        to.print()
    _comparison(results, to)
    for sentence in findings(results):
        to.print(Text(f"• {sentence}"))
    for failure in results.failures:
        to.print(Text.assemble(("failed ", "bold red"), f"{failure.get('label')}: {str(failure.get('message')).splitlines()[0]}"))


def _comparison(results: Results, to: Console) -> None:
    """Scores over task seeds and differences from a baseline; the last columns go first where the terminal is narrow."""
    known = looks(results.families)
    for group, table in against_tables(results):
        seeds = max(row["seeds"] for row in table.rows)
        columns, texts = table.shown[1:], [[column.show(row.get(column.key)) for column in table.shown[1:]] for row in table.rows]
        widths = [
            max(*[len(line[k]) for line in texts], *[len(part) for part in column.title.split(", ")]) + 2
            for k, column in enumerate(columns)
        ]
        room = to.width - max(len(row["method"]) for row in table.rows) - 4
        count = max(k for k in range(len(widths) + 1) if k < 2 or sum(widths[:k]) <= room)
        title = Text.assemble((f"{group.label}, over task seeds", "bold"), f"  ({PROMPTS[group.headline]}, {seeds} seeds)")
        grid = Grid(title=title, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
        grid.add_column("method", no_wrap=True, vertical="bottom")
        for column in columns[:count]:
            grid.add_column(column.title.replace(", ", ",\n"), justify="right", vertical="bottom", no_wrap=True)
        for row, line in zip(table.rows, texts, strict=True):
            grid.add_row(_name(row["method"], known), *line[:count], style="dim" if row["category"] == "baseline" else "")
        to.print(grid)
        to.print()
    if note(results):
        to.print(Text(note(results)))
        to.print()


def _width(column: Column) -> int:
    return max(len(line) for line in SHOWN[column.key][0].split("\n")) + 2


def _name(label: str, known: dict[str, Any]) -> Text:
    if label not in known:
        return Text(f"  {label}")
    return Text.assemble((f"{known[label].mark} ", known[label].color), label)


def _cell(column: Column, row: dict[str, Any]) -> Text:
    value = row.get(column.key)
    harm = column.key.startswith(("attainment", "gain")) and value is not None and value < 0
    return Text(column.show(value), style="#D55E00" if harm else "")
