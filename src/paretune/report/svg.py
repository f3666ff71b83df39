"""The scatter figures as small SVG files, for papers, slides and the README: the same descriptions that the page gives to plotly.

Only what `plot.py` makes is understood: lines, bands and markers, labels with leaders, horizontal lines, linear and logarithmic axes.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape, unescape
from math import cos, log10, pi, sin
from typing import Any

from paretune.report.plot import FONT, INK, MUTED, PLOT

__all__ = ["to_svg"]

LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 52
DASH = {"solid": "", "dash": "7 4", "dot": "2 3", "dashdot": "7 3 2 3"}
# Corners of each marker in units of its radius.
CORNERS = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "diamond": [(0, -1.2), (1.2, 0), (0, 1.2), (-1.2, 0)],
    "triangle-up": [(0, -1.1), (1.05, 0.8), (-1.05, 0.8)],
    "triangle-down": [(0, 1.1), (1.05, -0.8), (-1.05, -0.8)],
    "star": [(r * sin(k * pi / 5), -r * cos(k * pi / 5)) for k in range(10) for r in [1.25 if k % 2 == 0 else 0.55]],
    "hexagon": [(sin(k * pi / 3), -cos(k * pi / 3)) for k in range(6)],
    "pentagon": [(sin(k * 2 * pi / 5), -cos(k * 2 * pi / 5)) for k in range(5)],
    "triangle-right": [(1.15, 0.0), (-0.75, 1.0), (-0.75, -1.0)],
}


def to_svg(panels: Sequence[tuple[str, Mapping[str, Any]]], *, alt: str) -> str:
    """Titled plotly descriptions side by side as one SVG text. `alt` is its description for those who do not see it."""
    width, height = LEFT + PLOT[0] + RIGHT, TOP + PLOT[1] + BOTTOM
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width * len(panels)} {height}" width="{width * len(panels)}" '
        f'height="{height}" role="img" font-family="{escape(FONT, quote=True)}" font-size="12">',
        f"<title>{escape(alt)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
    ]
    for number, (title, view) in enumerate(panels):
        parts.append(f'<g transform="translate({number * width + LEFT} {TOP})">')
        parts.append(f'<text x="0" y="-14" font-size="14" font-weight="600" fill="{INK}">{escape(title)}</text>')
        parts += _panel(view)
        parts.append("</g>")
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """Data to pixels, as plotly reads an axis: a range in decades where the axis is logarithmic."""

    def __init__(self, axis: Mapping[str, Any], length: float, *, down: bool):
        self.low, self.high = axis["range"]
        self.log, self.length, self.down = axis.get("type") == "log", length, down

    def at(self, value: float, *, ready: bool = False) -> float:
        """`ready`: already in decades, as annotations are."""
        value = log10(value) if self.log and not ready else value
        share = (value - self.low) / (self.high - self.low)
        return round(self.length * (1 - share if self.down else share), 2)

    def ticks(self) -> Iterator[tuple[float, str]]:
        """(pixel, text) of a handful of round values."""
        if self.log:
            for decade in range(int(self.low) - 1, int(self.high) + 2):
                for digit in (1, 2, 5):
                    value = digit * 10.0**decade
                    if self.low <= log10(value) <= self.high:
                        yield self.at(value), _short(value)
            return
        span = self.high - self.low
        step = next(s * 10.0**e for e in range(-6, 7) for s in (1, 2, 5) if span / (s * 10.0**e) <= 6)
        first = int(self.low / step) - 1
        for k in range(first, first + 20):
            if self.low <= k * step <= self.high:
                yield self.at(k * step), f"{k * step:g}".replace("-", "\u2212") if abs(k * step) > 1e-9 else "0"


def _panel(view: Mapping[str, Any]) -> Iterator[str]:
    shape = view["layout"]
    x, y = _Scale(shape["xaxis"], PLOT[0], down=False), _Scale(shape["yaxis"], PLOT[1], down=True)
    yield from _axes(shape, x, y)
    for line in shape.get("shapes", ()):
        yield f'<line x1="0" x2="{PLOT[0]}" y1="{y.at(line["y0"])}" y2="{y.at(line["y0"])}" {_stroke(line["line"])}/>'
    for trace in view["data"]:
        points = [(x.at(a), y.at(b)) for a, b in zip(trace["x"], trace["y"], strict=True)]
        if trace.get("fill") == "toself":
            yield f'<polygon points="{" ".join(f"{a},{b}" for a, b in points)}" fill="{trace["fillcolor"]}"/>'
        elif "lines" in trace["mode"] and len(points) > 1:
            path = " ".join(f"{a},{b}" for a, b in points)
            yield f'<polyline points="{path}" fill="none" stroke-linejoin="round" {_stroke(trace["line"])}/>'
        if "markers" in trace["mode"]:
            symbols = trace["marker"].get("symbol", "circle")
            for k, point in enumerate(points):
                yield _marker(symbols if isinstance(symbols, str) else symbols[k], point, trace["marker"])
    for note in shape["annotations"]:
        yield from _label(note, x, y)


def _axes(shape: Mapping[str, Any], x: _Scale, y: _Scale) -> Iterator[str]:
    for at, text in x.ticks():
        yield f'<line x1="{at}" x2="{at}" y1="0" y2="{PLOT[1]}" stroke="#e8ebef"/>'
        yield f'<text x="{at}" y="{PLOT[1] + 18}" text-anchor="middle" fill="{MUTED}">{text}</text>'
    for at, text in y.ticks():
        yield f'<line x1="0" x2="{PLOT[0]}" y1="{at}" y2="{at}" stroke="#e8ebef"/>'
        yield f'<text x="-8" y="{at + 4}" text-anchor="end" fill="{MUTED}">{text}</text>'
    yield f'<path d="M0,0 V{PLOT[1]} H{PLOT[0]}" fill="none" stroke="#b9c0c9"/>'
    titles = [shape[axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    yield f'<text x="{PLOT[0] / 2}" y="{PLOT[1] + 40}" text-anchor="middle" font-size="13" fill="{INK}">{escape(titles[0])}</text>'
    turned = f'transform="rotate(-90)" x="{-PLOT[1] / 2}" y="-44"'
    yield f'<text {turned} text-anchor="middle" font-size="13" fill="{INK}">{escape(titles[1])}</text>'


def _marker(symbol: str, at: tuple[float, float], marker: Mapping[str, Any]) -> str:
    radius, color = marker["size"] / 2, marker["color"]
    name, hollow = symbol.removesuffix("-open"), symbol.endswith("-open")
    edge = marker.get("line", {})
    fill = "white" if hollow else color
    paint = f'fill="{fill}" fill-opacity="{marker.get("opacity", 1)}"'
    paint += f' stroke="{edge.get("color", "none")}" stroke-width="{edge.get("width", 0)}"'
    if name == "x-thin":
        d = " ".join(f"M{at[0] - s * radius:.2f},{at[1] - radius:.2f} L{at[0] + s * radius:.2f},{at[1] + radius:.2f}" for s in (1, -1))
        return f'<path d="{d}" fill="none" stroke="{color}" stroke-width="2"/>'
    if name in CORNERS:
        points = " ".join(f"{at[0] + radius * a:.2f},{at[1] + radius * b:.2f}" for a, b in CORNERS[name])
        return f'<polygon points="{points}" {paint}/>'
    return f'<circle cx="{at[0]}" cy="{at[1]}" r="{radius:g}" {paint}/>'


def _label(note: Mapping[str, Any], x: _Scale, y: _Scale) -> Iterator[str]:
    """A label that `plot.place` put down, or a name on a line."""
    text = _text(note["text"])
    if not note.get("showarrow"):
        yield f'<text x="{PLOT[0]}" y="{y.at(note["y"]) - 6}" text-anchor="end" fill="{INK}">{text}</text>'
        return
    at = (x.at(note["x"], ready=True), y.at(note["y"], ready=True))
    to = (at[0] + note["ax"], at[1] + note["ay"])
    half = 3.3 * (len(unescape(re.sub(r"<[^>]*>", "", note["text"]))) + 1)
    yield f'<line x1="{at[0]}" y1="{at[1]}" x2="{to[0]:.2f}" y2="{to[1]:.2f}" stroke="{note["arrowcolor"]}" stroke-width="0.8"/>'
    box = f'x="{to[0] - half:.2f}" y="{to[1] - 8:.2f}" width="{2 * half:.2f}" height="16"'
    yield f'<rect {box} fill="white" fill-opacity="0.8"/>'
    yield f'<text x="{to[0]:.2f}" y="{to[1] + 4:.2f}" text-anchor="middle" fill="{INK}">{text}</text>'


def _text(text: str) -> str:
    """Plotly's few HTML tags as SVG's."""
    text = re.sub(r'<span style="color:(#\w+)">(.*?)</span>', r'<tspan fill="\1">\2</tspan>', text)
    return re.sub(r"<b>(.*?)</b>", r'<tspan font-weight="600">\1</tspan>', text)


def _stroke(line: Mapping[str, Any]) -> str:
    dash = DASH.get(line.get("dash", "solid"), "")
    return f'stroke="{line["color"]}" stroke-width="{line["width"]}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _short(value: float) -> str:
    return f"{value / 1e6:g}M" if value >= 1e6 else f"{value / 1e3:g}k" if value >= 1e3 else f"{value:g}"
