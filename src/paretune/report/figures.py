"""The figures as plain plotly descriptions (JSON): drawn by the page, checked by the tests against plotly's own schema.

Every figure has labels beside its curves, so that it can be read on paper; its numbers are in the CSV file of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from paretune.report.data import PROMPTS, SPLITS, Results, Setting
from paretune.report.plot import (
    EXACT,
    INK,
    MUTED,
    Look,
    Series,
    anchors,
    axis,
    dense,
    dots,
    frame,
    label_notes,
    layout,
    level,
    looks,
    padded,
    pixels,
    preference_text,
    style,
    trace,
)
from paretune.report.series import LOSS_PARTS, loss_table
from paretune.report.tables import CEILING, cost_table, headline, minus

__all__ = ["Figure", "attainment_figures", "cost_figures", "front_figures", "loss_figures"]

FLOOR = -1.0  # attainments below are drawn at the edge
LOSS_COLORS = {"learning": "#56B4E9", "composition": "#D55E00", "remainder": "#c3c9d1"}


@dataclass(frozen=True)
class Figure:
    """`views` are plotly descriptions by split, the headline's first: it is drawn, the other can be chosen."""

    name: str
    title: str
    alt: str
    views: Mapping[str, dict[str, Any]]
    height: int = 420


# Fronts


def front_figures(results: Results) -> list[Figure]:
    """Returns of two objectives against each other, one picture per setting (three for three objectives; more cannot be drawn)."""
    known = looks(results.families)
    figures = []
    for setting in results.settings:
        count = len(setting.objectives)
        for a, b in combinations(range(count), 2) if count <= 3 else ():
            views = {split: _front(setting, split, a, b, known) for split in setting.splits if _curves(setting, split)}
            if views:
                pair = f": {setting.objectives[a]} and {setting.objectives[b]}" if count > 2 else ""
                alt = f"Regularized returns on {setting.label}{pair}; the numbers are in tables/fronts.csv."
                figures.append(Figure(f"front-{setting.slug}-{a}{b}", setting.label + pair, alt, views))
    return figures


def _curves(setting: Setting, split: str) -> dict[str, np.ndarray]:
    """Label -> (W, M) mean points of every method measured on the split at all shared seeds."""
    if not setting.shared_seeds:
        return {}
    there = [label for label in setting.labels if all(cell.measured(split) for cell in setting.of(label))]
    return {label: setting.mean_points(label, split) for label in there}


def _front(setting: Setting, split: str, a: int, b: int, known: Mapping[str, Look]) -> dict[str, Any]:
    curves = {label: points_WM[:, [a, b]] for label, points_WM in _curves(setting, split).items()}
    front = setting.front(split)
    flat = len(setting.objectives) == 2
    shown = {name: _distinct(points_W2) for name, points_W2 in curves.items()}
    exact_K2 = front["points"][:, [a, b]] if front is not None else np.empty((0, 2))
    everything = np.concatenate([*shown.values(), exact_K2])
    low, high = padded(everything[:, 0]), padded(everything[:, 1])

    data: list[dict[str, Any]] = []
    if front is not None:
        drawn = {"mode": "lines", "line": {"color": EXACT, "width": 2.5}} if flat else {"mode": "markers", "marker": dots()}
        data.append(trace(CEILING, exact_K2, drawn, [preference_text(w_M) for w_M in front["w"]]))
    for label, points in shown.items():
        kl_W = np.array([cell.measured(split)["kl"]["per_preference"] for cell in setting.of(label)], dtype=float).mean(0)
        hover = [f"{preference_text(w_M)}, KL {kl:.2f} nats" for w_M, kl in zip(setting.of(label)[0].w_WM, kl_W, strict=True)]
        hover = hover if len(points) > 1 else [f"every preference, KL {kl_W[0]:.2f} nats"]
        drawn = style(known[label], line=flat and len(points) > 1, large=len(points) == 1)
        data.append(trace(label, points, drawn | _whiskers(setting, split, label, (a, b), known[label], len(points)), hover))

    series = [
        Series(label, pixels(points[anchors(len(points))], low, high), pixels(dense(points), low, high))
        for label, points in _merged(shown).items()
    ]
    if front is not None:
        spread = exact_K2[:: max(1, len(exact_K2) // 8)]
        series.append(Series("exact front", pixels(spread, low, high), pixels(dense(exact_K2) if flat else exact_K2, low, high)))
    axes = [f"return of {setting.objectives[k]}" for k in (a, b)]
    return {"data": data, "layout": layout(axes, low, high, label_notes(series, low, high, known))}


def _whiskers(setting: Setting, split: str, label: str, pair: tuple[int, int], look: Look, count: int) -> dict[str, Any]:
    """Plotly's error bars for sampled returns; nothing where they are exact, or points were left out as unknown."""
    errors_WM = setting.mean_errors(label, split)
    if errors_WM is None or not np.isfinite(setting.mean_points(label, split)[:, pair]).all():
        return {}
    red, green, blue = (int(look.color[i : i + 2], 16) for i in (1, 3, 5))
    bars = {"type": "data", "color": f"rgba({red}, {green}, {blue}, 0.3)", "thickness": 0.8, "width": 0}
    return {
        f"error_{axis}": {**bars, "array": [None if np.isnan(e) else round(float(e), 6) for e in errors_WM[:count, k]]}
        for axis, k in zip("xy", pair, strict=True)
    }


def _distinct(points_W2: np.ndarray) -> np.ndarray:
    """One point where the preference changes nothing."""
    points_W2 = points_W2[np.isfinite(points_W2).all(1)]
    return points_W2[:1] if len(points_W2) and np.ptp(points_W2, axis=0).max() < 1e-9 else points_W2


def _merged(curves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Curves that cannot be told apart share one label."""
    found: dict[str, np.ndarray] = {}
    scale = max((float(np.ptp(points, axis=0).max()) for points in curves.values() if len(points)), default=1.0) or 1.0
    for label, points in curves.items():
        if not len(points):
            continue
        for other, there in found.items():
            if points.shape == there.shape and np.abs(points - there).max() < 0.005 * scale:
                found[f"{other}, {label}"] = found.pop(other)
                break
        else:
            found[label] = points
    return found


# Attainment against preference


def attainment_figures(results: Results) -> list[Figure]:
    """One picture per setting: attainment (where the optimum is not known, gain) at every judged preference, mean over seeds."""
    known = looks(results.families)
    figures = []
    for setting in results.settings:
        views = {}
        for split in setting.splits:
            curves = {label: setting.qualities(label, split) for label in setting.labels}
            curves = {label: values_W for label, values_W in curves.items() if np.isfinite(values_W).any()}
            if curves:
                views[split] = _attainment(setting, curves, _heights(results, setting), known)
        if views:
            alt = f"{setting.quality.capitalize()} against preference on {setting.label}; the numbers are in tables/attainment.csv."
            figures.append(Figure(f"attainment-{setting.slug}", setting.label, alt, views, height=380))
    return figures


def _heights(results: Results, setting: Setting) -> tuple[float, float]:
    """The drawn range, the same for all settings of a kind. Attainments of baselines below those of all methods, and below -1, are
    drawn at the lower edge."""
    alike = [s for s in results.settings if s.quality == setting.quality]
    contest = [(s, label) for s in alike for label in s.labels if not setting.exact or results.families[label] != "baseline"]
    values = np.concatenate([np.zeros(1), *[s.qualities(label, split) for s, label in contest for split in SPLITS]])
    if setting.exact:
        return max(FLOOR, float(np.nanmin(values)) - 0.1), 1.13
    return padded(values[np.isfinite(values)])


def _attainment(
    setting: Setting, curves: Mapping[str, np.ndarray], heights: tuple[float, float], known: Mapping[str, Look]
) -> dict[str, Any]:
    w_WM = setting.cells[0].w_WM
    count = w_WM.shape[1]
    flat = count == 2
    x_W = w_WM[:, 0] if flat else count / (count - 1) * (1 - (w_WM**2).sum(1))
    title = f"weight of {setting.objectives[0]}" if flat else "balance of the preference (0: one objective, 1: all alike)"
    across = (0.0, 1.0)
    shown, data = {}, []
    for label, values_W in curves.items():
        points = np.stack([x_W, np.maximum(values_W, heights[0])], axis=1)
        shown[label] = points[np.isfinite(points).all(1)]
        rows = zip(w_WM, values_W, strict=True)
        hover = [f"{preference_text(w_M)}<br>{setting.quality} {v:.3f}" for w_M, v in rows if np.isfinite(v)]
        data.append(trace(label, shown[label], style(known[label], line=flat), hover))
    series = [
        Series(label, pixels(points[anchors(len(points))], across, heights), pixels(dense(points) if flat else points, across, heights))
        for label, points in _merged(shown).items()
    ]
    return {"data": data, "layout": _with_levels([title, setting.quality], series, across, heights, known, exact=setting.exact)}


def _with_levels(
    titles: Sequence[str],
    series: Sequence[Series],
    x: tuple[float, float],
    y: tuple[float, float],
    known: Mapping[str, Look],
    *,
    exact: bool,
) -> dict[str, Any]:
    """A layout with the line of the reference at 0 and, where it is known, that of the exact optimum at 1, named above its right end."""
    if not exact:
        return {**layout(titles, x, y, label_notes(series, x, y, known)), "shapes": [level(0.0, MUTED, 1.0)]}
    right = pixels(np.array([[x[1], 1.0]]), x, y)[0]
    taken = [np.array([right - (48.0, 10.0), (48.0, 10.0)]), np.array([right / (2.0, 1.0), (right[0] / 2, 0.0)])]
    shape = layout(titles, x, y, label_notes(series, x, y, known, taken=taken))
    shape["shapes"] = [level(1.0, EXACT, 2.5), level(0.0, MUTED, 1.0)]
    name = {"text": "<b>exact optimum</b>", "xref": "paper", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "showarrow": False}
    shape["annotations"].append(name | {"font": {"size": 12, "color": INK}})
    return shape


# Cost against quality


def cost_figures(results: Results) -> list[Figure]:
    """The headline's worst attainment (or gain) against what was drawn for training: filled in total, hollow on the critical path."""
    trained = [row for row in cost_table(results).rows if row["trainings"]]
    unit = "samples" if trained and all(row["samples_total"] > 0 for row in trained) else "tokens"
    figures = []
    for setting in results.settings:
        here = [row for row in trained if row["setting"] == setting.label and headline(row) is not None and row[f"{unit}_total"] > 0]
        if here:
            alt = f"Worst {setting.quality} against {unit} on {setting.label}; the numbers are in tables/cost.csv."
            view = {setting.headline: _cost(results, setting, here, unit)}
            figures.append(Figure(f"cost-{setting.slug}", setting.label, alt, view, height=380))
    return figures


def _cost(results: Results, setting: Setting, rows: Sequence[Mapping[str, Any]], unit: str) -> dict[str, Any]:
    known, floor = looks(results.families), _heights(results, setting)[0]
    totals = np.log10([row[f"{unit}_total"] for row in rows])
    paths = np.log10([max(row[f"{unit}_path"], 1.0) for row in rows])
    qualities = np.array([max(worst, floor) for row in rows if (worst := headline(row)) is not None])
    low = (min(paths.min(), totals.min()) - 0.25, max(totals.max(), paths.max()) + 0.45)
    high = (min(float(qualities.min()) - 0.08, -0.08), 1.13) if setting.exact else padded(np.append(qualities, 0.0))
    data, spots = [], {}
    for row, total, path, quality in zip(rows, totals, paths, qualities, strict=True):
        look = known[row["method"]]
        ends = np.array([[path, quality], [total, quality]])
        hover = [f"critical path: {row[f'{unit}_path']:,.0f} {unit}", f"in total: {row[f'{unit}_total']:,.0f} {unit}"]
        hollow = look.marker if look.marker.endswith("open") else f"{look.marker}-open"
        drawn = style(look, line=True)
        drawn["marker"] = {"symbol": [hollow, look.marker], "size": 10, "color": look.color, "line": {"width": 1.5, "color": look.color}}
        data.append(trace(row["method"], np.stack([10 ** ends[:, 0], ends[:, 1]], axis=1), drawn, hover))
        spots[row["method"]] = ends
    series = [
        Series(label, pixels(ends[1:], low, high), pixels(np.concatenate([dense(ends), *[ends] * 6]), low, high))
        for label, ends in _merged(spots).items()
    ]
    titles = [f"{unit} for training and search (log scale)", f"worst {setting.quality}, {PROMPTS[setting.headline]}"]
    shape = _with_levels(titles, series, low, high, known, exact=setting.exact)
    shape["xaxis"] |= {"type": "log", "dtick": 1 if low[1] - low[0] > 2 else "D2", "tickformat": "~s"}
    return {"data": data, "layout": shape}


# Where the loss comes from


def loss_figures(results: Results) -> list[Figure]:
    """Stacked bars: learning, composition and remainder, mean over preferences and seeds."""
    table = loss_table(results)
    ends = [sum(max(row[part] or 0.0, 0.0) for part in LOSS_PARTS) for row in table.rows]
    starts = [sum(min(row[part] or 0.0, 0.0) for part in LOSS_PARTS) for row in table.rows]
    span = (1.05 * min([*starts, 0.0]), 1.16 * max([*ends, 0.05]))
    figures = []
    for setting in results.settings:
        rows = [row for row in table.rows if row["setting"] == setting.label][::-1]
        if rows:
            height = 120 + 46 * len(rows)
            alt = f"Loss by origin on {setting.label}; the numbers are in tables/loss.csv."
            figures.append(Figure(f"loss-{setting.slug}", setting.label, alt, {setting.headline: _loss(rows, span)}, height=height))
    return figures


def _loss(rows: Sequence[Mapping[str, Any]], span: tuple[float, float]) -> dict[str, Any]:
    enough = 0.13 * (span[1] - span[0])  # a narrower bar has no room for its number
    names = [row["method"] for row in rows]
    data = []
    for part in LOSS_PARTS:
        values = [row[part] for row in rows]
        if any(v is not None for v in values):
            data.append(
                {
                    "type": "bar",
                    "orientation": "h",
                    "name": part,
                    "y": names,
                    "x": values,
                    "text": [minus(f"{v:.2f}") if v is not None and abs(v) >= enough else "" for v in values],
                    "textposition": "inside",
                    "insidetextanchor": "middle",
                    "textangle": 0,
                    "constraintext": "none",
                    "marker": {"color": LOSS_COLORS[part], "line": {"color": "white", "width": 1}},
                    "hovertemplate": f"%{{y}}<br>{part}: %{{x:.3f}}<extra></extra>",
                }
            )
    shape = frame()
    shape |= {"barmode": "relative", "bargap": 0.35, "margin": {"l": 10, "r": 12, "t": 8, "b": 46}}
    shape["xaxis"] = {
        **axis(f"loss of attainment, {PROMPTS[rows[0]['prompts']]}"),
        "range": list(span),
        "zeroline": True,
        "zerolinecolor": MUTED,
    }
    shape["annotations"] = [_total(row) for row in rows]
    shape["yaxis"] = {**axis(""), "automargin": True, "showgrid": False, "ticks": "", "tickfont": {"size": 12, "color": INK}}
    return {"data": data, "layout": shape}


def _total(row: Mapping[str, Any]) -> dict[str, Any]:
    """The whole loss as a number at the end of its bar."""
    end = sum(max(row[part] or 0.0, 0.0) for part in LOSS_PARTS)
    text = f"<b>{minus(format(row['loss'], '.2f'))}</b>"
    return {
        "x": end,
        "y": row["method"],
        "text": text,
        "xanchor": "left",
        "xshift": 4,
        "showarrow": False,
        "font": {"size": 12, "color": INK},
    }
