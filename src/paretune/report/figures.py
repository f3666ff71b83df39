"""Figures: plain descriptions (JSON) from which the page draws, and `paretune.report.drawing` writes SVG files for papers and slides.

Every figure names the methods that matter beside their curves, so that it can be read on paper; its numbers are in the CSV file of the same
name. A view is

    {"x", "y": {"title", "range", "log"}, "both", "levels": [{"at", "name"}], "series": [{"name", "x", "y", "text", "line", ...}]}

in units of the data; `both` where x is a result, as y is. `text` says more of each point when it is pointed to. A series may have `below`
(the true value of a point that lies under the range, and is drawn as an arrow at its edge), `error` (half widths, {"x", "y"}), `band`
([lower], [upper]), `hollow` (points without filling), `plain` (no markers) and `spots` (points to which its label may point).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import combinations
from typing import Any

import numpy as np

from paretune.report.comparison import baselines, groups, profile_table
from paretune.report.data import PROMPTS, SPLITS, Results, Setting
from paretune.report.tables import CEILING, LOSS_PARTS, Table, cost_table, glance_table, headline, leaderboard, loss_table

__all__ = [
    *("DRAWN", "FIGURES", "Figure", "Plot", "attainment_figures", "cost_figures", "front_figures", "leaders", "loss_bars"),
    *("padded", "profile_figures", "weights"),
]

EVEN = 1e-5  # a smaller spread is none: numbers are drawn to six digits
LEADERS = 3  # methods that are named in every picture, beside one baseline


@lru_cache(maxsize=4)
def leaders(results: Results) -> tuple[str, ...]:
    """The methods that matter: the best ones by their worst value over all settings, and the baseline that others have to beat."""
    ranked = [row["method"] for row in glance_table(results).rows]
    if not ranked:
        values: dict[str, list[float]] = {}
        for row in leaderboard(results).rows:
            if (value := headline(row)) is not None and row["method"] != CEILING:
                values.setdefault(row["method"], []).append(value)
        ranked = sorted(values, key=lambda label: -min(values[label]))
    here = [label for setting in results.settings for label in baselines(setting)] or [
        label for label in ranked if results.families[label] == "baseline"
    ]
    contest = [label for label in ranked if results.families[label] != "baseline" and label not in here[:1]]
    return (*contest[:LEADERS], *here[:1])


# One picture


def padded(*several: Iterable[float] | np.ndarray) -> tuple[float, float]:
    """A range that holds all known values, with some room at both ends."""
    values = np.concatenate([np.ravel(np.asarray(values, dtype=float)) for values in several])
    values = values[np.isfinite(values)]
    low, high = (float(values.min()), float(values.max())) if len(values) else (0.0, 1.0)
    pad = 0.09 * (high - low if high - low > EVEN else 1.0)
    return low - pad, high + pad


def weights(w_M: Sequence[float] | np.ndarray) -> str:
    """(0.7, 0.3) -> "w = (0.70, 0.30)"."""
    return "w = (" + ", ".join(f"{w:.2f}" for w in w_M) + ")"


def _numbers(values: Iterable[float]) -> list[float | None]:
    return [round(float(value), 6) if np.isfinite(value) else None for value in values]


class Plot:
    """A view in the making. A point below the range is drawn at the lower edge as an arrow with its value."""

    def __init__(self, titles: Sequence[str], x: tuple[float, float], y: tuple[float, float], *, log: bool = False, both: bool = False):
        self.floor = y[0]
        axes = [{"title": title, "range": _numbers(ends), "log": False} for title, ends in zip(titles, (x, y), strict=True)]
        axes[0]["log"] = log
        self.levels: list[dict[str, Any]] = []
        self.series: list[dict[str, Any]] = []
        self.axes, self.both = axes, both

    def draw(self, name: str, points: np.ndarray, text: Sequence[str] = (), *, line: bool, **more: Any) -> None:
        """A series of (n, 2) points."""
        below = points[:, 1] < self.floor
        found: dict[str, Any] = {"name": name, "x": _numbers(points[:, 0]), "y": _numbers(np.maximum(points[:, 1], self.floor))}
        found |= {"text": list(text), "line": line}
        if below.any():
            found["below"] = [number if low else None for low, number in zip(below, _numbers(points[:, 1]), strict=True)]
        self.series.append(found | {key: value for key, value in more.items() if value})

    def level(self, at: float, name: str = "") -> None:
        """A horizontal line; one with a name is strong."""
        self.levels.append({"at": at, "name": name})

    def view(self) -> dict[str, Any]:
        """The whole description."""
        return {"x": self.axes[0], "y": self.axes[1], "both": self.both, "levels": self.levels, "series": self.series}


@dataclass(frozen=True)
class Figure:
    """`views` are descriptions by split, the headline's first: it is drawn, the other can be chosen."""

    name: str
    title: str
    alt: str
    views: Mapping[str, dict[str, Any]]


def _figures(
    settings: Iterable[Setting], name: str, said: str, draw: Callable, *, csv: str = "", ends: tuple[str, str] = ("", "")
) -> list[Figure]:
    """One figure for each of the settings, a view of it for each split of which `draw` makes one; `ends` add to its name and title."""
    found = []
    for setting in settings:
        views = {split: view for split in setting.splits if (view := draw(setting, split))}
        what = said.format(quality=setting.quality, Quality=setting.quality.capitalize())
        alt = f"{what} on {setting.label}{ends[1]}; the numbers are in tables/{csv or name}.csv."
        if views:
            found.append(Figure(f"{name}-{setting.slug}{ends[0]}", setting.label + ends[1], alt, views))
    return found


# The figures


def front_figures(results: Results) -> list[Figure]:
    """Returns of two objectives against each other, one picture per setting (three for three objectives; more cannot be drawn)."""
    found = []
    for setting in results.settings:
        names = setting.objectives
        for a, b in combinations(range(len(names)), 2) if len(names) <= 3 else ():
            ends = (f"-{a}{b}", f": {names[a]} and {names[b]}" if len(names) > 2 else "")
            found += _figures([setting], "front", "Regularized returns", partial(_front, pair=(a, b)), csv="fronts", ends=ends)
    return found


def _front(setting: Setting, split: str, *, pair: tuple[int, int]) -> dict[str, Any] | None:
    if not setting.drawn(split):
        return None
    curves, errors = {}, {}
    for label in setting.drawn(split):
        points_W2 = setting.mean_points(label, split)[:, pair]
        error_WM = setting.mean_errors(label, split)
        known_W = np.isfinite(points_W2).all(1)
        alike = known_W.any() and np.ptp(points_W2[known_W], axis=0).max() < 1e-9  # the preference changes nothing: one point
        kept = np.flatnonzero(known_W)[: 1 if alike else None]
        curves[label] = (kept, points_W2[kept])
        errors[label] = np.zeros((len(kept), 2)) if error_WM is None else np.nan_to_num(error_WM[kept][:, pair])
    front, flat = setting.front(split), len(setting.objectives) == 2
    exact_K2 = front["points"][:, pair] if front is not None else np.empty((0, 2))
    ends = [points + sign * errors[label] for label, (_, points) in curves.items() for sign in (-1, 1)]
    whole = np.concatenate([*ends, exact_K2])
    titles = [f"return of {setting.objectives[k]}" for k in pair]
    plot = Plot(titles, padded(whole[:, 0]), padded(whole[:, 1]), both=True)
    if front is not None:
        spread = list(range(0, len(exact_K2), max(1, len(exact_K2) // 8)))
        plot.draw(CEILING, exact_K2, [weights(w_M) for w_M in front["w"]], line=flat, plain=flat, spots=spread)
    for label, (kept, points) in curves.items():
        w_WM = setting.of(label)[0].w_WM
        kl_W = np.array([cell.measured(split, "kl", "per_preference") for cell in setting.of(label)], dtype=float).mean(0)
        said = ["every preference"] if len(kept) == 1 < len(w_WM) else [weights(w_WM[n]) for n in kept]
        text = [f"{start}, KL {kl_W[n]:.2f} nats" for start, n in zip(said, kept, strict=True)]
        bars = {axis: _numbers(errors[label][:, k]) for k, axis in enumerate("xy")} if errors[label].any() else None
        plot.draw(label, points, text, line=flat and len(points) > 1, error=bars)
    return plot.view()


def attainment_figures(results: Results) -> list[Figure]:
    """One picture per setting: attainment (where the optimum is not known, gain) at every judged preference, mean over seeds."""
    return _figures(results.settings, "attainment", "{Quality} against preference", partial(_attainment, results))


@lru_cache(maxsize=4)
def _heights(results: Results, exact: bool) -> tuple[float, float]:
    """The drawn range, the same for all settings of a kind: of attainments that of all methods but baselines, and not below -1; of gains
    with their intervals."""
    alike = [s for s in results.settings if s.exact == exact]
    contest = [(s, label) for s in alike for label in s.labels if not exact or results.families[label] != "baseline"]
    values = np.concatenate([np.zeros(1), *[s.qualities(label, split) for s, label in contest for split in SPLITS]])
    if exact:
        return max(-1.0, float(np.nanmin(values)) - 0.1), 1.13
    bands = [band for s, label in contest for split in SPLITS if (band := s.band(label, split)) is not None]
    return padded(values, *bands)


def _attainment(results: Results, setting: Setting, split: str) -> dict[str, Any] | None:
    w_WM = setting.cells[0].w_WM
    count = w_WM.shape[1]
    x_W = w_WM[:, 0] if count == 2 else count / (count - 1) * (1 - (w_WM**2).sum(1))
    title = f"weight of {setting.objectives[0]}" if count == 2 else "balance of the preference (0: one objective, 1: all alike)"
    plot = Plot([title, setting.quality], (0.0, 1.0), _heights(results, setting.exact))
    for label in setting.labels:
        values_W, band = setting.qualities(label, split), setting.band(label, split)
        known_W = np.isfinite(values_W)
        if known_W.any():
            ends = [_numbers(end_W[known_W]) for end_W in band] if band is not None and np.isfinite(band[:, known_W]).all() else None
            text = [weights(w_M) for w_M in w_WM[known_W]]
            more = {"band": ends} if count == 2 else {}
            plot.draw(label, np.stack([x_W, values_W], axis=1)[known_W], text, line=count == 2, **more)
    if count == 2 and plot.series:
        for name, attained_W in setting.known(split).items():
            plot.draw(LINES[name], np.stack([x_W, attained_W], axis=1), [weights(w_M) for w_M in w_WM], line=True, plain=True)
    _known_levels(plot, setting)
    return plot.view() if plot.series else None


LINES = {"representable": "frozen head's ceiling", "blind": "blind to the prompt", "posterior": "posterior mean"}


def _known_levels(plot: Plot, setting: Setting) -> None:
    plot.level(0.0)
    if setting.exact:
        plot.level(1.0, "exact optimum")


def profile_figures(results: Results) -> list[Figure]:
    """Per group of settings, the profiles of the best methods and of the baselines with their bands."""
    return _figures(groups(results), "profile", "Performance profiles", partial(_profiles, results), csv="profiles")


DRAWN = 8  # profiles in one picture


def _profiles(results: Results, group: Setting, split: str) -> dict[str, Any] | None:
    here: dict[str, list[dict[str, Any]]] = {}
    for row in profile_table(results).placed.get((group.label, split), ()):
        here.setdefault(row["method"], []).append(row)
    area = {label: float(np.mean([row["share"] for row in mine])) for label, mine in here.items()}
    contest = sorted((label for label in here if results.families[label] != "baseline"), key=lambda label: -area[label])
    rows = {label: here[label] for label in (*contest[:DRAWN], *baselines(group)) if label in here}
    if not rows:
        return None
    taus = [row["tau"] for row in next(iter(rows.values()))]
    x = (taus[0], taus[-1]) if group.exact else padded(taus)
    plot = Plot([f"worst {group.quality}, {PROMPTS[split]}", "share of runs above"], x, (-0.03, 1.06))
    for label, mine in rows.items():
        points = np.array([[row["tau"], row["share"]] for row in mine])
        spots = [int(np.abs(points[:, 1] - share).argmin()) for share in (0.5, 0.3, 0.7, 0.15, 0.85)]
        known = all(row["share_low"] is not None for row in mine)
        band = [_numbers(row[f"share_{end}"] for row in mine) for end in ("low", "high")] if known else None
        text = [f"{row['share']:.0%} of runs above {row['tau']:.2f}" for row in mine]
        plot.draw(label, points, text, line=True, plain=True, spots=spots, band=band)
    return plot.view()


def cost_figures(results: Results) -> list[Figure]:
    """The headline's worst attainment (or gain) against what was drawn for training: filled in total, hollow on the critical path."""
    table = cost_table(results)
    trained = [row for row in table.rows if row["trainings"]]
    unit = "samples" if trained and all(row["samples_total"] > 0 for row in trained) else "tokens"
    return _figures(results.settings, "cost", f"Worst {{quality}} against {unit}", partial(_cost, results, table, unit))


def _cost(results: Results, table: Table, unit: str, setting: Setting, split: str) -> dict[str, Any] | None:
    trained = [row for row in table.placed.get((setting.label, split), ()) if row["trainings"]]
    rows = [row for row in trained if headline(row) is not None and row[f"{unit}_total"] > 0]
    if not rows:
        return None
    costs = np.array([[max(row[f"{unit}_path"], 1.0), row[f"{unit}_total"]] for row in rows])
    worst = np.array([headline(row) for row in rows], dtype=float)
    edge = _heights(results, setting.exact)[0]
    shown = np.maximum(worst, edge)
    y = (min(float(shown.min()) - 0.08, -0.08), 1.13) if setting.exact else padded(shown, [0.0])
    x = (float(costs.min()) / 1.6, float(costs.max()) * 1.6)
    title = f"worst {setting.quality}, {PROMPTS[split]}"
    plot = Plot([f"{unit} for training and search (log scale)", title], x, y, log=True)
    for row, ends, quality in zip(rows, costs, worst, strict=True):
        text = [f"critical path: {row[f'{unit}_path']:,.0f} {unit}", f"in total: {row[f'{unit}_total']:,.0f} {unit}"]
        plot.draw(row["method"], np.stack([ends, [quality] * 2], axis=1), text, line=True, hollow=[True, False], spots=[1])
    _known_levels(plot, setting)
    return plot.view()


def loss_bars(results: Results) -> list[tuple[Setting, list[dict[str, Any]]]]:
    """(setting, bars): per method, from the smallest loss, its parts as shares of the width, means over preferences and seeds.

    A bar is {"method", "loss", "parts": [(name, value, left, width)]}, left and width in percent; parts below 0 lie left of `zero`.
    """
    table = loss_table(results)
    low = min([0.0, *(sum(min(row[part] or 0.0, 0.0) for part in LOSS_PARTS) for row in table.rows)])
    high = max([0.05, *(sum(max(row[part] or 0.0, 0.0) for part in LOSS_PARTS) for row in table.rows)])
    found = []
    for setting in results.settings:
        bars = []
        for row in sorted(table.placed.get((setting.label, setting.headline), ()), key=lambda row: row["loss"]):
            ends, parts = [0.0, 0.0], []
            for part in LOSS_PARTS:
                value = row[part]
                if value:
                    start = ends[value > 0] if value > 0 else ends[0] + value
                    ends[value > 0] += value
                    parts.append((part, value, 100 * (start - low) / (high - low), 100 * abs(value) / (high - low)))
            bars.append({"method": row["method"], "loss": row["loss"], "parts": parts, "zero": -100 * low / (high - low)})
        found += [(setting, bars)] if bars else []
    return found


MAKERS = (attainment_figures, front_figures, profile_figures, cost_figures)
FIGURES = dict(zip(("attainment", "fronts", "profiles", "cost"), MAKERS, strict=True))  # by the anchor of their section
