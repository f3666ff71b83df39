"""One look per method, the same in the page, the pictures and the terminal, and told apart without colour.

Colours are those of Okabe and Ito (2008) without the yellow that vanishes on white; every method also has a marker of its own, and a
dash once the colours come round again. Baselines are grey: they are the scale, not the contest. The exact front is black.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["EXACT", "INK", "MUTED", "Look", "looks"]

INK = "#1b1f24"
MUTED = "#6b7480"
EXACT = "#1b1f24"

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195")
GREYS = ("#6b7480", "#8a929c", "#59616b", "#a3a9b1")
MARKS = (("circle", "●"), ("square", "■"), ("diamond", "◆"), ("triangle-up", "▲"), ("triangle-down", "▼"), ("star", "★"), ("hexagon", "⬢"))
GREY_MARKS = (("x-thin-open", "×"), ("circle-open", "○"), ("square-open", "□"), ("diamond-open", "◇"), ("triangle-up-open", "△"))
DASHES = ("solid", "dash", "dot", "dashdot")


@dataclass(frozen=True)
class Look:
    """Colour (hex), marker (plotly's name and a character) and dash (plotly's name) of one method."""

    colour: str
    marker: str
    mark: str
    dash: str


def looks(families: Mapping[str, str] | Iterable[tuple[str, str]]) -> dict[str, Look]:
    """Label -> look, given label -> family ("baseline" or another) in a fixed order. The same labels always look the same."""
    found: dict[str, Look] = {}
    counts = {True: 0, False: 0}
    for label, family in dict(families).items():
        grey = family == "baseline"
        n = counts[grey]
        counts[grey] += 1
        colours, marks = (GREYS, GREY_MARKS) if grey else (COLOURS, MARKS)
        marker, mark = marks[n % len(marks)]
        found[label] = Look(colours[n % len(colours)], marker, mark, DASHES[n // len(colours) % len(DASHES)])
    return found
