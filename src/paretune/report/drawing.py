"""SVG files of figures, with a label beside every curve, for papers, slides and the README; and the templates of every page.

The page itself draws the same descriptions in the browser, where a picture has the width that there is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import ceil, floor, log10
from pathlib import Path
from typing import Any

import numpy as np

from paretune.report.data import PROMPTS
from paretune.report.looks import SHAPES, Look
from paretune.report.tables import CEILING, minus, short_count, signed

__all__ = ["PALETTE", "Label", "Series", "place", "template", "to_svg"]

INK, MUTED, GRID, EDGE = "#1b1f24", "#6b7480", "#e8ebef", "#b9c0c9"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, 'Liberation Sans', sans-serif"
PALETTE = {"ink": INK, "muted": MUTED, "grid": GRID, "edge": EDGE, "font": FONT}


@lru_cache(maxsize=8)
def template(name: str, **filters: Any) -> Any:
    """A template of this folder. Values are escaped where they are shown, and JSON for a script by `tojson`."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "ensure_ascii": True, "separators": (",", ":")}
    environment.filters |= {"minus": minus, "signed": signed, "prompts": PROMPTS.__getitem__, **filters}
    return environment.get_template(name)


# Labels: where to put a name so that it covers neither another one nor a curve

PLOT = (330, 330)  # the plot area in pixels
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


# A picture


def to_svg(panels: Sequence[tuple[str, Mapping[str, Any]]], looks: Mapping[str, Look], *, alt: str) -> str:
    """Titled figures side by side as one SVG text. `alt` is its description for those who do not see it."""
    drawn = [_panel(title, view, looks) for title, view in panels]
    return template("panels.svg.j2").render(panels=drawn, alt=alt, plot=PLOT, shapes=SHAPES, **PALETTE) + "\n"


def _panel(title: str, view: Mapping[str, Any], looks: Mapping[str, Look]) -> dict[str, Any]:
    """What the template draws of a view: everything in pixels, y downwards."""
    x, y = _scale(view["x"], 0, PLOT[0]), _scale(view["y"], PLOT[1], 0)
    series = []
    for one in view["series"]:
        points = list(zip(map(x["at"], one["x"]), map(y["at"], one["y"]), strict=True))
        error, band = one.get("error", {}), one.get("band")
        ends = zip(error.get("x") or [0] * len(points), error.get("y") or [0] * len(points), one["x"], one["y"], strict=True)
        bars = [(x["at"](a - da), x["at"](a + da), y["at"](b - db), y["at"](b + db)) for da, db, a, b in ends] if error else []
        edge = [(a, y["at"](v)) for (a, _), v in zip(points, band[0], strict=True)] if band else []
        edge += [(a, y["at"](v)) for (a, _), v in zip(points[::-1], band[1][::-1], strict=True)] if band else []
        look = looks.get(one["name"])
        series.append({**one, "points": points, "bars": bars, "edge": edge, "look": look, "color": look.hex if look else INK})
    levels = [(y["at"](level["at"]), level["name"]) for level in view["levels"]]
    right = np.array(PLOT[0])
    named = [np.array([(right - 48.0, at - 10.0), (48.0, 10.0)]) for at, name in levels if name]
    lines = [np.array([(right / 2, at), (right / 2, 0.0)]) for at, name in levels if name]
    labels = [_shown(label, names, looks) for label, names in _labels(series, [*named, *lines])]
    titles = {"x_title": view["x"]["title"], "y_title": view["y"]["title"], "title": title}
    return {**titles, "x": x["ticks"], "y": y["ticks"], "series": series, "levels": levels, "labels": labels}


def _labels(series: Sequence[Mapping[str, Any]], taken: Sequence[np.ndarray]) -> Iterable[tuple[Label, list[str]]]:
    """A label beside each curve, with the names that it stands for: curves that cannot be told apart share one."""
    shared: list[tuple[list[str], Mapping[str, Any], np.ndarray, tuple[float, ...]]] = []
    for one in series:
        points, below = np.array(one["points"], dtype=float).reshape(-1, 2), tuple(v for v in one.get("below", ()) if v is not None)
        if not len(points):
            continue
        alike = (other for other in shared if other[2].shape == points.shape and other[3] == below)
        twin = next((other for other in alike if np.abs(other[2] - points).max() < 1.5), None)
        if twin:
            twin[0].append(one["name"])
        else:
            shared.append(([one["name"]], one, points, below))
    placed, names = [], {}
    for mine, one, points, below in shared:
        n = len(points)  # unless it is told where, the middle one first: there methods differ most
        places = {n // 2, n // 3, 2 * n // 3, n // 6, 5 * n // 6, 0, n - 1} & set(range(n))
        spots = list(one.get("spots", ())) or sorted(places, key=lambda i: abs(i - n // 2))
        text = ", ".join("exact front" if name == CEILING else name for name in mine)
        text += f" {minus(f'{min(below):.2f}')}" if below else ""
        names[text] = mine
        placed.append(Series(text, points[spots], _dense(points) if one["line"] else points))
    return [(label, names[label.name]) for label in place(placed, width=PLOT[0], height=PLOT[1], taken=taken)]


def _shown(label: Label, names: Sequence[str], looks: Mapping[str, Look]) -> dict[str, Any]:
    known = [looks[name] for name in names if name in looks]
    marks, width = [(look.hex, look.mark) for look in known], GLYPH * (len(label.name) + 2 * len(known)) + 4
    return {"text": label.name, "marks": marks, "x": label.x, "y": label.y, "anchor": label.anchor, "width": width}


def _scale(axis: Mapping[str, Any], start: float, end: float) -> dict[str, Any]:
    """Data to pixels (`at`), (decades where the axis is logarithmic); `ticks`: (pixel, text) of round values."""
    log = axis["log"]
    low, high = map(log10, axis["range"]) if log else axis["range"]

    def at(value: float) -> float:
        return round(start + (end - start) * ((log10(value) if log else value) - low) / (high - low), 2)

    if log:
        values = [digit * 10.0**decade for decade in range(floor(low), ceil(high) + 1) for digit in (1, 2, 5)]
        return {"at": at, "ticks": [(at(v), short_count(v)) for v in values if low <= log10(v) <= high]}
    least = floor(log10((high - low) / 6))
    step = next(s * 10.0**e for e in (least, least + 1) for s in (1, 2, 5) if (high - low) / (s * 10.0**e) <= 6)
    values = [k * step for k in range(ceil(low / step), floor(high / step) + 1)]
    return {"at": at, "ticks": [(at(v), minus(f"{v:g}")) for v in values]}
