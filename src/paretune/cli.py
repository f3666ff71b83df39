"""The command line. Every command is a few lines around the library; tables go to stdout, everything else to stderr.

Libraries are imported inside the commands, so that `paretune --help` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperGroup

from paretune.errors import ParetuneError

if TYPE_CHECKING:
    from paretune.policy import Family
    from paretune.report.tables import Table
    from paretune.tasks.recipe import Recipe

__all__ = ["app", "main"]


class _Group(TyperGroup):
    """Turns what a person can meet into one message on stderr and an exit code; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except ParetuneError as error:
            _say(f"error: {error}")
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as stop:
            if not str(stop):  # with a message, whoever stopped the work has shown it
                _say("stopped; finished work and checkpoints are kept: the same command goes on from there")
            raise typer.Exit(130) from None


app = typer.Typer(
    name="paretune",
    cls=_Group,
    help="Train, combine and measure language-model policies under several objectives.",
    epilog="Exit codes: 0 done, 1 something failed while it ran, 2 a mistake in the request, 130 stopped by Ctrl-C.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON to stdout instead of a table.")]
Plugins = Annotated[list[Path] | None, typer.Option("--plugin", help="A Python file that registers methods, tasks or objectives.")]
Workers = Annotated[int | None, typer.Option(min=1, help="Worker processes of one thread each. Default: one per CPU.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Changes to the file: learner.steps=20.", metavar="[KEY=VALUE]...")]


@app.command()
def demo(
    root: Annotated[Path, typer.Option(help="The run directory.")] = Path("paretune-runs/quick"),
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Run the quick suite and write its report: every method on tasks whose true front is known."""
    _bench("quick", [], root, "local", workers, dry_run=False, as_json=as_json)


@app.command("ls")
def list_(
    kind: Annotated[str | None, typer.Argument(help="methods, tasks, objectives, learners or suites; all of them if left out.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List what there is: methods (the taxonomy), tasks, objectives, learners, suites."""
    from paretune.report.catalogue import KINDS, catalogue

    _plug(plugin)
    tables = {name: catalogue(name) for name in ([kind] if kind else KINDS)}
    if as_json:
        _print_json(tables[kind].to_json() if kind else {name: table.to_json() for name, table in tables.items()})
        return
    for name, table in tables.items():
        _print_table(table, title="" if kind else name)


@app.command()
def show(name: Annotated[str, typer.Argument(help="As `paretune ls` prints it.")], plugin: Plugins = None, as_json: Json = False) -> None:
    """Show one method, task, objective, learner or suite: its card, its fields and their defaults."""
    from paretune.report.catalogue import describe_name

    _plug(plugin)
    found = describe_name(name)
    if as_json:
        _print_json(found)
        return
    for thing in found:
        _print_description(thing)


@app.command()
def fit(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, prompts, objectives, method, learner.")],
    overrides: Overrides = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes; 0 trains in this one.")] = 0,
    samples: Annotated[int, typer.Option(min=0, help="Responses per preference to measure the result with; 0 does not measure.")] = 32,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Fit one method to your model, prompts and objectives; the result is a policy family on disk."""
    from paretune.policy import Family
    from paretune.suite import fit as fit_family
    from paretune.tasks.recipe import load_recipe

    _plug(plugin)
    plan = load_recipe(recipe, overrides or [])
    folder = plan.root / "families" / _family_name(plan)
    if (folder / "family.json").is_file():
        _say(f"this family was fitted before: {folder}")
        family = Family.load(folder)
    else:
        family = fit_family(plan.task, plan.method, learner=plan.learner, root=plan.root, seed=plan.seed, workers=workers)
        family.save(folder)
    rows = _measure(plan, family, samples) if samples else None
    if as_json:
        _print_json({"family": str(folder), "objectives": list(family.objectives.names), "measured": rows.to_json() if rows else None})
        return
    if rows:
        _print_table(rows, title=f"Mean scores on {len(plan.task.prompts('test'))} test prompts ({samples} responses per preference)")
    example = _even_weights(family.objectives.names)
    typer.echo(f'{folder}\ntry it: paretune sample {folder} --preference {example} "your prompt"')


@app.command()
def sample(
    family: Annotated[Path, typer.Argument(help="A directory that `paretune fit` wrote.")],
    prompts: Annotated[list[str], typer.Argument(help="One or more prompts.", metavar="PROMPT...")],
    preference: Annotated[str, typer.Option(help="Weights that sum to 1: a=.7,b=.3; an objective left out has 0.")],
    n: Annotated[int, typer.Option("--n", min=1, help="Responses per prompt.")] = 1,
    seed: Annotated[int, typer.Option(help="The same seed gives the same responses.")] = 0,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Longest response. Default: as in training.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 1.0,
    as_json: Json = False,
) -> None:
    """Sample responses from a policy family at one preference."""
    from paretune.policy import Family

    loaded = Family.load(family)
    made = loaded.sample(prompts, preference, n=n, seed=seed, max_new_tokens=max_new_tokens, temperature=temperature)
    if as_json:
        _print_json([{"prompt": prompt, "responses": texts} for prompt, texts in zip(prompts, made, strict=True)])
        return
    for prompt, texts in zip(prompts, made, strict=True):
        for text in texts:
            typer.echo(text if len(prompts) == 1 else f"{prompt}\n  {text}")


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help="A YAML file, or the name of a suite that ships with Paretune.")],
    overrides: Overrides = None,
    root: Annotated[Path | None, typer.Option(help="The run directory. Default: paretune-runs/<suite>.")] = None,
    executor: Annotated[str, typer.Option(help="local: worker processes; here: this process.")] = "local",
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run every method of a suite on every task and seed, then write the report. What is done already is not done again."""
    _plug(plugin)
    _bench(suite, overrides or [], root, executor, workers, dry_run=dry_run, as_json=as_json)


@app.command()
def report(
    root: Annotated[Path, typer.Argument(help="A run directory.")],
    suite: Annotated[str | None, typer.Option(help="Only the cells of this suite.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: ROOT/reports/<suite>.")] = None,
    as_json: Json = False,
) -> None:
    """Write index.html (one page, no network) and tables/*.csv from what a run directory holds."""
    _report(root, suite, out, as_json=as_json)


@app.command()
def check(root: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Hash everything published again; exit code 1 if anything is not what was published."""
    from paretune.errors import ConfigError
    from paretune.store import ARTIFACTS, CELLS, Store

    if not root.is_dir():
        raise ConfigError("only a run directory can be checked", found=f"{root} is not a directory", remedy="give the --root of a run")
    store = Store(root)
    counts = {kind: len(store.published(kind)) for kind in (ARTIFACTS, CELLS)}
    problems = store.check()
    if as_json:
        _print_json({"root": str(root), "published": counts, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        number = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        typer.echo(f"{counts[ARTIFACTS]} trainings and {counts[CELLS]} results hashed: {number if problems else 'all as published'}")
    if problems:
        _say("remedy: remove the directories named above; the next run makes them again")
        raise typer.Exit(1)


def main() -> None:
    """The `paretune` command. What libraries print while they load a model is left out; their errors are not."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    app()


# What the commands share


def _bench(
    suite: str, overrides: list[str], root: Path | None, executor: str, workers: int | None, *, dry_run: bool, as_json: bool
) -> None:
    from paretune.report.catalogue import suite_path
    from paretune.suite import run_suite

    path = suite_path(suite)
    folder = root or Path("paretune-runs") / path.stem
    summary = run_suite(path, folder, workers=workers, executor=executor, dry_run=dry_run, overrides=overrides)
    if dry_run:
        _print_json(summary.to_json()) if as_json else typer.echo(summary.text())
        return
    _say(summary.text())
    _report(folder, summary.suite, None, as_json=as_json, run=summary.to_json())
    if summary.failed:
        _say(f"{len(summary.failed)} failed, see above; the same command tries them again")
        raise typer.Exit(1)


def _report(root: Path, suite: str | None, out: Path | None, *, as_json: bool, run: dict[str, Any] | None = None) -> None:
    from paretune.report.data import load
    from paretune.report.page import write_page
    from paretune.report.tables import leaderboard
    from paretune.report.terminal import console, print_leaderboard

    results = load(root, suite=suite)
    page = write_page(results, out or root / "reports" / results.name)
    if as_json:
        _print_json({"report": str(page), "leaderboard": leaderboard(results).to_json(), **({"run": run} if run else {})})
        return
    print_leaderboard(results, console())
    typer.echo(f"\nreport: {page}")


def _family_name(plan: Recipe) -> str:
    """The same recipe names the same family."""
    from paretune.registry import describe
    from paretune.types import key_of

    method = describe(plan.method)
    key = key_of({"task": describe(plan.task), "method": method, "learner": describe(plan.learner), "seed": plan.seed})
    return f"{method['name']}-{key[:8]}"


def _measure(plan: Recipe, family: Family, samples: int) -> Table:
    """Mean scores and KL on test prompts: the reference, each objective alone, and all alike."""
    import numpy as np

    from paretune.evaluation import evaluate
    from paretune.report.tables import Column, Table

    count, names = family.objectives.count, family.objectives.names
    w_WM = np.concatenate([np.eye(count), np.full((1, count), 1 / count)])
    _say(f"measuring {len(w_WM)} preferences, {samples} responses each")
    measured = evaluate(plan.task, family, w_WM=w_WM, splits=("test",), samples=samples, seed=plan.seed).metrics["splits"]["test"]
    columns = (Column("preference", "preference", "text"), *(Column(name, name) for name in names), Column("kl", "KL"))
    labels = [*(f"{name} only" for name in names), "all alike"]
    rows: list[dict[str, Any]] = []
    for label, rewards_M, kl in zip(labels, measured["rewards"], measured["kl"]["per_preference"], strict=True):
        rows.append({"preference": label, **dict(zip(names, rewards_M, strict=True)), "kl": kl})
    return Table("measured", columns, rows)


def _plug(plugins: list[Path] | None) -> None:
    from paretune.registry import load_plugin

    for path in plugins or []:
        load_plugin(path)


def _print_table(table: Table, *, title: str = "") -> None:
    from paretune.report.terminal import console, print_table

    to = console()
    print_table(table, to, title=title)
    to.print()


def _print_description(thing: dict[str, Any]) -> None:
    from paretune.report.tables import Column, Table

    typer.echo(f"{thing['kind']} {thing['name']}" + (f" (version {thing['version']})" if "version" in thing else ""))
    typer.echo(f"\n{thing['about']}\n")
    if "text" in thing:
        typer.echo(thing["text"])
    for key, value in (thing.get("card") or {}).items():
        typer.echo(f"  {key.replace('_', ' ') + ':':20}{'yes' if value is True else 'no' if value is False else value}")
    if thing.get("fields"):
        keys = ("name", "type", "default", "about")
        _print_table(Table("fields", tuple(Column(key, key, "text") for key in keys), thing["fields"]), title="fields")


def _print_json(value: Any) -> None:
    typer.echo(json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False, default=str))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _even_weights(names: Sequence[str]) -> str:
    """`a=.34,b=.33,c=.33`: nearly even, in hundredths, and exactly 1 in sum, so that it can be typed as it stands."""
    even = 100 // len(names)
    return ",".join(f"{name}={(even if k else 100 - even * (len(names) - 1)) / 100:g}" for k, name in enumerate(names))
