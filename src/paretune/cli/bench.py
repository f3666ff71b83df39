"""`paretune demo`, `bench`, `compare`, `tune`, `report` and `check`: suites, what they found, and whether it is as published."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import (
    DryRun,
    Json,
    Overrides,
    Plugins,
    Workers,
    app,
    check_writable,
    examples,
    on_ray,
    plug,
    print_json,
    say,
    show_table,
    tell,
)
from paretune.errors import ConfigError
from paretune.files import disk_errors, write_text

if TYPE_CHECKING:
    from paretune.report.tables import Table
    from paretune.runs.tune import Tuning

__all__ = ["bench", "check", "compare", "demo", "report", "tune"]


@app.command(**examples("paretune demo", "paretune demo --seeds 3 --workers 4 --root my-demo"))
def demo(
    root: Annotated[Path, typer.Option(help="The run directory.")] = Path("paretune-runs/quick"),
    seeds: Annotated[int, typer.Option(min=1, max=10, help="Task seeds that the table is over; numbers of one seed can mislead.")] = 1,
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Run the quick suite and write its report: seven methods on tasks whose true front is known."""
    chosen = [f"seeds={list(range(100, 100 + seeds))}"] if seeds > 1 else []
    _bench("quick", chosen, root, "local", workers, dry_run=False, as_json=as_json)


@app.command(
    **examples(
        "paretune bench quick --dry-run",
        "paretune bench suite.yaml learner.samples=20000 seeds=[0,1] --workers 4",
        "paretune bench suite.yaml --executor ray --gpus-per-job 1",
    )
)
@on_ray
def bench(
    suite: Annotated[str, typer.Argument(help="A YAML file, or the name of a suite that ships with Paretune.")],
    overrides: Overrides = None,
    root: Annotated[Path | None, typer.Option(help="The run directory. Default: paretune-runs/ and the suite's name.")] = None,
    executor: Annotated[str, typer.Option(help="local: worker processes; in-process: this one; ray: a Ray cluster.")] = "local",
    workers: Workers = None,
    dry_run: DryRun = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run every method of a suite on every task and seed, then write the report. What is done already is not done again."""
    plug(plugin)
    _bench(suite, overrides or [], root, executor, workers, dry_run=dry_run, as_json=as_json)


@app.command(**examples("paretune report paretune-runs/quick", "paretune report runs --suite mine --out page"))
def report(
    root: Annotated[Path, typer.Argument(help="A run directory.")],
    suite: Annotated[str | None, typer.Option(help="Only the cells of this suite.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: ROOT/reports/<suite>.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Also write one row per setting and method to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Write index.html (one page, no network) and tables/*.csv from what a run directory holds, and the page of every family in it."""
    from paretune.report.family import write_families
    from paretune.runs.store import CELLS, Store

    if rows is not None and rows.is_dir():
        raise ConfigError("--rows is a file", found=f"{rows} is a directory", remedy="name a file in it, such as rows.json")
    cells = bool(Store(root).published(CELLS)) if (root / CELLS).is_dir() else False
    families, refused = ([], []) if suite or rows else write_families(root, out / "families" if out and cells else out)
    if refused and not (cells or families):
        raise refused[0]
    for error in refused:
        say(f"left out: {error}")
    if cells or not families:
        _report(root, suite, out, as_json=as_json, rows=rows)
    elif as_json:
        print_json({"families": [{"report": str(page), "measured": found.to_json() if found else None} for page, found in families]})
        return
    for page, found in families:
        if found and not as_json:
            show_table(found, title=f"{page.parent.name}: mean scores on test prompts")
        (say if as_json else tell)(f"family: {page}")


@app.command(**examples("paretune check paretune-runs/quick", "paretune check runs/families/bridge-1a2b3c4d --json"))
def check(root: Annotated[Path, typer.Argument(help="A run directory, or a family.")], as_json: Json = False) -> None:
    """Hash everything published again, families too; exit code 1 if anything is not what was published."""
    from paretune.runs.store import ARTIFACTS, CELLS, Store

    if not root.is_dir():
        raise ConfigError("only a run directory can be checked", found=f"{root} is not a directory", remedy="give the --root of a run")
    store = Store(root)
    counts = {kind: len(store.published(kind)) for kind in (ARTIFACTS, CELLS)}
    counts["families"] = len(store.families())
    problems = store.check()
    if not (problems or any(counts.values()) or any((root / kind).is_dir() for kind in (ARTIFACTS, CELLS))):
        raise ConfigError(
            "what is checked was made by Paretune: artifacts/, cells/, families/, or a folder with family.json",
            found=f"none of them in {root}",
            remedy="give the --root of a run, or a family",
        )
    if as_json:
        print_json({"root": str(root), "published": counts, "problems": problems})
    else:
        for problem in problems:
            tell(problem)
        number = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        looked = f"{counts['families']} families, {counts[ARTIFACTS]} trainings and {counts[CELLS]} results hashed"
        tell(f"{root}: {looked}: {number if problems else 'all as published'}")
    if problems:
        say("remedy: remove the directories named above; the next run makes them again")
        raise typer.Exit(1)


@app.command(
    **examples(
        "paretune compare recipe.yaml --methods experts,bridge,conditioned",
        "paretune compare recipe.yaml --methods 'uniform,{name: experts, mixing: logit}' --seeds 3",
    )
)
def compare(
    recipe: Annotated[Path, typer.Argument(help="A YAML file: model, prompts, objectives, learner; its method is left out.")],
    methods: Annotated[str, typer.Option(help="Names, or mappings with settings, between commas. The untrained model is always there.")],
    overrides: Overrides = None,
    seeds: Annotated[int, typer.Option(min=1, max=1000, help="How many seeds, from the recipe's on.")] = 1,
    samples: Annotated[int, typer.Option(min=1, max=1_000_000, help="Responses per preference and split.")] = 64,
    root: Annotated[Path | None, typer.Option(help="The run directory. Default: the recipe's, whose trainings are used again.")] = None,
    workers: Workers = None,
    dry_run: DryRun = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run several methods on a recipe's model, prompts and objectives, then write the report."""
    from paretune.runs.config import load, parse
    from paretune.runs.recipes.recipe import refuse_suite

    plug(plugin)
    refuse_suite(load(recipe).data, recipe)  # here, before anything large is imported
    rows = parse(f"methods: [{methods}]", name="--methods").data["methods"]
    if not rows or not all(isinstance(row, str | dict) for row in rows):
        raise ConfigError("--methods names methods", found=repr(methods), remedy="for example --methods experts,bridge")
    from paretune.runs.suite import compared

    suite, own = compared(recipe, rows, overrides or [], seeds=seeds, samples=samples)
    _bench(suite, [], root or own, "local", workers, dry_run=dry_run, as_json=as_json)


def _bench(
    suite: str | dict[str, Any],
    overrides: list[str],
    root: Path | None,
    executor: Any,
    workers: int | None,
    *,
    dry_run: bool,
    as_json: bool,
) -> None:
    from paretune.cli.catalog import suite_path
    from paretune.runs.config import load
    from paretune.runs.recipes.recipe import refuse_recipe

    given = suite_path(suite) if isinstance(suite, str) else suite
    if isinstance(given, Path):
        refuse_recipe(load(given, overrides).data, given)  # here, before anything large is imported
    from paretune.runs.suite import load_suite, run_suite

    folder = root or Path("paretune-runs") / load_suite(given, overrides)[0].name
    with contextlib.redirect_stdout(sys.stderr):  # a reward, or a plugin, may print
        summary = run_suite(given, folder, workers=workers, executor=executor, dry_run=dry_run, overrides=overrides)
    if dry_run:
        print_json(summary.to_json()) if as_json else tell(summary.text())
        if summary.failed:
            raise typer.Exit(1)
        return
    say(summary.text())
    _report(folder, summary.suite, None, as_json=as_json, run=summary.to_json())
    if summary.failed:
        say(f"{len(summary.failed)} failed, see above; the same command tries them again")
        raise typer.Exit(1)


def _report(
    root: Path, suite: str | None, out: Path | None, *, as_json: bool, rows: Path | None = None, run: dict[str, Any] | None = None
) -> None:
    from paretune.report.comparison import comparison_table, write_rows
    from paretune.report.data import load
    from paretune.report.page import write_page
    from paretune.report.tables import leaderboard
    from paretune.report.terminal import console, print_leaderboard

    results = load(root, suite=suite)
    with _not_searched():
        for skipped in results.skipped:
            say(f"left out: {skipped}")
        page = write_page(results, out or root / "reports" / results.name)
        if rows is not None:
            say(f"rows: {write_rows(results, rows)}")
        if as_json:
            tables = {table.name: table.to_json() for table in (leaderboard(results), comparison_table(results))}
            print_json({"report": str(page), **tables, **({"run": run} if run else {})})
            return
        print_leaderboard(results, console())
        tell(f"\nreport: {page}")


@contextlib.contextmanager
def _not_searched() -> Iterator[None]:
    """What is in memory now is not searched for garbage within: of thousands of cells that took a third of the time."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@app.command(
    **examples("paretune tune recipe.yaml --trials 20", "paretune tune suite.yaml --method bridge --metric mean --write best.yaml")
)
def tune(
    target: Annotated[str, typer.Argument(help="A recipe or a suite, with the fields to search under tune:.", metavar="RECIPE|SUITE")],
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, max=100_000, help="Trials in all; those of earlier runs count.")] = 20,
    metric: Annotated[str, typer.Option(help="worst or mean attainment (else gain) over preferences, or hypervolume.")] = "worst",
    method: Annotated[str | None, typer.Option(help="Another method than the recipe's, or one of the suite's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Seeds per trial of a recipe, from its own on.")] = 1,
    samples: Annotated[int | None, typer.Option(min=1, max=1_000_000, help="Responses per preference, where a task is not exact.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trials.")] = 0,
    root: Annotated[Path | None, typer.Option(help="The run directory. Default: as for fit and bench.")] = None,
    workers: Annotated[int, typer.Option(min=0, max=1024, help="Worker processes per trial; 0 trains in this one.")] = 0,
    no_prune: Annotated[bool, typer.Option("--no-prune", help="Train every trial to its end.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the best settings into this file, as YAML.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Search a learner's and a method's settings; stopped or killed, the same command goes on."""
    from paretune.cli.catalog import suite_path

    plug(plugin)
    check_writable(write, "--write")
    path = suite_path(target)
    from paretune.runs.tune import read_plan
    from paretune.runs.tune import tune as search

    plan = read_plan(path, overrides or [], method=method, repeats=repeats, samples=samples)
    with contextlib.redirect_stdout(sys.stderr):
        found = search(plan, trials=trials, metric=metric, root=root, seed=seed, workers=workers, prune=not no_prune, say=say)  # type: ignore[arg-type]
    best = found.yaml()
    if write is not None:
        with disk_errors(write, "a file of settings"):
            write_text(write, best)
    if as_json:
        print_json(found.to_json())
        return
    show_table(_table(found), title=f"Trials: {metric} over validation preferences")
    tell(f"{best}\nkept in {found.folder}" + (f"; written to {write}" if write else ""))


def _table(found: Tuning) -> Table:
    from paretune.report.tables import Column, Table

    names = [dimension.path for dimension in found.plan.space]
    counts = ("samples", "tokens")
    columns = (
        Column("number", "trial", "count"),
        *(Column(name, name, "text") for name in names),
        Column("value", found.metric),
        Column("state", "state", "text"),
        Column("cells", "cells", "count"),
        *(Column(name, name, "count") for name in counts),
        Column("seconds", "seconds"),
    )
    rows: list[dict[str, Any]] = []
    for trial in found.trials:
        shown = {name: str(trial.values[name]) for name in names}
        cost = {name: getattr(trial.cost, name) for name in (*counts, "seconds")}
        rows.append({"number": trial.number, **shown, "value": trial.value, "state": trial.state, "cells": trial.cells, **cost})
    return Table("trials", columns, rows)
