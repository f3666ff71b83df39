"""The report as files: one page that needs no network, and a CSV file for every figure and table."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from paretune.report.compared import DRAWN, board_tables, difference_heats, note, profile_figures, relationship_tables
from paretune.report.comparison import comparison_table, enough_for_intervals, pair_table, profile_table
from paretune.report.data import PROMPTS, Results
from paretune.report.figures import Figure, attainment_figures, cost_figures, front_figures, loss_figures
from paretune.report.findings import findings
from paretune.report.generations import generation_boards, generation_table
from paretune.report.plot import looks
from paretune.report.series import attainment_table, failure_table, front_table, glance_table, loss_table, relation_table
from paretune.report.svg import to_svg
from paretune.report.tables import CEILING, Column, Table, cost_table, leaderboard, minus, signed
from paretune.types import Estimate

__all__ = ["write_page"]

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Section:
    """One section of the page: an anchor, a heading, what to see in it, its figures, and the CSV file with its numbers."""

    anchor: str
    title: str
    lead: str
    figures: list[Figure]
    csv: str


def write_page(results: Results, folder: Path) -> Path:
    """Write index.html, tables/*.csv and figures/*.svg into `folder` (made if missing); returns the page's path."""
    tables = {t.name: t for t in _tables(results)}
    (folder / "tables").mkdir(parents=True, exist_ok=True)
    for table in tables.values():
        table.write_csv(folder / "tables")
    sections = _sections(results)
    (folder / "figures").mkdir(exist_ok=True)
    for section in sections:
        for figure in section.figures if section.anchor != "loss" else ():
            split, view = next(iter(figure.views.items()))
            title = f"{figure.title}, {PROMPTS[split]}"
            (folder / "figures" / f"{figure.name}.svg").write_text(to_svg([(title, view)], alt=figure.alt), encoding="utf-8")
    page = folder / "index.html"
    page.write_text(_render(results, tables, sections), encoding="utf-8")
    return page


def _tables(results: Results) -> list[Table]:
    """Every table with a row; what was not measured is left out."""
    makers = (
        *(leaderboard, glance_table, front_table, attainment_table, cost_table, loss_table, relation_table, failure_table),
        *(comparison_table, pair_table, profile_table, generation_table),
    )
    return [table for make in makers if results.cells or make is failure_table if (table := make(results)).rows]


def _render(results: Results, tables: dict[str, Table], sections: list[Section]) -> str:
    from jinja2 import Environment, FileSystemLoader
    from plotly.offline import get_plotlyjs

    boards = _boards(results, tables)
    views = {figure.name: figure.views for section in sections for figure in section.figures}
    environment = Environment(loader=FileSystemLoader(HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["minus"], environment.filters["whole"] = minus, lambda text: text.replace(" = ", "\u00a0=\u00a0")
    environment.filters["prompts"] = PROMPTS.__getitem__
    environment.filters["tint"], environment.filters["groupby_runs"] = tint, _runs
    environment.filters["signed"], environment.filters["level"] = signed, _level
    return environment.get_template("page.html.j2").render(
        results=results,
        intro=_intro(results),
        findings=findings(results),
        tables=tables,
        boards=boards,
        meanings=list(dict.fromkeys((c.group, c.title, c.help) for _, _, table in boards for c in table.shown if c.help)),
        looks=looks(results.families),
        ceiling=CEILING,
        sections=sections,
        comparison=_comparison(results),
        relations=_relations(results),
        generations=generation_boards(results),
        facts=_facts(results),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=(HERE / "page.js").read_text(encoding="utf-8"),
        plotly=get_plotlyjs() if views else "",
        views=json.dumps(views, allow_nan=False).replace("</", "<\\/"),
    )


def _intro(results: Results) -> list[str]:
    """What a row is, what attainment is, which prompts numbers are on, what else is counted."""
    if not results.cells:
        return ["No cell of this run finished; what failed is listed below."]
    settings, exact = results.settings, any(s.exact for s in results.settings)
    preferences = sorted({len(cell.w_WM) for cell in results.cells})
    judged = " or ".join(str(n) for n in preferences)
    first = (
        f"Each row is a way to serve every trade-off between objectives with one language model: {len(results.families)} methods on "
        f"{len(settings)} task setting{'s' if len(settings) > 1 else ''}, judged at {judged} preferences that no training saw."
    )
    second = (
        "Attainment is the share of the possible gain that was reached: 1 is the exact optimum, known here because every response can be "
        "enumerated; 0 is the untrained reference; below 0 is harm."
        if exact
        else "The true front of these tasks is not known, so methods are compared by their gain in utility over the untrained "
        "reference, on the same prompts with the same noise."
    )
    third = f"Ranks, figures and every number that names no other prompts are on {results.prompts}" + (
        ": there, all that is missing from the optimum is lost by learning and by combining. Test prompts stand beside them; they also ask "
        "what generalizes."
        if results.prompts == PROMPTS["train"]
        else "."
    )
    fourth = (
        "Returns are expected rewards minus beta times the KL divergence from the reference, and every cost is what the method would have "
        "paid alone, even where trainings were shared."
    )
    return [first, second, third, fourth]


def _boards(results: Results, tables: dict[str, Table]) -> list[tuple[str, str, Table]]:
    """(heading, note, table) of every setting, without columns that say nothing, or what the heading says."""
    if "leaderboard" not in tables:
        return []
    whole = tables["leaderboard"]
    seeds = {row["cells"] for row in whole.rows if row["method"] != CEILING}
    left_out = {"setting", "prompts", "seconds_total", "regret_worst"} | ({"cells"} if len(seeds) == 1 else set())
    left_out |= {key for key in ("unknown", "evaluations", "samples_total", "samples_path") if not any(row.get(key) for row in whole.rows)}
    count = seeds.pop() if len(seeds) == 1 else 0
    note = f"{count} seed{'s' if count > 1 else ''} each" if count else ""
    found = []
    for setting in results.settings:
        rows = [row for row in whole.rows if row["setting"] == setting.label]
        on = PROMPTS[setting.headline]
        columns = tuple(replace(c, group=c.group.format(prompts=on)) for c in whole.shown if c.key not in left_out)
        found.append((setting.label, note, Table(f"leaderboard-{setting.slug}", columns, rows)))
    return found


def _sections(results: Results) -> list[Section]:
    if not results.cells:
        return []
    exact = any(setting.exact for setting in results.settings)
    seeds = max(len(s.shared_seeds) for s in results.settings)
    bands = ", with 95 % bands point by point" if enough_for_intervals(results)[0] else ""
    over = f" Points are means over {seeds} task seeds." if seeds > 1 else ""
    found = [
        Section(
            "fronts",
            "Fronts",
            "Up and to the right is better. A family of policies is a curve with one marker per judged preference; a method with a single "
            "policy is one marker."
            + (" No policy can lie beyond the exact front." if exact else "")
            + (" Bars are 95 % intervals over samples." if any(c.measured("test").get("returns_error") for c in results.cells) else "")
            + over,
            front_figures(results),
            "fronts",
        ),
        Section(
            "attainment",
            f"{'Attainment' if exact else 'Gain'} against preference",
            "From one objective alone (left and right ends) to both alike (middle). A family that was only trained at the ends has to "
            "be good in the middle, too." + (" Baselines that fall far below are drawn at the lower edge." if exact else "") + over,
            attainment_figures(results),
            "attainment",
        ),
        Section(
            "profiles",
            "Performance profiles",
            "Up and to the right is better: for every threshold, the share of runs (task seeds) whose worst value over the judged "
            "preferences is above it. A curve above another one everywhere is better by any measure that grows with quality. "
            f"Drawn are the best {DRAWN} methods and the baselines{bands}.",
            profile_figures(results),
            "profiles",
        ),
        Section(
            "cost",
            "Cost against quality",
            "Up and to the left is better. A filled marker is the cost in total, the hollow one to its left the critical path: the same "
            "with all trainings of one wave side by side. The untrained reference costs nothing and is not drawn.",
            cost_figures(results),
            "cost",
        ),
        Section(
            "loss",
            "Where the loss comes from",
            "Composition: even optimal experts, mixed token by token with the same gates, would lose this much; it is known for logit "
            "mixing and its equals only. Learning: what those would attain beyond this family, below 0 where its experts mix better than "
            "perfect ones. Remainder: what is attributed to neither; for soups that is everything.",
            loss_figures(results),
            "loss",
        ),
    ]
    return [section for section in found if section.figures]


def _comparison(results: Results) -> dict[str, Any] | None:
    """Everything of the section over task seeds; None where there are no two seeds, or no two methods."""
    if not note(results):
        return None
    return {
        "note": note(results),
        "enough": enough_for_intervals(results)[0],
        "prompts": results.prompts,
        "relationships": relationship_tables(results),
        "boards": board_tables(results),
        "heats": difference_heats(results),
    }


def _relations(results: Results) -> list[dict[str, Any]]:
    """Per setting: the mean verified correlation matrix of the headline's prompts over task seeds, and what else was verified."""
    found = []
    for setting in results.settings:
        verified = {c.task.get("seed"): c.record["verified"] for c in setting.cells if c.record.get("verified")}
        if verified:
            splits = [v[setting.headline] for v in verified.values()]
            size = range(len(setting.objectives))
            matrix = [[sum(s["correlations"][a][b] for s in splits) / len(splits) for b in size] for a in size]
            strengths = [min(x for s in splits for x in s["strength_nats"]), max(x for s in splits for x in s["strength_nats"])]
            limits = [s["worst_composition_limit"] for s in splits]
            found.append(
                {
                    "label": setting.label,
                    "names": setting.objectives,
                    "prompts": PROMPTS[setting.headline],
                    "matrix": matrix,
                    "strength": f"{strengths[0]:.2f} to {strengths[1]:.2f}",
                    "limit": f"{min(limits):.2f}",
                }
            )
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


def _level(value: Any, times: float = 1.0) -> float | None:
    """The number that a cell is colored by: an estimate's value, enlarged where it is a difference."""
    number = value.value if isinstance(value, Estimate) else value
    return None if number is None else times * number


def _runs(columns: list[Column]) -> list[dict[str, Any]]:
    """Neighboring columns of one group, for the upper line of a table's head."""
    return [{"title": group, "count": len(list(run))} for group, run in groupby(columns, key=lambda column: column.group)]


def tint(value: float | None, low: float = -1.0) -> str:
    """A background for an attainment or a correlation: blue above 0, orange below, white at 0; never so dark that text cannot be read."""
    if value is None:
        return "transparent"
    share = max(-1.0, min(1.0, value if value >= 0 else value / -low))
    color = (0, 114, 178) if share >= 0 else (213, 94, 0)
    return f"rgba({color[0]}, {color[1]}, {color[2]}, {0.42 * abs(share):.3f})"
