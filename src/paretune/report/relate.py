"""What `paretune relate` found, as tables, as heat maps (plotly descriptions and small SVG files), and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.errors import printable
from paretune.evaluation.metrics import plain
from paretune.files import disk_errors, new_folder
from paretune.report.drawing import PALETTE, template
from paretune.report.tables import Column, Table, minus

if TYPE_CHECKING:  # they load torch
    from paretune.evaluation.advice import Advice
    from paretune.evaluation.relations import Probe, Relations

__all__ = ["gradient_table", "heat_map", "heat_maps", "heat_svg", "objective_table", "pair_table", "to_json", "write_relations"]

CONFLICT, NEUTRAL, AGREE, UNKNOWN = (213, 94, 0), (255, 255, 255), (0, 114, 178), "#d5d9de"
RATES = (
    Column("rate_second", "second's gain\nper gain of first", help="what the second objective gains while training for the first gains 1"),
    Column("rate_first", "first's gain\nper gain of second", help="what the first objective gains while training for the second gains 1"),
)
BETWEEN = Column("between", "95 %\ninterval", "text", help="where the value left of it lies, with 95 % confidence, for prompts like these")


def objective_table(found: Relations) -> Table:
    """One row per objective: what there is to gain from it, and how often it says anything."""
    columns = (
        *(
            Column("name", "objective", "text"),
            Column("mean", "mean\nscore"),
            Column("low", "lowest\nscore"),
            Column("high", "highest\nscore"),
        ),
        Column("spread", "spread", help="standard deviation of the scores of the responses to one prompt, before anything is trained"),
        Column(
            "paid", "responses that\nstand out", "share", help="share whose score is not the most common one; small where a reward is rare"
        ),
        Column(
            "flat",
            "groups without\na signal",
            "share",
            help="share of groups of 8 responses that all score alike: nothing is learned from them",
        ),
        Column("noise", "noise per\nspread", "share", help="how far the score of one and the same response varies, in units of the spread"),
        Column("unscored", "unscored", "count", help="responses for which the objective gave no score"),
    )
    return Table("objectives", columns, plain(found.objectives))


def pair_table(found: Relations) -> Table:
    """One row per pair of objectives, by what the reference's responses score."""
    columns = (
        Column("name", "pair", "text"),
        Column("within", "correlation\nper prompt", "share", help="of the scores of responses to the same prompt: 1 agree, -1 conflict"),
        BETWEEN,
        Column("overall", "correlation\noverall", "share", help="the same over all responses, so that easy and hard prompts count, too"),
        Column("spearman", "correlation\nof ranks", "share", help="the same of ranks (Spearman), which extreme scores do not move"),
        Column("conflict", "prompts in\nconflict", "share", help="share of prompts whose own correlation is below 0"),
        Column("sure", "surely in\nconflict", "share", help="share of prompts whose 95 % interval lies below 0"),
        Column("known_prompts", "prompts\ncompared", "count", help="prompts at which both objectives vary"),
        *RATES,
    )
    rows = []
    for (j, k), pair in zip(combinations(range(len(found.names)), 2), plain(found.pairs), strict=True):
        row = {name: pair[name]["value"] for name in ("within", "overall", "spearman")} | _rates(found.rate_MM, j, k)
        row |= {"name": " & ".join(pair["objectives"]), "conflict": pair["conflict"], "known_prompts": pair["known_prompts"]}
        if not found.exact:
            row |= {"between": _between(pair["within"]["low"], pair["within"]["high"]), "sure": pair["surely_conflict"]}
        rows.append(row)
    return Table("pairs", columns, rows)


def gradient_table(probe: Probe) -> Table:
    """One row per pair of objectives, by their gradients."""
    columns = (
        Column("name", "pair", "text"),
        Column("cosine", "cosine", "share", help="of the angle between the two gradients: 1 same direction, -1 opposite ones"),
        *(BETWEEN, *RATES),
        Column("norms", "first's length\nper second's", help="how many times as long the first objective's gradient is"),
    )
    rows = []
    for j, k in combinations(range(len(probe.names)), 2):
        row = {"name": f"{probe.names[j]} & {probe.names[k]}", **_rates(probe.rate_MM, j, k)}
        row |= {"cosine": plain(probe.cosine_MM[j, k]), "norms": plain(probe.norm_M[j] / probe.norm_M[k])}
        rows.append(row if probe.exact else row | {"between": _between(plain(probe.low_MM[j, k]), plain(probe.high_MM[j, k]))})
    return Table("gradients", columns, rows)


def _rates(rate_MM: np.ndarray, j: int, k: int) -> dict[str, Any]:
    return {"rate_second": plain(rate_MM[k, j]), "rate_first": plain(rate_MM[j, k])}


def _between(low: float | None, high: float | None) -> str:
    return "unknown" if low is None or high is None else f"{minus(f'{low:.2f}')} to {minus(f'{high:.2f}')}"


# Heat maps


def heat_map(values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """A plotly description of values in [-1, 1]: conflict is orange, agreement blue, unknown gray."""
    shown = plain(np.asarray(values, dtype=np.float64).round(4))
    text = [["–" if v is None else minus(f"{v:.2f}") for v in row] for row in shown]
    trace = {"type": "heatmap", "z": shown, "x": list(columns), "y": list(rows), "zmin": -1, "zmax": 1}
    trace |= {"colorscale": [[(end + 1) / 2, _color(end)] for end in (-1.0, 0.0, 1.0)], "text": text, "texttemplate": "%{text}"}
    trace |= {"hovertemplate": "%{y}<br>%{x}: %{z:.3f}<extra></extra>", "hoverongaps": False}
    return {"data": [trace], "layout": {"plot_bgcolor": UNKNOWN, "yaxis": {"autorange": "reversed"}}}


def heat_maps(found: Relations, probe: Probe | None = None) -> dict[str, tuple[str, dict[str, Any]]]:
    """File name -> (title, description)."""
    names = found.names
    j, k = np.triu_indices(len(names), 1)
    pairs = [f"{names[a]} & {names[b]}" for a, b in zip(j, k, strict=True)]
    # Short names of prompts; a number in front keeps equal beginnings apart.
    prompts = [f"{n + 1}. {text if len(text) <= 40 else text[:39] + '…'}" for n, text in enumerate(map(printable, found.prompts))]
    maps = {
        "correlation": ("Correlation among the responses to one prompt", heat_map(found.within_MM, rows=names, columns=names)),
        "spearman": ("Spearman's correlation over all responses", heat_map(found.spearman_MM, rows=names, columns=names)),
        "by_prompt": ("Correlation prompt by prompt", heat_map(found.within_PMM[:, j, k], rows=prompts, columns=pairs)),
    }
    if probe is not None:
        after = f"after {probe.steps} steps" if probe.steps else "at initialization"
        maps["cosine"] = (f"Cosine of the objectives' gradients {after}", heat_map(probe.cosine_MM, rows=names, columns=names))
    return maps


def heat_svg(view: Mapping[str, Any], *, title: str) -> str:
    """The description of `heat_map` as an SVG text."""
    return template("heat.svg.j2", color=_color).render(trace=view["data"][0], title=title, **PALETTE) + "\n"


def _color(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    end, share = (AGREE if value > 0 else CONFLICT), min(abs(value), 1.0)
    return "#" + "".join(f"{round(n + (e - n) * share):02x}" for n, e in zip(NEUTRAL, end, strict=True))


# Files


def to_json(found: Relations, probe: Probe | None, advice: Sequence[Advice]) -> dict[str, Any]:
    """Everything, as strict JSON."""
    looked = None if probe is None else probe.to_json()
    return {**found.to_json(), "probe": looked, "advice": [sentence.to_json() for sentence in advice]}


def write_relations(folder: Path, found: Relations, probe: Probe | None, advice: Sequence[Advice]) -> list[Path]:
    """relations.json (with a plotly description of every heat map), figures/*.svg and tables/*.csv; returns their paths."""
    maps = heat_maps(found, probe)
    whole = {**to_json(found, probe, advice), "figures": {name: {"title": title, **view} for name, (title, view) in maps.items()}}
    tables = [objective_table(found), pair_table(found), *([gradient_table(probe)] if probe is not None else [])]
    with disk_errors(folder, "a folder of relations"), new_folder(folder) as new:
        (new / "figures").mkdir()
        (new / "tables").mkdir()
        written = [new / "relations.json"]
        written[0].write_text(json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
        for name, (title, view) in maps.items():
            written.append(new / "figures" / f"{name}.svg")
            written[-1].write_text(heat_svg(view, title=title), encoding="utf-8")
        written += [table.write_csv(new / "tables") for table in tables]
    return [folder / path.relative_to(new) for path in written]
