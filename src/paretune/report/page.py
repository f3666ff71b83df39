"""Pages that need no network: the report of a run directory with its CSV and SVG files, and the explanation of a few responses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.files import disk_errors, new_folder, write_text
from paretune.report import comparison
from paretune.report.data import PROMPTS, Results
from paretune.report.figures import DRAWN, FIGURES, LOSS_COLORS, Figure, Look, looks, template, to_svg
from paretune.report.findings import findings
from paretune.report.tables import CEILING, TABLES, Column, Table, signed
from paretune.types import Estimate

if TYPE_CHECKING:  # they load torch
    from paretune.evaluation.explain import Explanation, Sensitivity
    from paretune.policy.family import Family

__all__ = ["sensitivity_table", "tint", "token_table", "visible", "write_explanation", "write_page"]


def write_page(results: Results, folder: Path) -> Path:
    """Write index.html, tables/*.csv and figures/*.svg into `folder` (made if missing), all of them or none; returns the page's path."""
    made = [make(results) for make in (*TABLES, *comparison.TABLES)]
    tables = {table.name: table for table in made if table.rows}  # what was not measured is left out
    figures = {anchor: found for anchor, make in FIGURES.items() if (found := make(results))}
    page = _render(results, tables, figures)
    with disk_errors(folder, "a report"), new_folder(folder) as new:
        for name in ("tables", "figures"):
            (new / name).mkdir()
        for table in tables.values():
            table.write_csv(new / "tables")
        for figure in (figure for anchor, found in figures.items() if anchor != "loss" for figure in found):
            split, view = next(iter(figure.views.items()))
            picture = to_svg([(f"{figure.title}, {PROMPTS[split]}", view)], alt=figure.alt)
            (new / "figures" / f"{figure.name}.svg").write_text(picture, encoding="utf-8")
        (new / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def _render(results: Results, tables: dict[str, Table], figures: dict[str, list[Figure]]) -> str:
    from plotly.offline import get_plotlyjs

    boards = _boards(results, tables["leaderboard"]) if results.cells else []
    views = {figure.name: figure.views for found in figures.values() for figure in found}
    filters = {"tint": tint, "signed": signed, "groups": _groups, "whole": lambda text: text.replace(" = ", "\u00a0=\u00a0")}
    return template("page.html.j2", **filters).render(
        results=results,
        sampled=any(cell.measured("test", "returns_error") for cell in results.cells),
        findings=findings(results),
        tables=tables,
        boards=boards,
        meanings=list(dict.fromkeys((c.group, c.title, c.help) for _, table in boards for c in table.shown if c.help)),
        looks=looks(results.families),
        ceiling=CEILING,
        figures=figures,
        drawn=DRAWN,
        loss_colors=LOSS_COLORS,
        zip=zip,
        comparison=comparison,
        facts=_facts(results),
        plotly=get_plotlyjs() if views else "",
        views=views,
    )


def _boards(results: Results, whole: Table) -> list[tuple[str, Table]]:
    """(heading, table) of every setting, without columns that say nothing, or what the heading says."""
    seeds = {row["cells"] for row in whole.rows if row["method"] != CEILING}
    left_out = {"setting", "prompts", "seconds_total", "regret_worst"} | ({"cells"} if len(seeds) == 1 else set())
    left_out |= {key for key in ("unknown", "evaluations", "samples_total", "samples_path") if not any(row.get(key) for row in whole.rows)}
    kept = [column for column in whole.shown if column.key not in left_out]
    found = []
    for setting in results.settings:
        rows = whole.placed[setting.label, setting.headline]
        columns = tuple(replace(c, group=c.group.format(prompts=PROMPTS[setting.headline])) for c in kept)
        found.append((setting.label, Table(f"leaderboard-{setting.slug}", columns, rows)))
    return found


def _facts(results: Results) -> list[tuple[str, str]]:
    """Where the numbers come from; a fact that differs between cells lists every value."""
    env = [cell.env for cell in results.cells]
    facts = [("suite", results.name), ("cells", str(len(results.cells)))]
    for name in ("commit", "python", "platform", "device", "threads"):
        values = sorted({str(e[name]) + (" with changes" if name == "commit" and e.get("changed") else "") for e in env if e.get(name)})
        if values:
            facts.append((name, ", ".join(values)))
    learners = sorted({json.dumps(c.record["learner"], sort_keys=True) for c in results.cells if c.record.get("learner")})
    facts += [("learner", text.replace('"', "")) for text in learners]
    packages = sorted({f"{name} {version}" for e in env for name, version in (e.get("packages") or {}).items() if version})
    return [*facts, ("packages", ", ".join(packages))] if packages else facts


def _groups(columns: list[Column]) -> list[tuple[str, int]]:
    """(title, count) of neighboring columns of one group, for the upper line of a table's head."""
    return [(group, len(list(run))) for group, run in groupby(columns, key=lambda column: column.group)]


def tint(value: Any, times: float = 1.0) -> str:
    """A background for a number or an estimate, times a factor: blue above 0, orange below, never so dark that text cannot be read."""
    number = value.value if isinstance(value, Estimate) else value
    if number is None:
        return "transparent"
    share = max(-1.0, min(1.0, times * number))
    color = "0, 114, 178" if share >= 0 else "213, 94, 0"
    return f"rgba({color}, {0.42 * abs(share):.3f})"


# The explanation of a few responses

SHOWN = {" ": "\N{OPEN BOX}", "\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "\t": "\N{RIGHTWARDS ARROW TO BAR}"}
MARKS = {*SHOWN.values(), "\N{MIDDLE DOT}"}
FAINT = 0.02  # of the largest contribution: a token that was moved by less stays white
NORMALIZER = "#b9c0c9"


def token_table(explanation: Explanation) -> Table:
    """One row per token and one of sums."""
    e = explanation
    names = ["ratio", *(f"expert_{k}" for k in range(len(e.adapters))), "normalizer", "remainder"]
    titles = ["log-ratio", *e.adapters, "normalizer", "remainder"]
    columns = [Column(name, title) for name, title in zip(names, titles, strict=True) if name != "normalizer" or e.how == "product"]
    numbers = np.column_stack([e.ratio_T, e.contribution_TK, e.normalizer_T, e.remainder_T])
    told = zip([*map(visible, e.tokens_T), "sum"], [*numbers.tolist(), numbers.sum(0).tolist()], strict=True)
    rows = [{"token": token, **dict(zip(names, values, strict=True))} for token, values in told]
    return Table("tokens", (Column("token", "token", "text"), *columns), rows)


def sensitivity_table(found: Sensitivity) -> Table:
    """One row per return, one column per direction."""
    names = found.objectives
    columns = [Column("return", "return", "text"), Column("now", "at this preference")]
    columns += [Column(f"to_{j}", f"towards {name}") for j, name in enumerate(names)]
    columns += [Column(f"error_{j}", f"± ({name})") for j, name in enumerate(names)]
    rows = []
    for name, *values in zip(names, found.returns_M.tolist(), found.slope_MM.tolist(), found.error_MM.tolist(), strict=True):
        now, slopes, errors = values
        row = {"return": name, "now": now, **{f"to_{j}": slope for j, slope in enumerate(slopes)}}
        rows.append(row if found.exact else row | {f"error_{j}": error for j, error in enumerate(errors)})
    return Table("sensitivity", tuple(columns), rows)


def visible(token: str) -> str:
    """A token with its spaces and line ends made visible; one that adds no character yet is a dot."""
    return "".join(SHOWN.get(character, character) for character in token) or "\N{MIDDLE DOT}"


def write_explanation(path: Path, found: Sequence[Explanation], slopes: Sensitivity | None, *, family: Family) -> Path:
    """Write the page; returns its path."""
    first = found[0]
    known = looks(dict.fromkeys(first.adapters, "meta-policy"))
    parts = [part for e in found for part in (e.contribution_TK, e.normalizer_T) if part.size]
    largest = max([1e-9, *(float(np.abs(part).max()) for part in parts)])
    steepest = float(np.nanmax(np.abs(slopes.slope_MM))) if slopes and np.isfinite(slopes.slope_MM).any() else 0.0
    page = template("explanation.html.j2", tint=tint).render(
        found=[(e, _tokens(e, known, largest), token_table(e)) for e in found],
        first=first,
        level=family.policy.mixing,
        method=family.meta.get("method", {}).get("name", ""),
        looks=known,
        normalizer=NORMALIZER,
        scale=largest,
        slopes=sensitivity_table(slopes) if slopes else None,
        sensitivity=slopes,
        steepest=steepest or 1.0,
    )
    with disk_errors(path, "an explanation"):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, page)
    return path


def _tokens(explanation: Explanation, known: dict[str, Look], largest: float) -> list[dict[str, Any]]:
    """Per token: its text, the color of the expert that moved it most, and for every part its color and its share of the largest."""
    made = []
    for t, token in enumerate(explanation.tokens_T):
        parts = [(name, known[name].color, float(v)) for name, v in zip(explanation.adapters, explanation.contribution_TK[t], strict=True)]
        lead, _, most = max(parts, key=lambda part: abs(part[2]), default=("", "", 0.0))
        share = abs(most) / largest
        parts += [("normalizer", NORMALIZER, float(explanation.normalizer_T[t]))] if explanation.how == "product" else []
        told = [("log-ratio", "", float(explanation.ratio_T[t])), *parts]
        found = {
            "pieces": [(bool(marks), "".join(run)) for marks, run in groupby(visible(token), key=MARKS.__contains__)],
            # Never so dark that text cannot be read; stripes where the expert spoke against the token.
            "wash": known[lead].pale(round(0.06 + 0.44 * share, 3)) if share > FAINT else "white",
            "against": most < 0 and share > FAINT,
            "bars": [(color, max(-1.0, min(1.0, value / largest))) for _, color, value in parts],
            "title": "\n".join(f"{name} {value:+.3f}".replace(" -", " \u2212") for name, _, value in told),
        }
        made.append(found)
    return made
