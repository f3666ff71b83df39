"""Figures: plotly descriptions (JSON) that the page draws, and the same as SVG files for papers, slides and the README.

Every figure has labels beside its curves, so that it can be read on paper; its numbers are in the CSV file of the same name.

Colors are those of Okabe and Ito (2008) without the yellow that vanishes on white; every method also has a marker of its own, and a
dash once the colors come round again, so that methods are told apart without color, the same in the page, the pictures and the
terminal. Baselines are gray: they are the scale, not the contest. The exact front is black.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from html import escape
from itertools import combinations
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from paretune.report.comparison import baselines, groups, profile_table
from paretune.report.data import PROMPTS, SPLITS, Results, Setting
from paretune.report.tables import CEILING, LOSS_PARTS, Table, cost_table, headline, loss_table, minus, short_count

__all__ = [
    *("COLORS", "DRAWN", "FIGURES", "LOSS_COLORS", "Figure", "Label", "Look", "PALETTE", "Series", "attainment_figures"),
    *("axis", "cost_figures", "frame", "front_figures", "looks", "loss_figures", "place", "profile_figures", "template", "to_svg"),
]

# Looks

INK, MUTED, GRID, EDGE = "#1b1f24", "#6b7480", "#e8ebef", "#b9c0c9"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
PALETTE = {"ink": INK, "muted": MUTED, "grid": GRID, "edge": EDGE, "font": FONT}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
GRAYS = ("#6b7480", "#8a929c", "#59616b", "#a3a9b1")
# More markers than colors, so that a table, which shows no dashes, tells more than seven methods apart, too.
NAMES = "circle square diamond triangle-up triangle-down star hexagon pentagon triangle-right"
MARKS = tuple(zip(NAMES.split(), "●■◆▲▼★⬢⬟▶", strict=True))
GRAY_MARKS = (("x-thin-open", "×"), ("circle-open", "○"), ("square-open", "□"), ("diamond-open", "◇"), ("triangle-up-open", "△"))
DASHES = ("solid", "dash", "dot", "dashdot")
LOSS_COLORS = dict(zip(LOSS_PARTS, ("#56B4E9", "#D55E00", "#c3c9d1"), strict=True))


@dataclass(frozen=True)
class Look:
    """Color (hex), marker (plotly's name and a character) and dash (plotly's name) of one method."""

    color: str
    marker: str
    mark: str
    dash: str

    def pale(self, opacity: float) -> str:
        red, green, blue = (int(self.color[k : k + 2], 16) for k in (1, 3, 5))
        return f"rgba({red}, {green}, {blue}, {opacity})"


def looks(families: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Label -> look, given label -> family ("baseline" or another) in a fixed order. The same labels always look the same."""
    found: dict[str, Look] = {}
    for baseline, colors, marks in ((True, GRAYS, GRAY_MARKS), (False, COLORS, MARKS)):
        for n, label in enumerate(label for label, family in dict(families).items() if (family == "baseline") == baseline):
            found[label] = Look(colors[n % len(colors)], *marks[n % len(marks)], DASHES[n // len(colors) % len(DASHES)])
    return {label: found[label] for label in dict(families)}


# Labels: where to put a name so that it covers neither another one nor a curve

PLOT = (330, 330)  # the plot area that labels are placed for, in pixels; a larger one only spreads them
GLYPH, LINE = 6.6, 15.0  # width of a letter (a marker takes two) and height of a line in pixels, at 12 px
RADII, ANGLES = (13.0, 24.0, 40.0, 62.0), np.arange(0, 2 * np.pi, np.pi / 8)
OFFSETS = np.array([(radius * np.cos(angle), radius * np.sin(angle)) for radius in RADII for angle in ANGLES])
TRIED = 40  # places whose leaders are looked at


@dataclass(frozen=True)
class Series:
    """A name, the places that a label may point to, and every place that a label should not cover: (n, 2) pixels, y downwards."""

    name: str
    anchors: np.ndarray
    ink: np.ndarray


@dataclass(frozen=True)
class Label:
    """`x, y` is the center of the text, `anchor` the place that it names; pixels, y downwards."""

    name: str
    x: float
    y: float
    anchor: tuple[float, float]


def place(series: Sequence[Series], *, width: float, height: float, taken: Sequence[np.ndarray] = ()) -> list[Label]:
    """One label per series inside a width x height plot; greedy, the longest names first.

    `taken` are boxes that stay free: (2, 2), center and half size. A series for whose label there is no free place gets none: the key
    beside the picture still names it.
    """
    boxes, labels = list(taken), []
    for one in sorted(series, key=lambda s: -len(s.name)):
        half = np.array([GLYPH * (len(one.name) + 2) / 2 + 3, LINE / 2 + 1])
        spot, centers = np.repeat(np.arange(len(one.anchors)), len(OFFSETS)), np.tile(OFFSETS, (len(one.anchors), 1))
        across = centers[:, 0]
        aside = np.where(np.abs(across) > 4, np.sign(across) * half[0] * np.minimum(1, np.abs(across) / 12), 0.0)
        centers = one.anchors[spot] + centers + np.stack([aside, np.zeros_like(aside)], axis=1)
        free = ~((centers - half < 0).any(1) | (centers + half > (width, height)).any(1))
        for box in boxes:
            across, down = np.abs(centers - box[0]).T
            free &= (across >= half[0] + box[1][0]) | (down >= half[1] + box[1][1])
        if free.any():
            others = np.concatenate([np.empty((0, 2)), *(s.ink for s in series if s is not one)])
            best = np.flatnonzero(free)[_best(centers[free], one.anchors, spot[free], half, one.ink, others)]
            boxes.append(np.stack([centers[best], half]))
            (x, y), (ax, ay) = centers[best].tolist(), one.anchors[spot[best]].tolist()
            labels.append(Label(one.name, x, y, (ax, ay)))
    return labels


def _best(centers: np.ndarray, spots: np.ndarray, spot: np.ndarray, half: np.ndarray, own: np.ndarray, others: np.ndarray) -> int:
    """The place that covers least, points to the least crowded spot from nearby, and whose leader crosses fewest other curves.

    `spot` is the number of the spot to which each place points.
    """
    anchors = spots[spot]

    def gaps(places: np.ndarray) -> np.ndarray:
        return np.maximum(*_apart(places, others)).min(1)

    across, down = _apart(centers, np.concatenate([own, others]))
    costs = 3.0 * ((across < half[0]) & (down < half[1])).sum(1) + 0.05 * np.hypot(*(centers - anchors).T)
    if not len(others):
        return int(costs.argmin())
    costs = costs + (12.0 / (1.0 + gaps(spots)))[spot]
    tried = np.argsort(costs, kind="stable")[:TRIED]
    leaders = [anchors[tried] + share * (centers - anchors)[tried] for share in np.linspace(0.25, 0.75, 5)]
    for gap in np.split(gaps(np.concatenate(leaders)), len(leaders)):
        costs[tried] += 2.0 * (gap < 4)
    return int(tried[costs[tried].argmin()])


def _apart(places: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n, m) distances of n places from m others, across and down."""
    across, down = places[:, :1] - others[:, 0], places[:, 1:] - others[:, 1]
    return np.abs(across, out=across), np.abs(down, out=down)


def _dense(points: np.ndarray, count: int = 48) -> np.ndarray:
    """`count` points along the line through `points`."""
    t = np.linspace(0, len(points) - 1, count)
    return np.stack([np.interp(t, np.arange(len(points)), points[:, k]) for k in (0, 1)], axis=1)


# One picture


def frame() -> dict[str, Any]:
    """What all figures share."""
    fixed = {"autosize": True, "showlegend": False, "hovermode": "closest", "paper_bgcolor": "white", "plot_bgcolor": "white"}
    hover = {"bgcolor": "white", "font": {"size": 13, "color": INK}}
    margin = {"l": 58, "r": 14, "t": 8, "b": 50}
    return {**fixed, "font": {"family": FONT, "size": 12, "color": INK}, "margin": margin, "hoverlabel": hover, "annotations": []}


def axis(title: str, **more: Any) -> dict[str, Any]:
    """What all axes share."""
    lines = {"gridcolor": GRID, "zeroline": False, "linecolor": EDGE, "showline": True, "ticks": "outside", "tickcolor": EDGE, "ticklen": 4}
    named = {"text": escape(title), "font": {"size": 13, "color": INK}, "standoff": 8}
    return {"title": named, **lines, "tickfont": {"size": 12, "color": MUTED}, **more}


def _padded(values: np.ndarray) -> tuple[float, float]:
    """An axis range with some room at both ends."""
    low, high = float(np.min(values)), float(np.max(values))
    pad = 0.09 * ((high - low) or 1.0)
    return low - pad, high + pad


class _Plot:
    """A plotly description in the making: draw curves, then `view` with a label beside each.

    A point below the range is drawn at the lower edge as an arrow; the label says the lowest such value, and the hover text each.
    """

    def __init__(self, titles: Sequence[str], x: tuple[float, float], y: tuple[float, float], known: Mapping[str, Look]):
        self.x, self.y, self.known, self.floor = x, y, known, [-np.inf, y[0]]
        self.data: list[dict[str, Any]] = []
        self.layout = {**frame(), "xaxis": axis(titles[0], range=list(x)), "yaxis": axis(titles[1], range=list(y))}
        self.curves: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, str]] = {}  # true points, anchors, ink, what a label adds
        self.taken: list[np.ndarray] = []

    def draw(
        self, name: str, points: np.ndarray, hover: Sequence[str], *, line: bool, spots: Iterable[int] = (), style: Any = None
    ) -> None:
        """A series of (n, 2) points; `hover` says more of each. Its label points to one of the `spots`. `style` replaces the method's."""
        n, below, text = len(points), points[:, 1] < self.y[0], list(hover)
        drawn = np.maximum(points, self.floor)
        look = style or self.style(name, line=line, large=n == 1 and not line)
        if below.any():
            symbols = look["marker"]["symbol"]
            each = [symbols] * n if isinstance(symbols, str) else symbols
            look["marker"]["symbol"] = ["arrow-down" if low else symbol for low, symbol in zip(below, each, strict=True)]
            look["cliponaxis"] = False
            where = [f"<br>below the edge, at {minus(f'{y:.2f}')}" if low else "" for y, low in zip(points[:, 1], below, strict=True)]
            text = [said + more for said, more in zip(text, where, strict=True)]
        self.trace(name, drawn, look, text)
        if n:  # unless it is told where, the middle one first: there methods differ most
            places = {n // 2, n // 3, 2 * n // 3, n // 6, 5 * n // 6, 0, n - 1} & set(range(n))
            anchors = drawn[list(spots) or sorted(places, key=lambda i: abs(i - n // 2))]
            more = f" {minus(f'{points[below, 1].min():.2f}')}" if below.any() else ""
            self.curves["exact front" if name == CEILING else name] = (points, anchors, _dense(drawn) if line else drawn, more)

    def trace(self, name: str, points: np.ndarray, style: Mapping[str, Any], hover: Sequence[str]) -> None:
        """A series without a label."""
        x, y = ([round(float(value), 6) for value in points[:, k]] for k in (0, 1))
        template = f"<b>{escape(name)}</b><br>%{{text}}<br>(%{{x:.3f}}, %{{y:.3f}})<extra></extra>"
        self.data.append({"type": "scatter", "name": name, "x": x, "y": y, "text": list(hover), "hovertemplate": template, **style})

    def style(self, name: str, *, line: bool, large: bool = False) -> dict[str, Any]:
        """A method's look in plotly's words."""
        look = self.known[name]
        edge = {"width": 2 if "open" in look.marker else 0.8, "color": look.color if "open" in look.marker else "white"}
        marker = {"symbol": look.marker, "size": 11 if large else 7, "color": look.color, "line": edge}
        drawn = {"color": look.color, "width": 1.8, "dash": look.dash}
        return {"mode": "lines+markers" if line else "markers", "line": drawn, "marker": marker}

    def levels(self, *, exact: bool) -> None:
        """The line of the reference at 0 and, where it is known, that of the exact optimum at 1, named above its right end."""
        across = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "layer": "between"}
        lines = [(1.0, INK, 2.5)] * exact + [(0.0, MUTED, 1.0)]
        self.layout["shapes"] = [across | {"y0": y, "y1": y, "line": {"color": color, "width": width}} for y, color, width in lines]
        if exact:
            right = self.pixels(np.array([[self.x[1], 1.0]]))[0]
            self.taken = [np.array([right - (48.0, 10.0), (48.0, 10.0)]), np.array([right / (2.0, 1.0), (right[0] / 2, 0.0)])]
            end = {"xref": "paper", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "showarrow": False}
            self.layout["annotations"] = [{"text": "<b>exact optimum</b>", **end, "font": {"size": 12, "color": INK}}]

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """(n, 2) data -> (n, 2) pixels from the top left of the plot."""
        across = (points[:, 0] - self.x[0]) / (self.x[1] - self.x[0]) * PLOT[0]
        down = (self.y[1] - points[:, 1]) / (self.y[1] - self.y[0]) * PLOT[1]
        return np.stack([across, down], axis=1)

    def view(self) -> dict[str, Any]:
        """The whole description. Curves that cannot be told apart share one label."""
        merged: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, str]] = {}
        sizes = [float(np.ptp(np.maximum(curve[0], self.floor), axis=0).max()) for name, curve in self.curves.items() if name in self.known]
        near = 0.005 * (max(sizes, default=1.0) or 1.0)
        for name, curve in self.curves.items():
            alike = [other for other, there in merged.items() if there[0].shape == curve[0].shape]
            twin = next((other for other in alike if np.abs(merged[other][0] - curve[0]).max() < near), None)
            merged[f"{twin}, {name}" if twin else name] = merged.pop(twin) if twin else curve
        series = [Series(name + more, self.pixels(anchors), self.pixels(ink)) for name, (_, anchors, ink, more) in merged.items()]
        names = {name + curve[3]: name for name, curve in merged.items()}
        labels = place(series, width=PLOT[0], height=PLOT[1], taken=self.taken)
        self.layout["annotations"] = [self._note(label, names[label.name]) for label in labels] + self.layout["annotations"]
        return {"data": self.data, "layout": self.layout}

    def _note(self, label: Label, name: str) -> dict[str, Any]:
        """A label as a plotly annotation: the arrow's head at the place that is named, the text so many pixels away."""
        known = [self.known[part] for part in name.split(", ") if part in self.known]
        marks = "".join(f'<span style="color:{look.color}">{look.mark}</span>' for look in known)
        x = self.x[0] + label.anchor[0] / PLOT[0] * (self.x[1] - self.x[0])
        y = self.y[1] - label.anchor[1] / PLOT[1] * (self.y[1] - self.y[0])
        text = f"{marks} {escape(label.name)}" if marks else f"<b>{escape(label.name)}</b>"
        note = {"x": x, "y": y, "ax": label.x - label.anchor[0], "ay": label.y - label.anchor[1], "text": text, "name": name}
        note |= {"showarrow": True, "arrowhead": 0, "arrowwidth": 0.8, "arrowcolor": known[0].color if known else INK, "standoff": 5}
        return note | {"font": {"size": 12, "color": INK}, "bgcolor": "rgba(255,255,255,0.7)", "borderpad": 1}


# The figures


@dataclass(frozen=True)
class Figure:
    """`views` are plotly descriptions by split, the headline's first: it is drawn, the other can be chosen."""

    name: str
    title: str
    alt: str
    views: Mapping[str, dict[str, Any]]
    height: int


def _figures(
    settings: Iterable[Setting], name: str, said: str, draw: Callable, *, csv: str = "", ends: tuple[str, str] = ("", ""), height: int = 380
) -> list[Figure]:
    """One figure for each of the settings, a view of it for each split of which `draw` makes one; `ends` add to its name and title."""
    found = []
    for setting in settings:
        views = {split: view for split in setting.splits if (view := draw(setting, split))}
        what = said.format(quality=setting.quality, Quality=setting.quality.capitalize())
        alt = f"{what} on {setting.label}{ends[1]}; the numbers are in tables/{csv or name}.csv."
        if views:
            found.append(Figure(f"{name}-{setting.slug}{ends[0]}", setting.label + ends[1], alt, views, height))
    return found


def front_figures(results: Results) -> list[Figure]:
    """Returns of two objectives against each other, one picture per setting (three for three objectives; more cannot be drawn)."""
    known, found = looks(results.families), []
    for setting in results.settings:
        names = setting.objectives
        for a, b in combinations(range(len(names)), 2) if len(names) <= 3 else ():
            draw = partial(_front, pair=(a, b), known=known)
            ends = (f"-{a}{b}", f": {names[a]} and {names[b]}" if len(names) > 2 else "")
            found += _figures([setting], "front", "Regularized returns", draw, csv="fronts", ends=ends, height=420)
    return found


def _front(setting: Setting, split: str, *, pair: tuple[int, int], known: Mapping[str, Look]) -> dict[str, Any] | None:
    if not setting.drawn(split):
        return None
    curves = {label: _distinct(setting.mean_points(label, split)[:, pair]) for label in setting.drawn(split)}
    front, flat = setting.front(split), len(setting.objectives) == 2
    exact_K2 = front["points"][:, pair] if front is not None else np.empty((0, 2))
    everything = np.concatenate([*curves.values(), exact_K2])
    titles = [f"return of {setting.objectives[k]}" for k in pair]
    plot = _Plot(titles, _padded(everything[:, 0]), _padded(everything[:, 1]), known)
    for label, points in curves.items():
        w_WM = setting.of(label)[0].w_WM
        kl_W = np.array([cell.measured(split, "kl", "per_preference") for cell in setting.of(label)], dtype=float).mean(0)
        hover = [f"{_weights(w_M)}, KL {kl:.2f} nats" for w_M, kl in zip(w_WM, kl_W, strict=True)]
        hover = hover if len(points) > 1 else [f"every preference, KL {kl_W[0]:.2f} nats"]
        plot.draw(label, points, hover, line=flat and len(points) > 1)
        plot.data[-1] |= _whiskers(setting, split, label, pair, known[label], len(points))
    if front is not None:
        dots = {"size": 4, "color": INK, "opacity": 0.35}
        style = {"mode": "lines", "line": {"color": INK, "width": 2.5}} if flat else {"mode": "markers", "marker": dots}
        spread = range(0, len(exact_K2), max(1, len(exact_K2) // 8))
        hover = [_weights(w_M) for w_M in front["w"]]
        plot.draw(CEILING, exact_K2, hover, line=flat, spots=spread, style=style)
        plot.data.insert(0, plot.data.pop())  # under the others
    return plot.view()


def _weights(w_M: Sequence[float] | np.ndarray) -> str:
    """(0.7, 0.3) -> "w = (0.70, 0.30)"."""
    return "w = (" + ", ".join(f"{w:.2f}" for w in w_M) + ")"


def _whiskers(setting: Setting, split: str, label: str, pair: tuple[int, int], look: Look, count: int) -> dict[str, Any]:
    """Plotly's error bars for sampled returns; nothing where they are exact, or points were left out as unknown."""
    errors_WM = setting.mean_errors(label, split)
    if errors_WM is None or not np.isfinite(setting.mean_points(label, split)[:, pair]).all():
        return {}
    bars = {"type": "data", "color": look.pale(0.3), "thickness": 0.8, "width": 0}
    known = [[None if np.isnan(e) else round(float(e), 6) for e in errors_WM[:count, k]] for k in pair]
    return {f"error_{name}": {**bars, "array": values} for name, values in zip("xy", known, strict=True)}


def _distinct(points_W2: np.ndarray) -> np.ndarray:
    """One point where the preference changes nothing."""
    points_W2 = points_W2[np.isfinite(points_W2).all(1)]
    return points_W2[:1] if len(points_W2) and np.ptp(points_W2, axis=0).max() < 1e-9 else points_W2


def attainment_figures(results: Results) -> list[Figure]:
    """One picture per setting: attainment (where the optimum is not known, gain) at every judged preference, mean over seeds."""
    return _figures(results.settings, "attainment", "{Quality} against preference", partial(_attainment, results))


@lru_cache(maxsize=4)
def _heights(results: Results, exact: bool) -> tuple[float, float]:
    """The drawn range, the same for all settings of a kind: of attainments that of all methods but baselines, and not below -1."""
    alike = [s for s in results.settings if s.exact == exact]
    contest = [(s, label) for s in alike for label in s.labels if not exact or results.families[label] != "baseline"]
    values = np.concatenate([np.zeros(1), *[s.qualities(label, split) for s, label in contest for split in SPLITS]])
    return (max(-1.0, float(np.nanmin(values)) - 0.1), 1.13) if exact else _padded(values[np.isfinite(values)])


def _attainment(results: Results, setting: Setting, split: str) -> dict[str, Any] | None:
    w_WM = setting.cells[0].w_WM
    count = w_WM.shape[1]
    x_W = w_WM[:, 0] if count == 2 else count / (count - 1) * (1 - (w_WM**2).sum(1))
    title = f"weight of {setting.objectives[0]}" if count == 2 else "balance of the preference (0: one objective, 1: all alike)"
    plot = _Plot([title, setting.quality], (0.0, 1.0), _heights(results, setting.exact), looks(results.families))
    for label in setting.labels:
        values_W = setting.qualities(label, split)
        known_W = np.isfinite(values_W)
        if known_W.any():
            hover = [f"{_weights(w_M)}<br>{setting.quality} {v:.3f}" for w_M, v in zip(w_WM[known_W], values_W[known_W], strict=True)]
            plot.draw(label, np.stack([x_W, values_W], axis=1)[known_W], hover, line=count == 2)
    plot.levels(exact=setting.exact)
    return plot.view() if plot.data else None


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
    taus, known = [row["tau"] for row in next(iter(rows.values()))], looks(results.families)
    x = (taus[0], taus[-1]) if group.exact else _padded(np.array(taus))
    plot = _Plot([f"worst {group.quality}, {PROMPTS[split]}", "share of runs above"], x, (-0.03, 1.06), known)
    for label, mine in rows.items():
        if all(row["share_low"] is not None for row in mine):
            edge = [(row["tau"], row["share_high"]) for row in mine] + [(row["tau"], row["share_low"]) for row in mine[::-1]]
            band = {"mode": "lines", "fill": "toself", "fillcolor": known[label].pale(0.1), "line": {"width": 0, "color": "white"}}
            plot.trace(label, np.array(edge), band | {"hoverinfo": "skip", "hovertemplate": None}, [])
    for label, mine in rows.items():
        points = np.array([[row["tau"], row["share"]] for row in mine])
        spots = [int(np.abs(points[:, 1] - share).argmin()) for share in (0.5, 0.3, 0.7, 0.15, 0.85)]
        hover = [f"{row['share']:.0%} of runs above {row['tau']:.2f}" for row in mine]
        plot.draw(label, points, hover, line=True, spots=spots, style=plot.style(label, line=True) | {"mode": "lines"})
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
    totals, paths = np.log10([[row[f"{unit}_total"], max(row[f"{unit}_path"], 1.0)] for row in rows]).T
    worst = np.array([headline(row) for row in rows], dtype=float)
    edge = _heights(results, setting.exact)[0]
    shown = np.maximum(worst, edge)
    x = (min(paths.min(), totals.min()) - 0.25, max(totals.max(), paths.max()) + 0.45)
    y = (min(float(shown.min()) - 0.08, -0.08), 1.13) if setting.exact else _padded(np.append(shown, 0.0))
    title = f"worst {setting.quality}, {PROMPTS[split]}"
    plot = _Plot([f"{unit} for training and search (log scale)", title], x, y, looks(results.families))
    for row, total, path, quality in zip(rows, totals, paths, worst, strict=True):
        ends = np.array([[path, quality], [total, quality]])
        hover = [f"critical path: {row[f'{unit}_path']:,.0f} {unit}", f"in total: {row[f'{unit}_total']:,.0f} {unit}"]
        style = plot.style(row["method"], line=True)
        filled, color = style["marker"]["symbol"], style["marker"]["color"]
        hollow = filled if filled.endswith("open") else f"{filled}-open"
        style["marker"] |= {"symbol": [hollow, filled], "size": 10, "line": {"width": 1.5, "color": color}}
        plot.draw(row["method"], ends, hover, line=True, spots=[1], style=style)
        plot.data[-1]["x"] = [round(float(10**value), 6) for value in (path, total)]
    plot.levels(exact=setting.exact)
    plot.layout["xaxis"] |= {"type": "log", "dtick": 1 if x[1] - x[0] > 2 else "D2", "tickformat": "~s"}
    return plot.view()


def loss_figures(results: Results) -> list[Figure]:
    """Stacked bars: learning, composition and remainder, mean over preferences and seeds."""
    table = loss_table(results)

    def end(row: Mapping[str, Any]) -> float:
        return sum(max(row[part] or 0.0, 0.0) for part in LOSS_PARTS)

    starts = [sum(min(row[part] or 0.0, 0.0) for part in LOSS_PARTS) for row in table.rows]
    span = (1.05 * min([*starts, 0.0]), 1.16 * max([*map(end, table.rows), 0.05]))
    found = []
    for setting in results.settings:
        rows = [(row, end(row)) for row in table.placed.get((setting.label, setting.headline), ())][::-1]
        draw = lambda setting, split, rows=rows: _loss(rows, span) if rows and split == setting.headline else None  # noqa: E731
        found += _figures([setting], "loss", "Loss by origin", draw, height=120 + 46 * len(rows))
    return found


def _loss(rows: Sequence[tuple[Mapping[str, Any], float]], span: tuple[float, float]) -> dict[str, Any]:
    enough = 0.13 * (span[1] - span[0])  # a narrower bar has no room for its number
    data = []
    for part in LOSS_PARTS:
        names, values = [escape(row["method"]) for row, _ in rows], [row[part] for row, _ in rows]
        if any(v is not None for v in values):
            text = [minus(f"{v:.2f}") if v is not None and abs(v) >= enough else "" for v in values]
            bar: dict[str, Any] = {"type": "bar", "orientation": "h", "name": part, "y": names, "x": values, "text": text}
            bar |= {"textposition": "inside", "insidetextanchor": "middle", "textangle": 0, "constraintext": "none"}
            bar["marker"] = {"color": LOSS_COLORS[part], "line": {"color": "white", "width": 1}}
            data.append(bar | {"hovertemplate": f"%{{y}}<br>{part}: %{{x:.3f}}<extra></extra>"})
    title = f"loss of attainment, {PROMPTS[rows[0][0]['prompts']]}"
    shape = {**frame(), "barmode": "relative", "bargap": 0.35, "margin": {"l": 10, "r": 12, "t": 8, "b": 46}}
    shape["xaxis"] = axis(title, range=list(span), zeroline=True, zerolinecolor=MUTED)
    shape["yaxis"] = axis("", automargin=True, showgrid=False, ticks="", tickfont={"size": 12, "color": INK})
    whole = {"xanchor": "left", "xshift": 4, "showarrow": False, "font": {"size": 12, "color": INK}}  # at the end of its bar
    losses = [f"<b>{minus(format(row['loss'], '.2f'))}</b>" for row, _ in rows]
    shape["annotations"] = [
        {"x": end, "y": escape(row["method"]), "text": text, **whole} for (row, end), text in zip(rows, losses, strict=True)
    ]
    return {"data": data, "layout": shape}


MAKERS = (front_figures, attainment_figures, profile_figures, cost_figures, loss_figures)
FIGURES = dict(zip(("fronts", "attainment", "profiles", "cost", "loss"), MAKERS, strict=True))  # by the anchor of their section


# The same as SVG files


@lru_cache(maxsize=4)
def template(name: str, **filters: Any) -> Any:
    """A template of this folder. Values are escaped where they are shown, and JSON for a script by `tojson`."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": True}
    environment.filters |= {"minus": minus, "prompts": PROMPTS.__getitem__, **filters}
    return environment.get_template(name)


def to_svg(panels: Sequence[tuple[str, Mapping[str, Any]]], *, alt: str) -> str:
    """Titled scatter figures side by side as one SVG text. `alt` is its description for those who do not see it."""
    axes = [(view["layout"]["xaxis"], view["layout"]["yaxis"]) for _, view in panels]
    drawn = [(*panel, _scale(x, 0, PLOT[0]), _scale(y, PLOT[1], 0)) for panel, (x, y) in zip(panels, axes, strict=True)]
    return template("panels.svg.j2").render(panels=drawn, alt=alt, plot=PLOT, along=_along, **PALETTE) + "\n"


def _along(trace: Mapping[str, Any], x: Mapping[str, Any], y: Mapping[str, Any]) -> list[tuple[float, float]]:
    """The points of a trace in pixels."""
    return list(zip(map(x["at"], trace["x"]), map(y["at"], trace["y"]), strict=True))


def _scale(axis: Mapping[str, Any], start: float, end: float) -> dict[str, Any]:
    """Data to pixels (`at`), as plotly reads an axis (decades where logarithmic); `ticks`: (pixel, text) of round values."""
    low, high = axis["range"]
    log = axis.get("type") == "log"

    def at(value: float, *, ready: bool = False) -> float:
        """`ready`: already in decades, as annotations are."""
        return round(start + (end - start) * ((log10(value) if log and not ready else value) - low) / (high - low), 2)

    if log:
        values = [digit * 10.0**decade for decade in range(floor(low), ceil(high) + 1) for digit in (1, 2, 5)]
        return {"at": at, "ticks": [(at(v), short_count(v)) for v in values if low <= log10(v) <= high]}
    step = next(s * 10.0**e for e in range(-6, 7) for s in (1, 2, 5) if (high - low) / (s * 10.0**e) <= 6)
    values = [k * step for k in range(ceil(low / step), floor(high / step) + 1)]
    return {"at": at, "ticks": [(at(v), minus(f"{v:g}")) for v in values]}
