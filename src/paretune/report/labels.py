"""Names next to what they name: where to put a label in a picture so that it covers neither another label nor a curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Label", "Series", "place"]

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
    """`x, y` is the centre of the text, `anchor` the place that it names; pixels, y downwards."""

    name: str
    x: float
    y: float
    anchor: tuple[float, float]


def place(series: Sequence[Series], *, width: float, height: float, extra: int = 2, taken: Sequence[np.ndarray] = ()) -> list[Label]:
    """One label per series inside a width x height plot; greedy, the longest names first. `extra` letters stand for the marker.

    `taken` are boxes that stay free: (2, 2), centre and half size. A series for whose label there is no free place gets none: the key
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
        centres = anchors + offsets + np.stack([aside, np.zeros_like(aside)], axis=1)
        others = np.concatenate([np.empty((0, 2)), *[s.ink for s in series if s is not one]])
        outside = (centres - half < 0).any(1) | (centres + half > (width, height)).any(1)
        for box in boxes:
            outside |= (np.abs(centres - box[0]) < half + box[1]).all(1)
        free = np.flatnonzero(~outside)
        if len(free):
            best = free[_best(centres[free], anchors[free], half, ink, others)]
            boxes.append(np.stack([centres[best], half]))
            (x, y), (ax, ay) = centres[best], anchors[best]
            labels.append(Label(one.name, float(x), float(y), (float(ax), float(ay))))
    return labels


def _best(centres: np.ndarray, anchors: np.ndarray, half: np.ndarray, ink: np.ndarray, others: np.ndarray) -> int:
    """The place that covers least, points to the least crowded spot from nearby, and whose leader crosses fewest other curves."""

    def gaps(places: np.ndarray) -> np.ndarray:
        return np.maximum(np.abs(places[:, :1] - others[:, 0]), np.abs(places[:, 1:] - others[:, 1])).min(1)

    covered = ((np.abs(centres[:, :1] - ink[:, 0]) < half[0]) & (np.abs(centres[:, 1:] - ink[:, 1]) < half[1])).sum(1)
    costs = 3.0 * covered + 0.05 * np.hypot(*(centres - anchors).T)
    if not len(others):
        return int(costs.argmin())
    spots, which = np.unique(anchors, axis=0, return_inverse=True)
    costs = costs + (12.0 / (1.0 + gaps(spots)))[which.ravel()]
    tried = np.argsort(costs, kind="stable")[:TRIED]
    for share in np.linspace(0.25, 0.75, 5):
        costs[tried] += 2.0 * (gaps(anchors[tried] + share * (centres - anchors)[tried]) < 4)
    return int(tried[costs[tried].argmin()])
