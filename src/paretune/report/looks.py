"""The color and the marker of every method: the same in every report, on the page, in pictures and in the terminal.

Shipped methods have a fixed place in `SHIPPED`, to whose end new ones are added; the first twelve, compared most, have a color each.
A plug-in gets its look from the hash of its name. Baselines are gray: they are the scale, not the contest. Variants of one method share its
color. What a report holds decides two things only: a variant, or a plug-in, that would look like a method before it takes the next marker,
and methods that share a marker get different dashes, so that curves are told apart without color.

Every color has a light and a dark form with a contrast of at least 3 to the page. Twelve of them, made from those of Okabe and Ito (2008).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["COLORS", "MARKERS", "SHAPES", "SHIPPED", "Look", "looks", "looks_by_place"]

COLORS = (  # on white, on black
    *(("#0072B2", "#5AB4EE"), ("#D55E00", "#FF9248"), ("#008A66", "#35CBA0"), ("#C4568F", "#EE93C4")),
    *(("#AD7B00", "#F0BC3A"), ("#7A4FA3", "#BC97EA"), ("#2B93CC", "#A3D8FA"), ("#B3202C", "#FF7B80")),
    *(("#00808A", "#3CC6D2"), ("#6B7A00", "#BCCB3E"), ("#8A5A34", "#D8A881"), ("#3C4199", "#9DA7FF")),
    *(("#6B7480", "#98A3AF"), ("#565E68", "#B4BDC7"), ("#7F8893", "#818B96")),
)
GRAYS = 3  # the last colors
SHAPES = {  # marker -> its outline in units of a radius, and the character that stands for it in a terminal
    "circle": ("M1,0A1,1 0 1,1 -1,0A1,1 0 1,1 1,0Z", "●"),
    "square": ("M-.88-.88H.88V.88H-.88Z", "■"),
    "diamond": ("M0-1.25 1.25 0 0 1.25-1.25 0Z", "◆"),
    "triangle-up": ("M0-1.15 1.1.85H-1.1Z", "▲"),
    "triangle-down": ("M0 1.15 1.1-.85H-1.1Z", "▼"),
    "star": ("M0-1.3.33-.46 1.24-.4.54.18.76 1.05 0 .57-.76 1.05-.54.18-1.24-.4-.33-.46Z", "★"),
    "hexagon": ("M0-1.1.95-.55V.55L0 1.1-.95.55V-.55Z", "⬢"),
    "pentagon": ("M0-1.1 1.05-.34.65.89H-.65L-1.05-.34Z", "⬟"),
    "triangle-right": ("M1.15 0-.85 1.1V-1.1Z", "▶"),
    "triangle-left": ("M-1.15 0 .85 1.1V-1.1Z", "◀"),
    "plus": ("M-.4-1.15H.4V-.4H1.15V.4H.4V1.15H-.4V.4H-1.15V-.4H-.4Z", "✚"),
    "ring": ("M1,0A1,1 0 1,1 -1,0A1,1 0 1,1 1,0ZM.45,0A.45.45 0 1,0 -.45,0A.45.45 0 1,0 .45,0Z", "○"),
    "cross": ("M-1.1-.75-.75-1.1 0-.35.75-1.1 1.1-.75.35 0 1.1.75.75 1.1 0 .35-.75 1.1-1.1.75-.35 0Z", "×"),
    "frame": ("M-.95-.95H.95V.95H-.95ZM-.42-.42V.42H.42V-.42Z", "□"),
    "kite": ("M0-1.3 1.3 0 0 1.3-1.3 0ZM0-.62-.62 0 0 .62.62 0Z", "◇"),
    "tent": ("M0-1.2 1.2.9H-1.2ZM0-.25-.45.48H.45Z", "△"),
    "arrow": ("M0 1.3 1.1-.5H.4V-1.3H-.4V-.5H-1.1Z", "↓"),  # a value below the picture; no method's
}
FULL = tuple(list(SHAPES)[:11])
HOLLOW = ("ring", "cross", "frame", "kite", "tent")  # of baselines
MARKERS = (*FULL, *HOLLOW)
DASHES = ("", "7 4", "2 3", "8 3 2 3")

SHIPPED = (
    *("bridge", "conditioned", "experts logit", "experts parameter", "linear", "emorl-shared"),
    *("emorl", "prompted", "experts hidden", "contextual", "experts factor", "router"),
    *("extended", "distilled", "hidden-layer", "rmod", "warm-sweep", "mod-divergence"),
    *("calibrated", "max-min", "placed", "static-gates", "ties", "dare"),
    *("bone-soup", "adaptive", "gradient", "lagrangian", "log-sum", "modpo"),
    *("normalized", "ols", "product", "tchebycheff"),
)
BASELINES = {
    "reference": (12, "cross"),
    "uniform": (13, "ring"),
    "expert": (14, "frame"),
    **{f"expert {k}": (14, marker) for k, marker in enumerate(("frame", "kite", "tent"))},
}
FIXED = BASELINES | {name: (k % 12, FULL[(k + 5 * (k // 12)) % len(FULL)]) for k, name in enumerate(SHIPPED)}
TOLD_BY = ("mixing", "objective")  # fields whose values are methods of their own here


@dataclass(frozen=True)
class Look:
    """`color` is a place in COLORS, `marker` a key of SHAPES, `dash` an SVG dash pattern, "" for none."""

    color: int
    marker: str
    dash: str = ""

    @property
    def hex(self) -> str:
        return COLORS[self.color][0]

    @property
    def mark(self) -> str:
        return SHAPES[self.marker][1]

    @property
    def css(self) -> str:
        """The color in a page, light or dark."""
        return f"var(--m{self.color})"

    def pale(self, opacity: float) -> str:
        return f"color-mix(in srgb, {self.css} {100 * opacity:.3g}%, transparent)"


def looks(methods: Mapping[str, Mapping[str, Any]], baselines: Iterable[str] = ()) -> dict[str, Look]:
    """Label -> look, given label -> method (its name and settings) and the labels of baselines, in a fixed order."""
    gray, found, taken = set(baselines), {}, set()
    for label in sorted(methods, key=lambda label: (_key(methods[label]) not in FIXED, label)):
        color, marker = _own(methods[label], label in gray)
        markers = HOLLOW if marker in HOLLOW else FULL
        start = markers.index(marker)
        turns = [(color, markers[(start + n) % len(markers)]) for n in range(len(markers))]
        more = [((color + n) % (len(COLORS) - GRAYS), marker) for n in range(len(COLORS))]  # a variant more than there are markers
        pair = next((pair for pair in (*turns, *more) if pair not in taken), turns[0])
        taken.add(pair)
        found[label] = pair
    used: dict[str, int] = {}
    dashed = {}
    for label in methods:
        marker = found[label][1]
        dashed[label] = Look(*found[label], DASHES[used.get(marker, 0) % len(DASHES)])
        used[marker] = used.get(marker, 0) + 1
    return dashed


def looks_by_place(names: Iterable[str]) -> dict[str, Look]:
    """Name -> look of things that are no methods, such as the experts of one family."""
    return {name: Look(n % (len(COLORS) - GRAYS), FULL[n % len(FULL)]) for n, name in enumerate(names)}


def _key(method: Mapping[str, Any]) -> str:
    name = str(method["name"])
    return next((key for field in TOLD_BY if (key := f"{name} {method.get(field)}") in FIXED), name)


def _own(method: Mapping[str, Any], baseline: bool) -> tuple[int, str]:
    key = _key(method)
    if key in FIXED:
        return FIXED[key]
    number = int(hashlib.sha256(key.encode()).hexdigest()[:12], 16)
    if baseline:
        return len(COLORS) - GRAYS + number % GRAYS, HOLLOW[number // GRAYS % len(HOLLOW)]
    count = len(COLORS) - GRAYS
    return number % count, FULL[number // count % len(FULL)]
