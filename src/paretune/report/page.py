"""Pages that need no network: the report of a run directory with its CSV and SVG files, and the explanation of a few responses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from paretune.files import disk_errors, new_folder, write_text
from paretune.report import comparison
from paretune.report.data import PROMPTS, Results, Setting
from paretune.report.drawing import template, to_svg
from paretune.report.figures import DRAWN, FIGURES, Figure, leaders, loss_bars
from paretune.report.findings import findings
from paretune.report.looks import COLORS, SHAPES, Look, looks_by_place
from paretune.report.tables import CEILING, LEADERBOARD, LOSS_PARTS, TABLES, Column, Table, board, headline
from paretune.types import Estimate

if TYPE_CHECKING:  # they load torch
    from paretune.evaluation.explain import Explanation, Sensitivity
    from paretune.policy.family import Family

__all__ = ["colored", "render", "sensitivity_table", "tint", "token_table", "visible", "write_explanation", "write_page"]


def write_page(results: Results, folder: Path) -> Path:
    """Write index.html, tables/*.csv and figures/*.svg into `folder` (made if missing), all of them or none; returns the page's path."""
    made = [make(results) for make in (*TABLES, *comparison.TABLES)]
    tables = {table.name: table for table in made if table.rows}  # what was not measured is left out
    figures = {anchor: found for anchor, make in FIGURES.items() if (found := make(results))}
    page = _suite(results, tables, figures)
    with disk_errors(folder, "a report"), new_folder(folder) as new:
        for name in ("tables", "figures"):
            (new / name).mkdir()
        for table in tables.values():
            table.write_csv(new / "tables")
        for figure in (figure for found in figures.values() for figure in found):
            split, view = next(iter(figure.views.items()))
            picture = to_svg([(f"{figure.title}, {PROMPTS[split]}", view)], results.looks, alt=figure.alt)
            (new / "figures" / f"{figure.name}.svg").write_text(picture, encoding="utf-8")
        (new / "index.html").write_text(page, encoding="utf-8")
    return folder / "index.html"


def render(name: str, *, figures: Sequence[Figure] = (), looks: Mapping[str, Look], lead: Sequence[str] = (), **more: Any) -> str:
    """A page from a template that extends base.html.j2. Its figures are drawn by page.js, in which `lead` stand out; without any it needs
    no script."""
    filters = {"tint": tint, "groups": _groups, "whole": _whole, "code": _code}
    return template(name, **filters).render(
        looks=looks,
        lead=lead,
        colors=COLORS,
        shapes=SHAPES,
        shape_paths={marker: path for marker, (path, _) in SHAPES.items()},
        looks_json={label: {"color": look.color, "marker": look.marker, "dash": look.dash} for label, look in looks.items()},
        views={figure.name: figure.views for figure in figures},
        scripted=bool(figures),
        **more,
    )


def _suite(results: Results, tables: dict[str, Table], figures: dict[str, list[Figure]]) -> str:
    boards = _boards(results)
    said, lead = findings(results), leaders(results)
    named = max((label for label in results.families if said and said[0].startswith(f"{label} ")), key=len, default="")
    return render(
        "page.html.j2",
        figures=[figure for found in figures.values() for figure in found],
        looks=results.looks,
        lead=lead,
        results=results,
        sampled=any(cell.measured("test", "returns_error") for cell in results.cells),
        title=said[0] if said else results.name,
        title_of=named,
        findings=said[1:],
        tables=tables,
        boards=boards,
        few=FEW,
        meanings=list(dict.fromkeys((c.title, c.help) for _, _, table in boards for c in table.shown if c.help)),
        order=[*lead, *(label for label in results.families if label not in lead)],
        ceiling=CEILING,
        drawn=figures,
        profiles_drawn=DRAWN,
        bars=loss_bars(results),
        parts_of={part: k for k, part in enumerate(LOSS_PARTS)},
        comparison=comparison,
        facts=_facts(results),
    )


FEW = ("method", "worst", "mean", "kl_mean", "trainings", "samples_total", "tokens_total")  # columns that are always shown


def _boards(results: Results) -> list[tuple[Setting, str, Table]]:
    """(setting, split, table) of everything that was measured, without columns that say nothing, or what the tab says."""
    rows = {(s.label, split): board(s, split) for s in results.settings for split in s.splits}
    every = [row for found in rows.values() for row in found]
    seeds = {row["cells"] for row in every if row["method"] != CEILING}
    left_out = {"setting", "method", "category", "prompts", "seconds_total", "regret_worst"} | ({"cells"} if len(seeds) == 1 else set())
    left_out |= {key for key in ("unknown", "evaluations", "samples_total", "samples_path") if not any(row.get(key) for row in every)}
    if any(row.get("samples_total") for row in every):
        left_out |= {"tokens_total", "tokens_path"}
    left_out |= {c.key for c in LEADERBOARD if c.key.startswith(("attainment_", "gain_"))}
    kept = [replace(c, group="") if c.group.startswith("on") else c for c in sorted(LEADERBOARD, key=lambda c: c.key not in FEW)]
    kept = [column for column in kept if column.key not in left_out and any(row.get(column.key) is not None for row in every)]
    helps = {c.key: c.help for c in LEADERBOARD}
    found = []
    for setting in results.settings:
        kind = {"kind": "share", "shade": 1.0} if setting.exact else {"kind": "change", "shade": 2.0}
        about = "attainment" if setting.exact else "gain"
        for split in setting.splits:
            told = [
                helps["attainment_worst_train" if setting.exact else "gain_worst"],
                helps["attainment_mean_train" if setting.exact else "gain_mean"],
            ]
            ends = [
                Column(which, f"{which} {about}", help=text.removeprefix("on training prompts, "), **kind)  # type: ignore[arg-type]
                for which, text in zip(("worst", "mean"), told, strict=True)
            ]
            columns = (*(c for c in LEADERBOARD if c.key == "method"), *ends, *kept)
            shown = [
                {**row, "worst": headline(row), "mean": _with_interval(row, headline(row, "mean"))} for row in rows[setting.label, split]
            ]
            found.append((setting, split, Table(f"leaderboard-{setting.slug}-{split}", columns, shown)))
    return found


def _with_interval(row: Mapping[str, Any], mean: float | None) -> Any:
    """The mean gain with its interval, where it has one."""
    if mean is None or row.get("gain_low") is None or row.get("gain_high") is None:
        return mean
    return Estimate(value=mean, low=row["gain_low"], high=row["gain_high"], n=0)


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


def _whole(text: str) -> str:
    """A text that is not broken at its equals signs."""
    return text.replace(" = ", "\u00a0=\u00a0")


def _code(text: str) -> Any:
    """What stands in backticks, as code."""
    from markupsafe import Markup, escape

    pieces = [*enumerate(str(text).split("`"))]
    shown = (Markup("<code>{}</code>").format(piece) if n % 2 and n + 1 < len(pieces) else escape(piece) for n, piece in pieces)
    return Markup("").join(shown)


def _groups(columns: list[Column], few: Sequence[str] | None = None) -> list[tuple[str, int, bool]]:
    """(title, count, whether it waits for the button) of neighboring columns of one group, for the upper line of a table's head."""
    key = [(column.group, few is not None and column.key not in few) for column in columns]
    return [(group, len(list(run)), more) for (group, more), run in groupby(key)]


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
FAINT = 0.02  # of the largest contribution: a token that was moved by less has no color
NORMALIZER = "var(--edge)"


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
    known = looks_by_place(first.adapters)
    parts = [part for e in found for part in (e.contribution_TK, e.normalizer_T) if part.size]
    largest = max([1e-9, *(float(np.abs(part).max()) for part in parts)])
    steepest = float(np.nanmax(np.abs(slopes.slope_MM))) if slopes and np.isfinite(slopes.slope_MM).any() else 0.0
    page = render(
        "explanation.html.j2",
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


def colored(explanation: Explanation) -> list[dict[str, Any]]:
    """The tokens of one response with the color of the expert that moved each most, as text."""
    e = explanation
    largest = max(1e-9, float(np.abs(e.contribution_TK).max(initial=0)), float(np.abs(e.normalizer_T).max(initial=0)))
    tokens = _tokens(e, looks_by_place(e.adapters), largest)
    return [{**token, "text": text} for token, text in zip(tokens, e.tokens_T, strict=True)]


def _tokens(explanation: Explanation, known: dict[str, Look], largest: float) -> list[dict[str, Any]]:
    """Per token: its text, the color of the expert that moved it most, and for every part its color and its share of the largest."""
    made = []
    for t, token in enumerate(explanation.tokens_T):
        parts = [(name, known[name].css, float(v)) for name, v in zip(explanation.adapters, explanation.contribution_TK[t], strict=True)]
        lead, _, most = max(parts, key=lambda part: abs(part[2]), default=("", "", 0.0))
        share = abs(most) / largest
        parts += [("normalizer", NORMALIZER, float(explanation.normalizer_T[t]))] if explanation.how == "product" else []
        told = [("log-ratio", "", float(explanation.ratio_T[t])), *parts]
        found = {
            "pieces": [(bool(marks), "".join(run)) for marks, run in groupby(visible(token), key=MARKS.__contains__)],
            # Never so dark that text cannot be read; stripes where the expert spoke against the token.
            "wash": known[lead].pale(round(0.06 + 0.44 * share, 3)) if share > FAINT else "transparent",
            "against": most < 0 and share > FAINT,
            "bars": [(color, max(-1.0, min(1.0, value / largest))) for _, color, value in parts],
            "title": "\n".join(f"{name} {value:+.3f}".replace(" -", " \u2212") for name, _, value in told),
        }
        made.append(found)
    return made
