"""An explanation for people: tables for the terminal, and one page with colored tokens that needs no network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.report.data import PROMPTS
from paretune.report.page import tint
from paretune.report.plot import looks
from paretune.report.tables import Column, Table, minus

if TYPE_CHECKING:
    from paretune.evaluation.explain import Explanation, Sensitivity
    from paretune.policy.family import Family

__all__ = ["sensitivity_table", "token_table", "write_explanation"]

HERE = Path(__file__).parent
BAR, GAP, HALF = 8, 2, 24  # pixels: width of an expert's bar under a token, the space beside it, and the longest bar
SHOWN = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
MARKS = {*SHOWN.values(), "\N{MIDDLE DOT}"}
FAINT = 0.02  # of the largest contribution: a token that was moved by less stays white
HOW = {
    "product": "Each expert's bar is its gate times the log-ratio of its own probability to the reference's. The normalizer is what makes "
    "the product of the experts a distribution again; it lifts all tokens of a position alike.",
    "path": "Gates go from 0 (the reference) to their values on a straight line; each expert is credited with what its gate changed on the "
    "way (integrated gradients). Bars sum to the log-ratio.",
    "shapley": "Each expert is credited with the mean of what it changes when it joins the others, over all orders of joining (Shapley "
    "values). Bars sum to the log-ratio.",
}


def token_table(explanation: Explanation) -> Table:
    """One row per token and one of sums."""
    columns = (
        Column("token", "token", "text"),
        Column("ratio", "log-ratio", "number"),
        *(Column(f"expert_{k}", name) for k, name in enumerate(explanation.adapters)),
        *((Column("normalizer", "normalizer"),) if explanation.how == "product" else ()),
        Column("remainder", "remainder"),
    )
    rows = [
        _row(visible(token), *numbers)
        for token, *numbers in zip(
            explanation.tokens_T,
            explanation.ratio_T,
            explanation.contribution_TK,
            explanation.normalizer_T,
            explanation.remainder_T,
            strict=True,
        )
    ]
    e = explanation
    rows.append(_row("sum", e.ratio_T.sum(), e.contribution_TK.sum(0), e.normalizer_T.sum(), e.remainder_T.sum()))
    return Table("tokens", columns, rows)


def _row(token: str, ratio: float, contribution_K: np.ndarray, normalizer: float, remainder: float) -> dict[str, Any]:
    experts = {f"expert_{k}": float(value) for k, value in enumerate(contribution_K)}
    return {"token": token, "ratio": float(ratio), **experts, "normalizer": float(normalizer), "remainder": float(remainder)}


def sensitivity_table(found: Sensitivity) -> Table:
    """One row per return, one column per direction."""
    columns = (
        Column("return", "return", "text"),
        Column("now", "at this preference"),
        *(Column(f"to_{j}", f"towards {name}") for j, name in enumerate(found.objectives)),
        *(Column(f"error_{j}", f"± ({name})") for j, name in enumerate(found.objectives)),
    )
    rows = []
    for k, name in enumerate(found.objectives):
        slopes = {f"to_{j}": float(slope) for j, slope in enumerate(found.slope_MM[k])}
        errors = {} if found.exact else {f"error_{j}": float(error) for j, error in enumerate(found.error_MM[k])}
        rows.append({"return": name, "now": float(found.returns_M[k]), **slopes, **errors})
    return Table("sensitivity", columns, rows)


def visible(token: str) -> str:
    """A token with its spaces and line ends made visible; one that adds no character yet is a dot."""
    return "".join(SHOWN.get(character, character) for character in token) or "\N{MIDDLE DOT}"


def write_explanation(path: Path, found: Sequence[Explanation], slopes: Sensitivity | None, *, family: Family) -> Path:
    """Write the page; returns its path."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["tint"], environment.filters["minus"], environment.filters["prompts"] = tint, minus, PROMPTS.__getitem__
    first = found[0]
    known = looks(dict.fromkeys(first.adapters, "meta-policy"))
    largest = max((float(np.abs(e.contribution_TK).max()) for e in found if e.contribution_TK.size), default=0.0)
    largest = max(largest, *(float(np.abs(e.normalizer_T).max()) for e in found), 1e-9)
    steepest = float(np.nanmax(np.abs(slopes.slope_MM))) if slopes and np.isfinite(slopes.slope_MM).any() else 0.0
    page = environment.get_template("explained.html.j2").render(
        found=found,
        first=first,
        level=family.policy.mixing,
        method=family.meta.get("method", {}).get("name", ""),
        looks=known,
        how=HOW[first.how],
        responses=[_tokens(e, known, largest) for e in found],
        tables=[token_table(e) for e in found],
        scale=largest,
        slopes=sensitivity_table(slopes) if slopes else None,
        sensitivity=slopes,
        steepest=steepest or 1.0,
        half=HALF,
        style=(HERE / "page.css").read_text(encoding="utf-8"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def _tokens(explanation: Explanation, known: dict[str, Any], largest: float) -> list[dict[str, Any]]:
    """Per token: its text, the color of the expert that moved it most, and a bar for every part."""
    parts = [(name, known[name].color) for name in explanation.adapters]
    with_normalizer = explanation.how == "product"
    made = []
    for t, token in enumerate(explanation.tokens_T):
        values = [float(v) for v in explanation.contribution_TK[t]]
        lead = int(np.argmax(np.abs(values))) if values else None
        named = list(zip(parts, values, strict=True))
        bars = [{"color": color, **_bar(number, value, largest)} for number, ((_, color), value) in enumerate(named)]
        if with_normalizer:
            bars.append({"color": "#b9c0c9", **_bar(len(bars), float(explanation.normalizer_T[t]), largest)})
        lines = [f"log-ratio {_signed(float(explanation.ratio_T[t]))}", *(f"{name} {_signed(value)}" for (name, _), value in named)]
        if with_normalizer:
            lines.append(f"normalizer {_signed(float(explanation.normalizer_T[t]))}")
        share = abs(values[lead]) / largest if lead is not None else 0.0
        made.append(
            {
                "pieces": [(bool(marks), "".join(run)) for marks, run in groupby(visible(token), key=MARKS.__contains__)],
                "background": _wash(parts[lead][1], share, against=values[lead] < 0) if lead is not None and share > FAINT else "white",
                "bars": bars,
                "width": max(len(bars), 1) * (BAR + GAP) + GAP,
                "title": "\n".join(lines),
            }
        )
    return made


def _bar(number: int, value: float, largest: float) -> dict[str, float]:
    """Up where the token was made likelier, down where less likely."""
    height = HALF * min(abs(value) / largest, 1.0)
    return {"x": GAP + number * (BAR + GAP), "y": round(HALF - height if value >= 0 else HALF, 2), "height": round(height, 2), "width": BAR}


def _wash(color: str, share: float, *, against: bool) -> str:
    """The expert's color, never so dark that text cannot be read; stripes where it spoke against the token."""
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    full = f"rgba({red}, {green}, {blue}, {0.06 + 0.44 * share:.3f})"
    return f"repeating-linear-gradient(135deg, {full} 0 4px, transparent 4px 8px)" if against else full


def _signed(value: float) -> str:
    return f"{value:+.3f}".replace("-", "\u2212")
