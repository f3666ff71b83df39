"""Tables in a terminal: rich, in the colors of the page, and as wide as the terminal allows."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from paretune.errors import first_line, printable
from paretune.report.comparison import baselines, board_tables, note
from paretune.report.data import PROMPTS, Results
from paretune.report.findings import findings
from paretune.report.tables import CEILING, Column, Table, leaderboard

__all__ = ["console", "print_leaderboard", "print_table"]

HARM = "#D55E00"
WIDE = 132  # columns of output that goes to a file or a pipe

# The leaderboard's columns in a terminal, in order; those with a higher number go first where the terminal is narrow.
SHOWN = (
    {"attainment_worst_train": ("worst", 0), "attainment_mean_train": ("mean", 0), "attainment_worst_test": ("worst,\ntest", 1)}
    | {"attainment_mean_test": ("mean,\ntest", 4), "gain_mean": ("gain", 0), "gain_worst": ("worst gain", 0)}
    | {"hypervolume_share": ("hyper-\nvolume", 2), "utility_loss_max": ("max\nloss", 5), "kl_mean": ("KL", 1)}
    | {"controllability": ("control", 6), "trainings": ("train-\nings", 3), "forwards_per_token": ("fwd /\ntoken", 3)}
    | {"samples_total": ("samples", 2), "samples_path": ("samples,\ncritical", 4), "tokens_total": ("tokens", 5)}
    | {"tokens_path": ("tokens,\ncritical", 5), "zero_shot": ("zero-\nshot", 1)}
)


def console() -> Console:
    """A console for tables: as wide as the terminal, or wide enough where there is none."""
    return Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else WIDE, highlight=False, markup=False, emoji=False)


def print_table(table: Table, to: Console, *, title: str = "") -> None:
    """Any table, whole: texts wrap, numbers do not, and names only where they would take the room of numbers."""
    grid = Grid(title=printable(title) or None, title_justify="left", box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    widest = [max((len(printable(c.show(row.get(c.key)))) for row in table.rows), default=0) for c in table.shown]
    texts = [column.kind in ("text", "yes") for column in table.shown]
    least = [min(width, 10) if text else width for width, text in zip(widest, texts, strict=True)]
    fits = sum(least) + 2 * len(least) <= to.width
    for column, text, width, min_width in zip(table.shown, texts, widest, least, strict=True):
        whole = column.key == "name" and 3 * width <= to.width
        more: dict[str, Any] = {"overflow": "fold", "min_width": min_width} if fits else {}
        grid.add_column(printable(column.title), justify="left" if text else "right", no_wrap=whole, **more)
    for row in table.rows:
        grid.add_row(*(printable(column.show(row.get(column.key))) for column in table.shown))
    to.print(grid)


def print_leaderboard(results: Results, to: Console) -> None:
    """One table per task setting, those over task seeds, then what the numbers say and what failed."""
    board = leaderboard(results)
    columns = [c for c in board.shown if c.key in SHOWN and any(row.get(c.key) not in (None, 0) for row in board.rows)]
    width = max((len(row["method"]) for row in board.rows), default=0) + 4
    while len(columns) > 3 and width + sum(_width(SHOWN[c.key][0]) for c in columns) > to.width:
        columns.remove(max(columns, key=lambda column: SHOWN[column.key][1]))
    for setting in results.settings:
        rows = board.placed[setting.label, setting.headline]
        note_ = f"{PROMPTS[setting.headline]}, {len(setting.units)} seed{'s' if len(setting.units) > 1 else ''}"
        _print(results, to, setting.label, note_, rows, [(column, SHOWN[column.key][0]) for column in columns])
    _print_comparison(results, to)
    for sentence in findings(results):
        to.print(Text(f"• {sentence}"))
    for failure in results.failures:
        said = f"{failure.get('label')}: {first_line(str(failure.get('message')))}"
        to.print(Text.assemble(("failed ", "bold red"), printable(said)))


def _print_comparison(results: Results, to: Console) -> None:
    """Scores over task seeds and differences from the first baseline; the last columns go first where the terminal is narrow."""
    boards = board_tables(results)
    for group, table in [(group, table) for group, table in boards if group.parts] or boards:
        sampled = any(row.get("samples_total") for row in table.rows)
        keys = ["worst", *(f"{what} {name}" for name in baselines(group)[:1] for what in ("ahead", "wins")), "mean"]
        keys.append("samples_total" if sampled else "tokens_total")
        known = {column.key: column for column in table.shown}
        columns = []
        for column in (known[key] for key in keys if key in known):
            against = f"{column.title},\n{column.group}" if column.group.startswith("against") else column.title
            columns.append((column, column.group if column.title == "IQM" else against))
        widths = [max(_width(title), *(len(column.show(row.get(column.key))) + 2 for row in table.rows)) for column, title in columns]
        room = to.width - max(len(row["method"]) for row in table.rows) - 4
        count = max(k for k in range(len(widths) + 1) if k < 2 or sum(widths[:k]) <= room)
        seeds = f"{PROMPTS[group.headline]}, {max(row['seeds'] for row in table.rows)} seeds"
        _print(results, to, f"{group.label}, over seeds", seeds, table.rows, columns[:count])
    if note(results):
        to.print(Text(note(results)))
        to.print()


Heads = Sequence[tuple[Column, str]]


def _print(results: Results, to: Console, title: str, more: str, rows: Sequence[dict[str, Any]], columns: Heads) -> None:
    known = results.looks
    heading = Text.assemble((title, "bold"), f"  ({more})")
    grid = Grid(title=heading, title_justify="left", title_style="", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    grid.add_column("method", overflow="fold", vertical="bottom")  # a long name takes more lines, not the numbers
    for _, head in columns:
        grid.add_column(head, justify="right", vertical="bottom", no_wrap=True)
    for row in rows:
        label, look = row["method"], known.get(row["method"])
        name = Text.assemble((f"{look.mark} ", look.hex), label) if look else Text(f"  {label}")
        told = [(column, row.get(column.key)) for column, _ in columns]
        harm = [column.key.startswith(("attainment", "gain")) and value is not None and value < 0 for column, value in told]
        texts = [Text(column.show(value), style=HARM if bad else "") for (column, value), bad in zip(told, harm, strict=True)]
        grid.add_row(name, *texts, style="italic" if label == CEILING else "dim" if row["category"] == "baseline" else "")
    to.print(grid)
    to.print()


def _width(head: str) -> int:
    return max(len(line) for line in head.split("\n")) + 2
