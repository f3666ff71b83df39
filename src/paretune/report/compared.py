"""The comparison over task seeds as a reader sees it: tables, heat maps and the profiles' figures, from the rows of `comparison.py`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from paretune.report.comparison import (
    QUALITIES,
    Group,
    baselines,
    comparison_table,
    enough_for_intervals,
    estimate_of,
    groups,
    pair_table,
    profile_table,
)
from paretune.report.data import PROMPTS, Results
from paretune.report.figures import Figure
from paretune.report.plot import Look, Series, dense, label_notes, layout, looks, padded, pixels, style, trace
from paretune.report.tables import Column, Table
from paretune.types import Estimate

__all__ = ["DRAWN", "Heat", "against_tables", "board_tables", "difference_heats", "note", "profile_figures", "relationship_tables"]

DRAWN = 8  # profiles in one picture


def note(results: Results) -> str:
    """What the numbers are over, and why there are no intervals where there are none; "" where nothing can be compared."""
    enough, seeds = enough_for_intervals(results)
    if seeds < 2:
        return ""
    text = f"Over {seeds} task seeds. "
    if not enough:
        return text + (
            "No intervals: they need at least 10 task seeds. With fewer, a bootstrap interval is narrower than the truth (of 3 seeds, its "
            "lower end is the lowest of them), so these differences may be chance."
        )
    return text + (
        "In brackets: 95 % intervals by a bootstrap over task seeds; they say what would change on other tasks of the same kind, not on "
        "other kinds. A seed is drawn with all of its settings."
        + (" From so few seeds the interval of a mean holds the truth about 9 times in 10." if seeds < 20 else "")
    )


# Results by relationship


def relationship_tables(results: Results) -> dict[str, Table]:
    """Quality ("worst", "mean") -> methods down, exact settings across: the IQM over task seeds, best first; the headline's prompts."""
    found = {}
    across = [group for group in groups(results) if group.exact]
    for which in QUALITIES if len(across) > 1 else ():
        rows: dict[str, dict[str, Any]] = {}
        for row in _on_headline(comparison_table(results), across):
            line = rows.setdefault(row["method"], {"method": row["method"], "category": row["category"]})
            line[row["setting"]] = estimate_of(row, f"{which}_iqm")
        columns = [Column("method", "method", "text"), Column("category", "category", "text")]
        columns += [Column(group.label, group.label, "share") for group in sorted(across, key=lambda group: group.pooled)]
        overall = next((group.label for group in across if group.pooled), "")

        def level(row: Mapping[str, Any], overall: str = overall) -> tuple[int, float]:
            """Those measured in most settings first; then by the value over all settings, or the mean of what is there."""
            values = [value.value for value in row.values() if isinstance(value, Estimate)]
            return len(values), row[overall].value if row.get(overall) else float(np.mean(values))

        found[which] = Table(f"relationships-{which}", tuple(columns), sorted(rows.values(), key=level, reverse=True))
    return found


def _on_headline(table: Table, of: Sequence[Group]) -> list[dict[str, Any]]:
    wanted = {(group.label, group.headline) for group in of}
    return [row for row in table.rows if (row["setting"], row["prompts"]) in wanted]


# What each method reaches and costs


def board_tables(results: Results) -> list[tuple[Group, Table]]:
    """Per group: scores with intervals, differences from the baselines, own utility and cost; best first."""
    return [(group, _board(results, group)) for group in groups(results)]


def _board(results: Results, group: Group) -> Table:
    against = {(row["method"], row["against"]): row for row in _on_headline(pair_table(results), [group])}
    default = baselines(group)
    columns = [
        Column("method", "method", "text"),
        Column("category", "category", "text"),
        Column("worst", "IQM", "share", "interquartile mean over task seeds of the lowest value over preferences", "worst {quality}"),
        Column("lowest", "lowest", "share", "the lowest of all task seeds", "worst {quality}"),
        Column("mean", "IQM", "share", "interquartile mean over task seeds of the mean over preferences", "mean {quality}"),
        Column("own_name", "utility", "text", "the utility that the method optimizes", "by its own utility"),
        Column("own_worst", "worst", "share", "IQM of the worst attainment of that utility", "by its own utility"),
        Column("own_mean", "mean", "share", "IQM of the mean attainment of that utility", "by its own utility"),
        Column("violation", "violation", "number", "largest violation of a constraint", "by its own utility"),
        *(
            column
            for name in default
            for column in (
                Column(f"ahead {name}", "difference", "change", "mean difference of worst values, same task seeds", f"against {name}"),
                Column(f"wins {name}", "P(better)", "share", "how often it is ahead on the same task seed", f"against {name}"),
            )
        ),
        Column("samples_total", "samples", "count", "responses drawn for one family, in total", "cost"),
        Column("samples_path", "critical path", "count", "the same where trainings of one wave run side by side", "cost"),
        Column("tokens_total", "tokens", "count", "tokens generated or enumerated for one family, in total", "cost"),
        Column("tokens_path", "critical path", "count", "the same where trainings of one wave run side by side", "cost"),
        Column("seeds", "seeds", "count", "task seeds"),
    ]
    rows = []
    for row in _on_headline(comparison_table(results), [group]):
        line = {key: row.get(key) for key in ("method", "category", "own_name", "seeds")}
        line |= {"worst": estimate_of(row, "worst_iqm"), "lowest": row["worst_min"], "mean": estimate_of(row, "mean_iqm")}
        line |= {"own_worst": estimate_of(row, "own_worst_iqm"), "own_mean": estimate_of(row, "own_mean_iqm")}
        line["violation"] = row.get("violation_worst")
        line |= {key: row[key] or None for key in ("samples_total", "samples_path", "tokens_total", "tokens_path")}
        for name in default:
            pair = against.get((row["method"], name))
            if pair is not None:
                line |= {f"ahead {name}": estimate_of(pair, "difference_worst"), f"wins {name}": estimate_of(pair, "improvement_worst")}
        rows.append(line)
    if any(line["samples_total"] for line in rows):
        columns = [column for column in columns if not column.key.startswith("tokens")]
    if len({line["seeds"] for line in rows}) == 1:
        columns = columns[:-1]
    told = [Column(c.key, c.title, c.kind, c.help, c.group.format(quality=group.quality)) for c in columns]
    return Table(f"comparison-{group.slug}", tuple(told), sorted(rows, key=lambda line: -line["worst"].value))


def against_tables(results: Results) -> list[tuple[Group, Table]]:
    """For a terminal: of the first group of each kind (all settings, where there is one), scores, and differences from one baseline."""
    boards = board_tables(results)
    wide = [(group, table) for group, table in boards if group.pooled] or boards
    found = []
    for group, table in wide:
        keys = ["method", "worst", *[f"{what} {name}" for name in baselines(group)[:1] for what in ("ahead", "wins")], "mean"]
        keys.append("samples_total" if any(row.get("samples_total") for row in table.rows) else "tokens_total")
        named = {
            "worst": f"worst {group.quality}",
            "mean": f"mean {group.quality}",
            "samples_total": "samples",
            "tokens_total": "tokens",
        }
        known = {column.key: column for column in table.columns}
        columns = [
            Column(
                key,
                named.get(key) or (f"{known[key].title}, {known[key].group}" if known[key].group else known[key].title),
                known[key].kind,
            )
            for key in keys
            if key in known
        ]
        found.append((group, Table(table.name, tuple(columns), table.rows)))
    return found


# Who beats whom


@dataclass(frozen=True)
class Heat:
    """A matrix of differences, row minus column, best methods first; `sure` where the interval leaves 0 out, None where there is none."""

    group: Group
    labels: list[str]
    values: list[list[float | None]]
    sure: list[list[bool | None]]
    hover: list[list[str]]


def difference_heats(results: Results) -> list[Heat]:
    """Per group, the mean paired difference of worst scores between all methods that are no mere scale."""
    return [heat for group in groups(results) if len((heat := _heat(results, group)).labels) > 2]


def _heat(results: Results, group: Group) -> Heat:
    worth = [row["method"] for row in _board(results, group).rows]
    labels = [label for label in worth if results.families[label] != "baseline" or label in baselines(group)]
    known = {(row["method"], row["against"]): row for row in _on_headline(pair_table(results), [group])}
    change, share = Column("", "", "change"), Column("", "", "share")
    values: list[list[float | None]] = []
    sure: list[list[bool | None]] = []
    hover: list[list[str]] = []
    for a in labels:
        rows = [known.get((a, b)) for b in labels]
        ahead = [None if row is None else estimate_of(row, "difference_worst") for row in rows]
        wins = [None if row is None else estimate_of(row, "improvement_worst") for row in rows]
        values.append([None if one is None else one.value for one in ahead])
        sure.append([None if one is None or not np.isfinite(one.low) else not one.low <= 0 <= one.high for one in ahead])
        texts = [f"{a} minus {b}: {change.show(x)}; better: {share.show(y)}" for b, x, y in zip(labels, ahead, wins, strict=True)]
        hover.append([text if one is not None else "" for text, one in zip(texts, ahead, strict=True)])
    return Heat(group, labels, values, sure, hover)


# Profiles


def profile_figures(results: Results) -> list[Figure]:
    """Per group, the profiles of the best methods and of the baselines with their bands."""
    known, rows = looks(results.families), profile_table(results).rows
    figures = []
    for group in groups(results):
        here: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["setting"] == group.label:
                here.setdefault(row["method"], []).append(row)
        area = {label: float(np.mean([row["share"] for row in mine])) for label, mine in here.items()}
        contest = sorted((label for label in here if results.families[label] != "baseline"), key=lambda label: -area[label])
        drawn = list(dict.fromkeys([*contest[:DRAWN], *[label for label in baselines(group) if label in here]]))
        if drawn:
            view = {group.headline: _profiles(group, {label: here[label] for label in drawn}, known)}
            alt = f"Performance profiles on {group.label}; the numbers are in tables/profiles.csv."
            figures.append(Figure(f"profile-{group.slug}", group.label, alt, view, height=380))
    return figures


def _profiles(group: Group, rows: Mapping[str, Sequence[Mapping[str, Any]]], known: Mapping[str, Look]) -> dict[str, Any]:
    first = next(iter(rows.values()))
    x = (first[0]["tau"], first[-1]["tau"]) if group.exact else padded(np.array([row["tau"] for row in first]))
    y = (-0.03, 1.06)
    bands, lines, series = [], [], []
    for label, mine in rows.items():
        points = np.array([[row["tau"], row["share"]] for row in mine])
        hover = [f"{row['share']:.0%} of runs above {row['tau']:.2f}" for row in mine]
        lines.append(trace(label, points, {**style(known[label], line=True), "mode": "lines"}, hover))
        if all(row["share_low"] is not None for row in mine):
            edge = [(row["tau"], row["share_high"]) for row in mine] + [(row["tau"], row["share_low"]) for row in mine[::-1]]
            look = {"mode": "lines", "fill": "toself", "fillcolor": _pale(known[label].color), "line": {"width": 0, "color": "white"}}
            bands.append({**trace(label, np.array(edge), look, []), "hoverinfo": "skip", "hovertemplate": None})
        spots = points[[int(np.abs(points[:, 1] - share).argmin()) for share in (0.5, 0.3, 0.7, 0.15, 0.85)]]
        series.append(Series(label, pixels(spots, x, y), pixels(dense(points), x, y)))
    titles = [f"worst {group.quality}, {PROMPTS[group.headline]}", "share of runs above"]
    return {"data": [*bands, *lines], "layout": layout(titles, x, y, label_notes(series, x, y, known))}


def _pale(color: str) -> str:
    """The color of a band: the method's, nearly transparent."""
    red, green, blue = (int(color[k : k + 2], 16) for k in (1, 3, 5))
    return f"rgba({red}, {green}, {blue}, 0.1)"
