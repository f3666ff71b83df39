"""The parts that plotly figures are made of: axes, traces, and labels placed beside what they name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from paretune.report.labels import Series, place
from paretune.report.palette import EXACT, INK, MUTED, Look

__all__ = [
    "FONT",
    "PLOT",
    "anchors",
    "label_notes",
    "axis",
    "dense",
    "dots",
    "frame",
    "layout",
    "level",
    "padded",
    "pixels",
    "preference_text",
    "style",
    "trace",
]

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
    edge = {"width": 2 if "open" in look.marker else 0.8, "color": look.colour if "open" in look.marker else "white"}
    marker = {"symbol": look.marker, "size": size, "color": look.colour, "line": edge}
    return {
        "mode": "lines+markers" if line else "markers",
        "line": {"color": look.colour, "width": 1.8, "dash": look.dash},
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


def label_notes(
    series: Sequence[Series], x: tuple[float, float], y: tuple[float, float], known: Mapping[str, Look], *, taken: Sequence[np.ndarray] = ()
) -> list[dict[str, Any]]:
    """Labels as plotly annotations: the arrow's head at the place that is named, the text so many pixels away."""
    notes = []
    for label in place(series, width=PLOT[0], height=PLOT[1], taken=taken):
        first = label.name.split(", ")[0]
        marks = "".join(f'<span style="color:{known[n].colour}">{known[n].mark}</span>' for n in label.name.split(", ") if n in known)
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
                "arrowcolor": known[first].colour if first in known else EXACT,
                "standoff": 5,
                "font": {"size": 12, "color": INK},
                "bgcolor": "rgba(255,255,255,0.7)",
                "borderpad": 1,
            }
        )
    return notes


def level(y: float, colour: str, width: float) -> dict[str, Any]:
    """A horizontal line across the plot."""
    return {
        "type": "line",
        "xref": "paper",
        "x0": 0,
        "x1": 1,
        "y0": y,
        "y1": y,
        "layer": "between",
        "line": {"color": colour, "width": width},
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
