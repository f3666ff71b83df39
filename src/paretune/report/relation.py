"""What `paretune relate` found, as tables, as heat maps (plotly descriptions and small SVG files), and as files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.evaluation.metrics import plain
from paretune.report.data import Results
from paretune.report.plot import FONT, INK, MUTED, axis, frame
from paretune.report.tables import Column, Table, leaderboard, minus

if TYPE_CHECKING:
    from paretune.evaluation.advice import Advice
    from paretune.evaluation.probe import Probe
    from paretune.evaluation.relations import Relations

__all__ = [
    "gradient_table",
    "heat_map",
    "heat_maps",
    "heat_svg",
    "objective_table",
    "pair_table",
    "result_rows",
    "to_json",
    "write_relations",
]

CONFLICT, NEUTRAL, AGREE, UNKNOWN = (213, 94, 0), (255, 255, 255), (0, 114, 178), "#d5d9de"
COLUMN, ROW = 74, 30  # pixels of a cell
LETTER = 7.0  # pixels, about


def objective_table(found: Relations) -> Table:
    """One row per objective: what there is to gain from it, and how often it says anything."""
    columns = (
        Column("name", "objective", "text"),
        Column("mean", "mean"),
        Column("low", "lowest"),
        Column("high", "highest"),
        Column("spread", "spread"),
        Column("paid", "not its most\ncommon score", "share"),
        Column("flat", "groups of 8\nall alike", "share"),
        Column("noise", "noise / spread", "share"),
        Column("unscored", "unscored", "count"),
    )
    return Table("objectives", columns, plain(found.objectives))


def pair_table(found: Relations) -> Table:
    """One row per pair of objectives, by what the reference's responses score."""
    columns = (
        Column("name", "pair", "text"),
        Column("within", "correlation\nwithin prompts", "share"),
        Column("between", "95 %", "text"),
        Column("overall", "overall", "share"),
        Column("spearman", "Spearman", "share"),
        Column("conflict", "prompts in\nconflict", "share"),
        Column("sure", "sure of it", "share"),
        Column("known_prompts", "of prompts", "count"),
        Column("rate_second", "second per\nfirst", "number"),
        Column("rate_first", "first per\nsecond", "number"),
    )
    rows = [
        {
            "name": " & ".join(pair["objectives"]),
            "within": pair["within"]["value"],
            "between": None if found.exact else _interval(pair["within"]["low"], pair["within"]["high"]),
            "overall": pair["overall"]["value"],
            "spearman": pair["spearman"]["value"],
            "conflict": pair["conflict"],
            "sure": None if found.exact else pair["surely_conflict"],
            "known_prompts": pair["known_prompts"],
            "rate_second": plain(found.rate_MM[k, j]),
            "rate_first": plain(found.rate_MM[j, k]),
        }
        for (j, k), pair in zip(combinations(range(len(found.names)), 2), plain(found.pairs), strict=True)
    ]
    return Table("pairs", columns, rows)


def gradient_table(probe: Probe) -> Table:
    """One row per pair of objectives, by their gradients."""
    columns = (
        Column("name", "pair", "text"),
        Column("cosine", "cosine", "share"),
        Column("between", "95 %", "text"),
        Column("rate_second", "second per\nfirst", "number"),
        Column("rate_first", "first per\nsecond", "number"),
        Column("norms", "ratio of\nlengths", "number"),
    )
    rows = [
        {
            "name": f"{probe.names[j]} & {probe.names[k]}",
            "cosine": plain(probe.cosine_MM[j, k]),
            "between": None if probe.exact else _interval(plain(probe.low_MM[j, k]), plain(probe.high_MM[j, k])),
            "rate_second": plain(probe.rate_MM[k, j]),
            "rate_first": plain(probe.rate_MM[j, k]),
            "norms": plain(probe.norm_M[j] / probe.norm_M[k]),
        }
        for j, k in combinations(range(len(probe.names)), 2)
    ]
    return Table("gradients", columns, rows)


def _interval(low: float | None, high: float | None) -> str:
    return "unknown" if low is None or high is None else f"{minus(f'{low:.2f}')} to {minus(f'{high:.2f}')}"


# Heat maps


def heat_map(values: np.ndarray, *, rows: Sequence[str], columns: Sequence[str]) -> dict[str, Any]:
    """A plotly description of values in [-1, 1]: conflict is orange, agreement blue, unknown gray."""
    shown = plain(np.asarray(values, dtype=np.float64).round(4))
    scale = [[0.0, _color(-1.0)], [0.5, _color(0.0)], [1.0, _color(1.0)]]
    trace = {
        "type": "heatmap",
        "z": shown,
        "x": list(columns),
        "y": list(rows),
        "zmin": -1,
        "zmax": 1,
        "colorscale": scale,
        "text": [[_text(v) for v in row] for row in shown],
        "texttemplate": "%{text}",
        "hovertemplate": "%{y}<br>%{x}: %{z:.3f}<extra></extra>",
        "hoverongaps": False,
    }
    across, down = axis(""), axis("")
    return {"data": [trace], "layout": {**frame(), "plot_bgcolor": UNKNOWN, "xaxis": across, "yaxis": {**down, "autorange": "reversed"}}}


def heat_maps(found: Relations, probe: Probe | None = None) -> dict[str, tuple[str, dict[str, Any]]]:
    """File name -> (title, description)."""
    names = found.names
    j, k = np.triu_indices(len(names), 1)
    pairs = [f"{names[a]} & {names[b]}" for a, b in zip(j, k, strict=True)]
    maps = {
        "correlation": ("Correlation among the responses to one prompt", heat_map(found.within_MM, rows=names, columns=names)),
        "spearman": ("Spearman's correlation over all responses", heat_map(found.spearman_MM, rows=names, columns=names)),
        "by_prompt": ("Correlation prompt by prompt", heat_map(found.within_PMM[:, j, k], rows=_distinct(found.prompts), columns=pairs)),
    }
    if probe is not None:
        after = f"after {probe.steps} steps" if probe.steps else "at initialization"
        maps["cosine"] = (f"Cosine of the objectives' gradients {after}", heat_map(probe.cosine_MM, rows=names, columns=names))
    return maps


def heat_svg(view: Mapping[str, Any], *, title: str) -> str:
    """The description of `heat_map` as an SVG text."""
    trace = view["data"][0]
    left = 12 + LETTER * max(len(name) for name in trace["y"])
    column = max(COLUMN, 12 + LETTER * max(len(name) for name in trace["x"]))
    width = max(left + column * len(trace["x"]), LETTER * len(title) * 1.1) + 12
    height = 64 + ROW * len(trace["y"])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height}" width="{width:g}" height="{height}" role="img" '
        f'font-family="{escape(FONT, quote=True)}" font-size="12">',
        f"<title>{escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="4" y="20" font-size="14" font-weight="600" fill="{INK}">{escape(title)}</text>',
    ]
    for number, name in enumerate(trace["x"]):
        x = left + column * (number + 0.5)
        parts.append(f'<text x="{x:g}" y="44" text-anchor="middle" fill="{MUTED}">{escape(name)}</text>')
    for row, (name, values) in enumerate(zip(trace["y"], trace["z"], strict=True)):
        y = 54 + ROW * row
        parts.append(f'<text x="{left - 8:g}" y="{y + ROW / 2 + 4:g}" text-anchor="end" fill="{MUTED}">{escape(name)}</text>')
        for number, value in enumerate(values):
            x = left + column * number
            ink = "white" if value is not None and abs(value) > 0.7 else INK
            parts.append(f'<rect x="{x:g}" y="{y}" width="{column - 2:g}" height="{ROW - 2}" fill="{_color(value)}" stroke="#e8ebef"/>')
            where = f'x="{x + column / 2 - 1:g}" y="{y + ROW / 2 + 3:g}"'
            parts.append(f'<text {where} text-anchor="middle" fill="{ink}">{_text(value)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _color(value: float | None) -> str:
    if value is None:
        return UNKNOWN
    end, share = (AGREE if value > 0 else CONFLICT), min(abs(value), 1.0)
    return "#" + "".join(f"{round(n + (e - n) * share):02x}" for n, e in zip(NEUTRAL, end, strict=True))


def _text(value: float | None) -> str:
    return "–" if value is None else minus(f"{value:.2f}")


def _distinct(prompts: Sequence[str]) -> list[str]:
    """Short names of prompts; a number in front keeps equal beginnings apart."""
    return [f"{n + 1}. {text if len(text) <= 40 else text[:39] + '…'}" for n, text in enumerate(prompts)]


# Files


def to_json(found: Relations, probe: Probe | None, advice: Sequence[Advice]) -> dict[str, Any]:
    """Everything, as strict JSON."""
    return {
        **found.to_json(),
        "probe": None if probe is None else probe.to_json(),
        "advice": [sentence.to_json() for sentence in advice],
    }


def write_relations(folder: Path, found: Relations, probe: Probe | None, advice: Sequence[Advice]) -> list[Path]:
    """relations.json (with a plotly description of every heat map), figures/*.svg and tables/*.csv; returns their paths."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "tables").mkdir(exist_ok=True)
    maps = heat_maps(found, probe)
    written = [folder / "relations.json"]
    whole = {**to_json(found, probe, advice), "figures": {name: {"title": title, **view} for name, (title, view) in maps.items()}}
    written[0].write_text(json.dumps(whole, indent=2, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8")
    for name, (title, view) in maps.items():
        written.append(folder / "figures" / f"{name}.svg")
        written[-1].write_text(heat_svg(view, title=title), encoding="utf-8")
    written += [table.write_csv(folder / "tables") for table in (objective_table(found), pair_table(found))]
    if probe is not None:
        written.append(gradient_table(probe).write_csv(folder / "tables"))
    return written


# What advice is read from


def result_rows(results: Results) -> list[dict[str, Any]]:
    """The rows of `results/relations.json` (see `paretune.evaluation.advice`) from the cells of a suite on `exact-v1`."""
    from paretune.evaluation.advice import DIALS

    board = {(row["setting"], row["method"]): row for row in leaderboard(results).rows}
    rows = []
    for setting in results.settings:
        for label in setting.labels if setting.name == "exact-v1" else ():
            row = board[setting.label, label]
            cell = setting.of(label)[0]
            measured = {key: row[key] for key in ("attainment_worst_train", "attainment_mean_train", "attainment_worst_test")}
            rows.append(
                {
                    **{name: setting.dials.get(name, usual) for name, usual in DIALS.items()},
                    "method": label,
                    "category": row["category"],
                    "learner": cell.record["learner"]["name"],
                    **measured,
                    "n_seeds": row["cells"],
                    "samples": round(row["samples_total"]),
                    "cost": {key: row[key] for key in ("tokens_total", "samples_path", "tokens_path", "seconds_total", "trainings")},
                }
            )
    return plain(rows)
