"""What pictures are made of: one look per method, axes and traces for plotly, and labels placed beside what they name.

Colors are those of Okabe and Ito (2008) without the yellow that vanishes on white; every method also has a marker of its own, and a
dash once the colors come round again, so that methods are told apart without color, the same in the page, the pictures and the
terminal. Baselines are gray: they are the scale, not the contest. The exact front is black.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np

__all__ = [
    "COLORS",
    "EXACT",
    "FONT",
    "INK",
    "MUTED",
    "PLOT",
    "Label",
    "Look",
    "Series",
    "anchors",
    "axis",
    "dense",
    "dots",
    "frame",
    "label_notes",
    "layout",
    "level",
    "looks",
    "padded",
    "pixels",
    "place",
    "preference_text",
    "style",
    "trace",
]

# Looks

INK = "#1b1f24"
MUTED = "#6b7480"
EXACT = "#1b1f24"

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
GRAYS = ("#6b7480", "#8a929c", "#59616b", "#a3a9b1")
MARKS = (
    ("circle", "●"),
    ("square", "■"),
    ("diamond", "◆"),
    ("triangle-up", "▲"),
    ("triangle-down", "▼"),
    ("star", "★"),
    ("hexagon", "⬢"),
    ("pentagon", "⬟"),
    ("triangle-right", "▶"),
)  # more than colors, so that a table, which shows no dashes, tells more than seven methods apart, too
GRAY_MARKS = (("x-thin-open", "×"), ("circle-open", "○"), ("square-open", "□"), ("diamond-open", "◇"), ("triangle-up-open", "△"))
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Look:
    """Color (hex), marker (plotly's name and a character) and dash (plotly's name) of one method."""

    color: str
    marker: str
    mark: str
    dash: str


def looks(families: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Label -> look, given label -> family ("baseline" or another) in a fixed order. The same labels always look the same."""
    found: dict[str, Look] = {}
    counts = {True: 0, False: 0}
    for label, family in dict(families).items():
        gray = family == "baseline"
        n = counts[gray]
        counts[gray] += 1
        colors, marks = (GRAYS, GRAY_MARKS) if gray else (COLORS, MARKS)
        marker, mark = marks[n % len(marks)]
        found[label] = Look(colors[n % len(colors)], marker, mark, DASHES[n // len(colors) % len(DASHES)])
    return found


# Axes and traces

PLOT = (330, 330)  # the plot area that labels are placed for, in pixels; a larger one only spreads them
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"


def preference_text(w_M: Sequence[float] | np.ndarray) -> str:
    """(0.7, 0.3) -> "w = (0.70, 0.30)"."""
    return "w = (" + ", ".join(f"{w:.2f}" for w in w_M) + ")"


def trace(name: str, points: np.ndarray, style: Mapping[str, Any], hover: Sequence[str]) -> dict[str, Any]:
    """One series of (n, 2) points; `hover` says more of each."""
    return {
        "type": "scatter",
        "name": name,
        "x": [round(float(x), 6) for x in points[:, 0]],
        "y": [round(float(y), 6) for y in points[:, 1]],
        "text": list(hover),
        "hovertemplate": f"<b>{escape(name)}</b><br>%{{text}}<br>(%{{x:.3f}}, %{{y:.3f}})<extra></extra>",
        **style,
    }


def style(look: Look, *, line: bool, large: bool = False) -> dict[str, Any]:
    """A method's look in plotly's words."""
    size = 11 if large else 7
    edge = {"width": 2 if "open" in look.marker else 0.8, "color": look.color if "open" in look.marker else "white"}
    marker = {"symbol": look.marker, "size": size, "color": look.color, "line": edge}
    return {
        "mode": "lines+markers" if line else "markers",
        "line": {"color": look.color, "width": 1.8, "dash": look.dash},
        "marker": marker,
    }


def dots() -> dict[str, Any]:
    """The look of a front that is a cloud of points."""
    return {"size": 4, "color": EXACT, "opacity": 0.35}


def anchors(n: int) -> list[int]:
    """A few places along a curve, the middle one first: there methods differ most."""
    return sorted({n // 2, n // 3, 2 * n // 3, n // 6, 5 * n // 6, 0, n - 1} & set(range(n)), key=lambda i: abs(i - n // 2))


def dense(points: np.ndarray, count: int = 48) -> np.ndarray:
    """`count` points along the line through `points`, evenly spaced on it."""
    if len(points) < 2:
        return points
    span = np.ptp(points, axis=0)
    along = np.concatenate([[0.0], np.cumsum(np.hypot(*(np.diff(points, axis=0) / np.where(span > 0, span, 1.0)).T))])
    t = np.linspace(0.0, along[-1], count)
    return np.stack([np.interp(t, along, points[:, k]) for k in (0, 1)], axis=1)


def padded(values: np.ndarray) -> tuple[float, float]:
    """An axis range with some room at both ends."""
    low, high = float(np.min(values)), float(np.max(values))
    pad = 0.09 * ((high - low) or 1.0)
    return low - pad, high + pad


def pixels(points: np.ndarray, x: tuple[float, float], y: tuple[float, float]) -> np.ndarray:
    """(n, 2) data -> (n, 2) pixels from the top left of the plot."""
    across = (points[:, 0] - x[0]) / (x[1] - x[0]) * PLOT[0]
    down = (y[1] - points[:, 1]) / (y[1] - y[0]) * PLOT[1]
    return np.stack([across, down], axis=1)


def level(y: float, color: str, width: float) -> dict[str, Any]:
    """A horizontal line across the plot."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "layer": "between",
        "line": {"color": color, "width": width},
    }


def frame() -> dict[str, Any]:
    """What all figures share."""
    return {
        "autosize": True,
        "showlegend": False,
        "hovermode": "closest",
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "font": {"family": FONT, "size": 12, "color": INK},
        "margin": {"l": 58, "r": 14, "t": 8, "b": 50},
        "hoverlabel": {"bgcolor": "white", "font": {"size": 13, "color": INK}},
        "annotations": [],
    }


def axis(title: str) -> dict[str, Any]:
    """What all axes share."""
    return {
        "title": {"text": title, "font": {"size": 13, "color": INK}, "standoff": 8},
        "gridcolor": "#e8ebef",
        "zeroline": False,
        "linecolor": "#b9c0c9",
        "showline": True,
        "ticks": "outside",
        "tickcolor": "#b9c0c9",
        "ticklen": 4,
        "tickfont": {"size": 12, "color": MUTED},
    }


def layout(titles: Sequence[str], x: tuple[float, float], y: tuple[float, float], notes: list[dict[str, Any]]) -> dict[str, Any]:
    """A plot with titled axes, ranges and labels."""
    axes = {"xaxis": {**axis(titles[0]), "range": list(x)}, "yaxis": {**axis(titles[1]), "range": list(y)}}
    return {**frame(), **axes, "annotations": notes}


# Labels: where to put a name so that it covers neither another one nor a curve

GLYPH, LINE = 6.6, 15.0  # width of a letter and height of a line in pixels, at 12 px
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


def place(series: Sequence[Series], *, width: float, height: float, extra: int = 2, taken: Sequence[np.ndarray] = ()) -> list[Label]:
    """One label per series inside a width x height plot; greedy, the longest names first. `extra` letters stand for the marker.

    `taken` are boxes that stay free: (2, 2), center and half size. A series for whose label there is no free place gets none: the key
    beside the picture still names it.
    """
    ink = np.concatenate([s.ink for s in series]) if series else np.empty((0, 2))
    boxes = list(taken)
    labels = []
    for one in sorted(series, key=lambda s: -len(s.name)):
        half = np.array([GLYPH * (len(one.name) + extra) / 2 + 3, LINE / 2 + 1])
        anchors = np.repeat(one.anchors, len(OFFSETS), axis=0)
        offsets = np.tile(OFFSETS, (len(one.anchors), 1))
        aside = np.where(np.abs(offsets[:, 0]) > 4, np.sign(offsets[:, 0]) * half[0] * np.minimum(1, np.abs(offsets[:, 0]) / 12), 0.0)
        centers = anchors + offsets + np.stack([aside, np.zeros_like(aside)], axis=1)
        others = np.concatenate([np.empty((0, 2)), *[s.ink for s in series if s is not one]])
        outside = (centers - half < 0).any(1) | (centers + half > (width, height)).any(1)
        for box in boxes:
            outside |= (np.abs(centers - box[0]) < half + box[1]).all(1)
        free = np.flatnonzero(~outside)
        if len(free):
            best = free[_best(centers[free], anchors[free], half, ink, others)]
            boxes.append(np.stack([centers[best], half]))
            (x, y), (ax, ay) = centers[best], anchors[best]
            labels.append(Label(one.name, float(x), float(y), (float(ax), float(ay))))
    return labels


def _best(centers: np.ndarray, anchors: np.ndarray, half: np.ndarray, ink: np.ndarray, others: np.ndarray) -> int:
    """The place that covers least, points to the least crowded spot from nearby, and whose leader crosses fewest other curves."""

    def gaps(places: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(places[:, :1] - others[:, 0]), np.abs(places[:, 1:] - others[:, 1])).min(1)

    covered = ((np.abs(centers[:, :1] - ink[:, 0]) < half[0]) & (np.abs(centers[:, 1:] - ink[:, 1]) < half[1])).sum(1)
    costs = 3.0 * covered + 0.05 * np.hypot(*(centers - anchors).T)
    if not len(others):
        return int(costs.argmin())
    spots, which = np.unique(anchors, axis=0, return_inverse=True)
    costs = costs + (12.0 / (1.0 + gaps(spots)))[which.ravel()]
    tried = np.argsort(costs, kind="stable")[:TRIED]
    for share in np.linspace(0.25, 0.75, 5):
        costs[tried] += 2.0 * (gaps(anchors[tried] + share * (centers - anchors)[tried]) < 4)
    return int(tried[costs[tried].argmin()])


def label_notes(
    series: Sequence[Series], x: tuple[float, float], y: tuple[float, float], known: Mapping[str, Look], *, taken: Sequence[np.ndarray] = ()
) -> list[dict[str, Any]]:
    """Labels as plotly annotations: the arrow's head at the place that is named, the text so many pixels away."""
    notes = []
    for label in place(series, width=PLOT[0], height=PLOT[1], taken=taken):
        first = label.name.split(", ")[0]
        marks = "".join(f'<span style="color:{known[n].color}">{known[n].mark}</span>' for n in label.name.split(", ") if n in known)
        dx, dy = label.x - label.anchor[0], label.y - label.anchor[1]
        notes.append(
            {
                "x": x[0] + label.anchor[0] / PLOT[0] * (x[1] - x[0]),
                "y": y[1] - label.anchor[1] / PLOT[1] * (y[1] - y[0]),
                "ax": dx,
                "ay": dy,
                "text": f"{marks} {escape(label.name)}" if marks else f"<b>{label.name}</b>",
                "name": label.name,
                "showarrow": True,
                "arrowhead": 0,
                "arrowwidth": 0.8,
                "arrowcolor": known[first].color if first in known else EXACT,
                "standoff": 5,
                "font": {"size": 12, "color": INK},
                "bgcolor": "rgba(255,255,255,0.7)",
                "borderpad": 1,
            }
        )
    return notes
