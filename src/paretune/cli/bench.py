"""`paretune demo`, `bench`, `report` and `check`: suites, what they found, and whether it is still what was published."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from paretune.cli.common import Json, Overrides, Plugins, Workers, app, on_ray, plug, print_json, say
from paretune.errors import ConfigError

__all__ = ["bench", "check", "demo", "report"]


@app.command()
def demo(
    root: Annotated[Path, typer.Option(help="The run directory.")] = Path("paretune-runs/quick"),
    workers: Workers = None,
    as_json: Json = False,
) -> None:
    """Run the quick suite and write its report: seven methods on tasks whose true front is known."""
    _bench("quick", [], root, "local", workers, dry_run=False, as_json=as_json)


@app.command()
@on_ray
def bench(
    suite: Annotated[str, typer.Argument(help="A YAML file, or the name of a suite that ships with Paretune.")],
    overrides: Overrides = None,
    root: Annotated[Path | None, typer.Option(help="The run directory. Default: paretune-runs/<suite>.")] = None,
    executor: Annotated[str, typer.Option(help="local: worker processes; in-process: this one; ray: a Ray cluster.")] = "local",
    workers: Workers = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be done.")] = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Run every method of a suite on every task and seed, then write the report. What is done already is not done again."""
    plug(plugin)
    _bench(suite, overrides or [], root, executor, workers, dry_run=dry_run, as_json=as_json)


@app.command()
def report(
    root: Annotated[Path, typer.Argument(help="A run directory.")],
    suite: Annotated[str | None, typer.Option(help="Only the cells of this suite.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write. Default: ROOT/reports/<suite>.")] = None,
    rows: Annotated[Path | None, typer.Option(help="Also write one row per setting and method to this JSON file.")] = None,
    as_json: Json = False,
) -> None:
    """Write index.html (one page, no network) and tables/*.csv from what a run directory holds."""
    _report(root, suite, out, as_json=as_json, rows=rows)


@app.command()
def check(root: Annotated[Path, typer.Argument(help="A run directory.")], as_json: Json = False) -> None:
    """Hash everything published again; exit code 1 if anything is not what was published."""
    from paretune.runs.store import ARTIFACTS, CELLS, Store

    if not root.is_dir():
        raise ConfigError("only a run directory can be checked", found=f"{root} is not a directory", remedy="give the --root of a run")
    store = Store(root)
    counts = {kind: len(store.published(kind)) for kind in (ARTIFACTS, CELLS)}
    problems = store.check()
    if as_json:
        print_json({"root": str(root), "published": counts, "problems": problems})
    else:
        for problem in problems:
            typer.echo(problem)
        number = f"{len(problems)} problem{'s' if len(problems) != 1 else ''}"
        typer.echo(f"{counts[ARTIFACTS]} trainings and {counts[CELLS]} results hashed: {number if problems else 'all as published'}")
    if problems:
        say("remedy: remove the directories named above; the next run makes them again")
        raise typer.Exit(1)


def _bench(
    suite: str, overrides: list[str], root: Path | None, executor: str, workers: int | None, *, dry_run: bool, as_json: bool
) -> None:
    from paretune.report.catalog import suite_path
    from paretune.runs.suite import run_suite

    path = suite_path(suite)
    folder = root or Path("paretune-runs") / path.stem
    summary = run_suite(path, folder, workers=workers, executor=executor, dry_run=dry_run, overrides=overrides)
    if dry_run:
        print_json(summary.to_json()) if as_json else typer.echo(summary.text())
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
    page = write_page(results, out or root / "reports" / results.name)
    if rows is not None:
        say(f"rows: {write_rows(results, rows)}")
    if as_json:
        tables = {table.name: table.to_json() for table in (leaderboard(results), comparison_table(results))}
        print_json({"report": str(page), **tables, **({"run": run} if run else {})})
        return
    print_leaderboard(results, console())
    typer.echo(f"\nreport: {page}")
