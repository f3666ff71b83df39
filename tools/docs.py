"""Generate the parts of the documentation that the code and the committed results determine.

    python tools/docs.py               write README.md, docs/*.md, docs/figures/front.svg and the catalog of `paretune ls` anew
    python tools/docs.py --root DIR    first copy the quick suite's results from a run directory into benchmarks/results/quick.json
    python tools/docs.py --check       write nothing; exit 1 where a file differs from what would be written

A generated part stands between `<!-- NAME: made by tools/docs.py -->` and `<!-- end -->`. Everything else is left alone. `PARTS` maps
each NAME to the function that makes it. The targets of the benchmarks stand in `tools/targets.py`.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import typer

from paretune.cli import app
from paretune.cli.catalog import CATALOG, describe_name, made_catalog, taxonomy
from paretune.report.data import PROMPTS, Results, assemble, load
from paretune.report.drawing import to_svg
from paretune.report.figures import attainment_figures, front_figures
from paretune.report.tables import Table, glance_table, minus

sys.path.insert(0, str(Path(__file__).resolve().parent))

import study_page
from targets import FIGURES, Figure

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "paretune"
RESULTS = ROOT / "benchmarks" / "results"
QUICK = RESULTS / "quick.json"
RELATIONS = SOURCE / "results" / "relations.json"
PICTURE = ROOT / "docs" / "figures" / "front.svg"
STUDY = ROOT / "docs" / "figures" / "study.svg"
BLOCK = re.compile(r"(<!-- ([\w-]+): made by tools/docs\.py -->\n).*?(<!-- end -->)", re.DOTALL)
DRAWN = ("bridge", "linear", "experts parameter", "experts logit", "emorl-shared", "reference", "uniform")  # in the picture


# The rooms of the code


def house() -> str:
    """The rooms with their size and what they import, as a table; under each the rooms inside it."""
    arrows = _arrows()
    lines = ["| room | what it holds | files | imports, of other rooms |", "|---|---|---:|---|"]
    for room in _ordered():
        files = len(list((SOURCE / room).rglob("*.py")))
        others = ", ".join(f"`{other}`" for other in _ordered() if other in arrows[room])
        lines.append(f"| `{room}` | {_about(room)} | {files} | {others} |")
        for inner in sorted(path.parent for path in (SOURCE / room).glob("*/__init__.py")):
            name = inner.relative_to(SOURCE).as_posix()
            lines.append(f"| `{name}` | {_about(name)} | {len(list(inner.glob('*.py')))} | |")
    beside = sorted(path.stem for path in SOURCE.glob("*.py") if not path.stem.startswith("__") and path.stem != "launch")
    return "\n".join(lines) + f"\n\nBeside the rooms stand {', '.join(f'`{name}`' for name in beside)}, which any room may import.\n"


def _about(room: str) -> str:
    """The first sentence of a room's docstring, without its own name in front."""
    text = ast.get_docstring(ast.parse((SOURCE / room / "__init__.py").read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n")[0].split()).split(". ")[0].rstrip(".")
    head, mark, rest = first.partition(": ")
    said = rest if mark and head.isalpha() else first
    return said[:1].lower() + said[1:]


@cache
def _arrows() -> dict[str, frozenset[str]]:
    """Room -> the rooms that it imports, anywhere in its files."""
    names = {path.name for path in SOURCE.iterdir() if (path / "__init__.py").is_file()}
    found: dict[str, set[str]] = {name: set() for name in names}
    for room in names:
        for path in (SOURCE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
                modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found[room] |= {parts[1] for module in modules if len(parts := module.split(".")) > 1 and parts[0] == "paretune"}
    return {room: frozenset(others & names - {room}) for room, others in found.items()}


@cache
def _ordered() -> tuple[str, ...]:
    """Every room after the rooms that it imports; those that could stand side by side, by what builds on them, most first."""
    arrows, placed = _arrows(), []
    used = {room: sum(room in others for others in arrows.values()) for room in arrows}
    while len(placed) < len(arrows):
        free = [room for room in arrows if room not in placed and arrows[room] <= set(placed)]
        placed.append(min(free, key=lambda room: (-used[room], room)))
    return tuple(placed)


# The methods

GROUPS = {
    "single-policy": "one training per preference; the nearest policy answers",
    "multi-policy": "policies along the front, or one conditioned on the preference",
    "meta-policy": "one expert per objective, combined at any preference",
    "baseline": "the rows to compare with",
}


def groups() -> str:
    """One line per group of methods, with all of them."""
    names = _by_category()
    return "".join(f"- **{kind}** ({about}): {', '.join(f'`{n}`' for n in names[kind])}\n" for kind, about in GROUPS.items())


def _by_category() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {kind: [] for kind in GROUPS}
    for row in taxonomy().rows:
        found[row["category"]].append(row["name"])
    return found


def overview() -> str:
    """The taxonomy as a table; sources stand with each method."""
    table = taxonomy()
    return markdown(Table(table.name, tuple(c for c in table.columns if c.key != "source"), table.rows))


def cards() -> str:
    """Every method: what it is, Source, Differs, Hides, its fields and their defaults."""
    parts = []
    for kind, names in _by_category().items():
        parts.append(f"## {kind.capitalize()}\n")
        parts += [_card(next(thing for thing in describe_name(name) if thing["kind"] == "method")) for name in names]
    return "\n".join(parts)


def _card(thing: Mapping[str, Any]) -> str:
    lines = [f"### `{thing['name']}`\n", f"{_flowing(thing['about'])}\n"]
    lines += [f"- **{label}:** {thing['card'][label.lower()]}" for label in ("Source", "Differs", "Hides")]
    if thing["fields"]:
        lines += ["", "| field | default | |", "|---|---|---|"]
        lines += [f"| `{field['name']}` | {_cell(field['default'], code=True)} | {_cell(field['about'])} |" for field in thing["fields"]]
    return "\n".join(lines) + "\n"


def _flowing(text: str) -> str:
    """A docstring's paragraphs as Markdown; an indented one, or one in columns, keeps its lines, as code."""
    paragraphs = []
    for paragraph in text.split("\n\n"):
        indented = all(line.startswith(" ") for line in paragraph.splitlines()) or re.search(r"\S {3,}\S", paragraph)
        paragraphs.append(f"```text\n{textwrap.dedent(paragraph)}\n```" if indented else " ".join(paragraph.split()))
    return "\n\n".join(paragraphs)


# What the benchmarks measured


def results() -> str:
    """The README's table: the figures of the front page, and how many miss their target."""
    measured = _measured()
    aimed, missed = _aimed_and_missed()
    table = _figure_table([f for f in FIGURES if f.name in measured and f.front], script=False)
    return (
        f"{table}\n{len(aimed)} figures have a target; {len(missed)} miss it. "
        "[Benchmarks](docs/benchmarks.md#targets) has all, and why those do.\n"
    )


def _aimed_and_missed() -> tuple[list[Figure], list[Figure]]:
    measured = _measured()
    aimed = [f for f in FIGURES if f.want and f.name in measured]
    return aimed, [f for f in aimed if not f.met(measured[f.name])]


def targets() -> str:
    """How many targets are met, and which are not."""
    aimed, missed = _aimed_and_missed()
    lines = [f"{len(aimed)} figures have a target; {len(aimed) - len(missed)} meet it and {len(missed)} miss it:\n"]
    lines += [f"- {f.what}: {_number(f)}, target {f.target}. {f.why}".rstrip() for f in missed]
    return "\n".join(lines) + "\n"


def figures() -> str:
    """Every committed figure with its script, what it is taken over, its target and whether it is met."""
    measured = _measured()
    return _figure_table([f for f in FIGURES if f.name in measured], script=True)


def _figure_table(rows: list[Figure], *, script: bool) -> str:
    measured = _measured()
    lines = ["| figure | over | target | measured | |" + (" script |" if script else "")]
    lines.append("|---|---|---:|---:|---|" + ("---|" if script else ""))
    for f in rows:
        verdict = "" if not f.want else "met" if f.met(measured[f.name]) else "**MISSED**"
        end = f" `benchmarks/{f.script}` |" if script else ""
        lines.append(f"| {f.what} | {f.over} | {f.target} | {_number(f)} | {verdict} |{end}")
    return "\n".join(lines) + "\n"


@cache
def _measured() -> dict[str, float]:
    found: dict[str, float] = {}
    for path in sorted(RESULTS.glob("*.json")):
        found |= json.loads(path.read_text(encoding="utf-8")).get("figures", {})
    return found


def _number(figure: Figure) -> str:
    """Three digits, or as many as tell it from its target; a whole number has all of its own."""
    value = _measured()[figure.name]
    if float(value).is_integer():
        return minus(f"{value:.0f}")
    digits = next(d for d in range(3, 18) if d == 17 or not figure.want or float(f"{value:.{d}g}") != figure.bound)
    return minus(f"{value:.{digits}g}")


COMPARED = ("conditioned", "bridge", "emorl-shared", "linear", "experts parameter", "experts logit")


def finding() -> str:
    """The comparison at conflict and at agreement, in two sentences, from the results over ten task seeds."""
    record = json.loads(RELATIONS.read_text(encoding="utf-8"))
    worst = {(row["method"], row["rho"]): row["attainment_worst_train"] for row in record["rows"] if row["task"] == "exact-v1"}
    said = {"experts parameter": "the experts' soup", "experts logit": "mixing their logits"}
    at = ", ".join(f"{minus(f'{worst[name, -0.8]:.2f}')} for {said.get(name, f'`{name}`')}" for name in COMPARED)
    same = [worst[name, 0.8] for name in COMPARED]
    return (
        f"Where two objectives conflict (correlation −0.8), the worst attainment over the judged preferences is {at}. "
        f"Where they agree (0.8), all six are between {min(same):.2f} and {max(same):.2f}. "
        f"Each number is the interquartile mean over {len(record['task_seeds'])} task seeds of a small exact task, at no more than 20,000 "
        "samples per method.\n"
    )


def seeds() -> str:
    """The comparison of methods over ten task seeds, by correlation."""
    record = json.loads(RELATIONS.read_text(encoding="utf-8"))
    rows = {(row["method"], row["rho"]): row for row in record["rows"] if row["task"] == "exact-v1"}
    rhos = sorted({rho for _, rho in rows}, reverse=True)
    names = sorted({name for name, _ in rows}, key=lambda name: -rows[name, rhos[-1]]["attainment_worst_train"])
    at = [f"rho = {minus(f'{rho:g}')}" for rho in rhos]
    lines = [f"| method | {' | '.join(at)} | test prompts, {at[-1]} | samples |"]
    lines.append("|---|" + "---:|" * (len(rhos) + 2))
    for name in names:
        cells = [_interval(rows[name, rho], "attainment_worst_train") for rho in rhos]
        field = rows[name, rhos[0]]["fields"].get("aggregation", "")
        lines.append(
            f"| {f'{name} {field}'.strip()} | {' | '.join(cells)} | {_interval(rows[name, rhos[-1]], 'attainment_worst_test')} "
            f"| {rows[name, rhos[-1]]['samples']:,} |"
        )
    return "\n".join(lines) + "\n"


def _interval(row: Mapping[str, Any], key: str) -> str:
    value, low, high = (minus(f"{row[key + end]:.2f}") for end in ("", "_low", "_high"))
    return f"{value} [{low}, {high}]" if row[key + "_low"] != row[key + "_high"] else value


def quick_table() -> str:
    """The quick suite's table of worst attainment on training prompts: what one task seed says of new ones is left out."""
    found = quick()
    table = glance_table(found)
    commits = sorted({str(cell.env.get("commit"))[:10] for cell in found.cells})
    of = sorted({cell.task.get("seed") for cell in found.cells})
    assert len(of) == 1, "the caption says that there is one task seed"
    shown = Table(table.name, tuple(c for c in table.columns if c.key not in ("category", "worst_test")), table.rows)
    return f"Task seed {of[0]} alone; {len(found.cells)} cells; commit {', '.join(commits)}.\n\n{markdown(shown)}"


def answers() -> str:
    """The first test question of the SmolLM2 example, as the untrained model and the family answered it."""
    made = json.loads((RESULTS / "smollm_family.json").read_text(encoding="utf-8"))["answers"]
    shown = {"untrained": "none: the untrained model", "brief": "brief 1", "both": "brief 0.5, positive 0.5", "positive": "positive 1"}
    lines = [f"> {made['questions'][0]}\n", "| preference | answer |", "|---|---|"]
    return "\n".join([*lines, *(f"| {label} | {' '.join(made[name][0].split())} |" for name, label in shown.items())]) + "\n"


def elicited() -> str:
    """What `elicit` leaves to be gained after so many answers, by number of objectives, correlation and noise."""
    made = json.loads((RESULTS / "elicit.json").read_text(encoding="utf-8"))
    known = {name: re.fullmatch(r"M(\d+) rho (\S+), (\d+)% consistent", name) for name in made["found"]}
    settings = sorted((match.groups(), name) for name, match in known.items() if match)
    lines = [
        "| objectives | correlation | answers that agree | 5 answers | 10 answers | 20 answers | 10 to random pairs | users of each task |"
    ]
    lines.append("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for (count, rho, agree), name in settings:
        ours, random = made["found"][name]["ours"], made["found"][name]["random"]["10"]["median"]
        cells = [f"{ours[asked]['median']:.3f}" for asked in ("5", "20")]
        ten = "{median:.3f} [{low:.3f}, {high:.3f}]".format(**ours["10"])
        lines.append(
            f"| {count} | {minus(f'{float(rho):g}')} | {agree} % | {cells[0]} | {ten} | {cells[1]} | {random:.3f} | {made['users'][name]} |"
        )
    return "\n".join(lines) + "\n"


def commands() -> str:
    """Every command with its arguments and options, from the application itself."""
    group = typer.main.get_command(app)
    callbacks = {info.name or info.callback.__name__.replace("_", "-"): info.callback for info in app.registered_commands if info.callback}
    parts = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        given = inspect.signature(callbacks[name], eval_str=True).parameters.values()  # the options of Ray included
        hints = {p.name: _bare(p.annotation) for p in given}
        arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
        parts += [f"## `{' '.join(['paretune', name, *arguments, '[OPTIONS]'])}`\n", f"{' '.join((command.help or '').split())}\n"]
        parts += ["| argument or option | value | default | |", "|---|---|---|---|"]
        parts += [_parameter(p, hints[p.name]) for p in command.params if p.name in hints]
        shown = "\n".join(line.strip() for line in (command.epilog or "").split("\n")[2:])
        parts += ["", f"```text\n{shown}\n```", ""] if shown else [""]
    return "\n".join(parts)


def _bare(hint: Any) -> Any:
    """The type without what typer is told beside it."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is typing.Annotated else hint


def _argument(p: Any) -> str:
    name = p.metavar or p.name.upper()
    return name if p.required or name.startswith("[") else f"[{name}]"


def _parameter(p: Any, hint: Any) -> str:
    name = f"`{p.opts[0]}`" if p.param_type_name == "option" else _cell(_argument(p), code=True)
    default = "required" if p.required else "" if p.default is None or p.default is False else f"`{p.default}`"
    return f"| {name} | {_value(hint, p)} | {default} | {_cell(p.help or '')} |"


# The command line

KINDS = {str: "text", int: "integer", float: "number", Path: "path"}


def _value(hint: Any, p: Any) -> str:
    """ "integer, at least 1": a type as a reader says it."""
    options = [t for t in typing.get_args(hint) if t is not types.NoneType] if isinstance(hint, types.UnionType) else [hint]
    several = typing.get_origin(options[0]) is list
    kind = typing.get_args(options[0])[0] if several else options[0]
    if kind is bool:
        return "flag"
    least = f", at least {p.min:g}" if getattr(p, "min", None) is not None else ""
    return KINDS[kind] + least + (", several" if several else "")


def _cell(text: str, *, code: bool = False) -> str:
    """Text that may stand in a cell of a Markdown table; in code, `<` means itself."""
    plain = " ".join(text.split()).replace("|", "\\|")
    return f"`{plain}`" if code else plain.replace("<", "\\<")


# The picture, and the quick suite's results


def picture() -> str:
    """The committed results where objectives conflict most: the exact front, and attainment at every preference."""
    found = quick()
    few = Results([cell for cell in found.cells if cell.label in DRAWN], name=found.name)
    last = few.settings[-1].label
    on = PROMPTS[few.settings[-1].headline]
    titles = (f"{last}, {on}: the exact front", f"{last}, {on}: attainment")
    views = [next(iter(make(few)[-1].views.values())) for make in (front_figures, attainment_figures)]
    alt = f"Two objectives that conflict ({last}, {on}): how near each method comes to the exact Pareto front."
    return to_svg(list(zip(titles, views, strict=True)), few.looks, alt=alt)


def quick() -> Results:
    """The committed results of the quick suite."""
    cells = json.loads(QUICK.read_text(encoding="utf-8"))["cells"]
    return assemble({key: cell["record"] for key, cell in cells.items()}, {key: cell["env"] for key, cell in cells.items()}, name="quick")


def take(root: Path) -> None:
    """Copy the quick suite's cells from a run directory, numbers to six digits, each task's front once: with the reference."""
    cells, seen = {}, set()
    for cell in sorted(load(root, suite="quick").cells, key=lambda cell: (cell.record["method"]["name"] != "reference", cell.key)):
        record = {key: value for key, value in cell.record.items() if key not in ("waves", "seconds")}
        task = json.dumps(record["task"], sort_keys=True)
        if task in seen:
            record["fronts"] = None
        seen.add(task)
        cells[cell.key] = {"record": _rounded(record), "env": cell.env}
    QUICK.parent.mkdir(parents=True, exist_ok=True)
    QUICK.write_text(json.dumps({"suite": "quick", "cells": cells}, separators=(",", ":")) + "\n", encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {k: v if k in ("task", "method", "learner") else _rounded(v) for k, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, list) else value


# Pages


def markdown(table: Table) -> str:
    """A table as Markdown."""
    columns = table.shown
    lines = ["| " + " | ".join(c.title for c in columns) + " |"]
    lines.append("|" + "|".join("---" if c.kind in ("text", "yes") else "---:" for c in columns) + "|")
    for row in table.rows:
        cells = [c.show(row.get(c.key)) for c in columns]
        lines.append("| " + " | ".join([f"`{cells[0]}`" if columns[0].key == "name" else cells[0], *cells[1:]]) + " |")
    return "\n".join(lines) + "\n"


PARTS: dict[str, Callable[[], str]] = {
    "study-state": study_page.state,
    "study-claims": study_page.claims,
    "study-table": study_page.table,
    "answers": answers,
    "elicited": elicited,
    "finding": finding,
    "results": results,
    "groups": groups,
    "house": house,
    "overview": overview,
    "cards": cards,
    "targets": targets,
    "figures": figures,
    "seeds": seeds,
    "quick": quick_table,
    "commands": commands,
}


def pages() -> Iterator[Path]:
    """The files that may hold generated parts."""
    yield ROOT / "README.md"
    yield from sorted((ROOT / "docs").glob("*.md"))


def wanted() -> dict[Path, str]:
    """Every generated file, and what should stand in it."""
    listed = json.dumps(made_catalog(), indent=1, ensure_ascii=False) + "\n"  # first: what follows reads the classes, too
    made = {path: BLOCK.sub(lambda m: f"{m[1]}{PARTS[m[2]]()}{m[3]}", path.read_text(encoding="utf-8")) for path in pages()}
    return {**made, PICTURE: picture(), STUDY: study_page.picture(), SOURCE / CATALOG: listed}


def main() -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, help="a run directory that holds the quick suite")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where something is stale")
    options = parser.parse_args()
    if options.root:
        take(options.root)
    stale = [(path, text) for path, text in wanted().items() if not path.is_file() or path.read_text(encoding="utf-8") != text]
    for path, text in stale:
        print(("stale: " if options.check else "wrote ") + str(path.relative_to(ROOT)))
        if not options.check:
            path.write_text(text, encoding="utf-8")
    return 1 if options.check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
