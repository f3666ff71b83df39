"""`paretune tune`: hyperparameters of a learner and a method, searched on preferences that are not judged."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paretune.cli.common import Json, Overrides, Plugins, app, check_writable, plug, print_json, say, show_table

if TYPE_CHECKING:
    from paretune.report.tables import Table
    from paretune.runs.tune import Tuning

__all__ = ["tune"]


@app.command()
def tune(
    target: Annotated[str, typer.Argument(help="A recipe or a suite, with the fields to search under tune:.", metavar="RECIPE|SUITE")],
    overrides: Overrides = None,
    trials: Annotated[int, typer.Option(min=1, help="Trials in all; those of earlier runs count.")] = 20,
    metric: Annotated[str, typer.Option(help="worst or mean attainment (else gain) over preferences, or hypervolume.")] = "worst",
    method: Annotated[str | None, typer.Option(help="Another method than the recipe's, or one of the suite's.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Seeds per trial of a recipe, from its own on.")] = 1,
    samples: Annotated[int | None, typer.Option(min=1, help="Responses per preference, where a task is not exact.")] = None,
    seed: Annotated[int, typer.Option(help="The same seed gives the same trials.")] = 0,
    root: Annotated[Path | None, typer.Option(help="The run directory. Default: as for fit and bench.")] = None,
    workers: Annotated[int, typer.Option(min=0, help="Worker processes per trial; 0 trains in this one.")] = 0,
    no_prune: Annotated[bool, typer.Option("--no-prune", help="Train every trial to its end.")] = False,
    write: Annotated[Path | None, typer.Option(help="Write the best settings into this file, as YAML.")] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Search a learner's and a method's settings; stopped or killed, the same command goes on."""
    from paretune.report.catalog import suite_path
    from paretune.runs.tune import read_plan
    from paretune.runs.tune import tune as search

    plug(plugin)
    check_writable(write, "--write")
    path = Path(target) if target.endswith((".yaml", ".yml")) else suite_path(target)
    plan = read_plan(path, overrides or [], method=method, repeats=repeats, samples=samples)
    found = search(plan, trials=trials, metric=metric, root=root, seed=seed, workers=workers, prune=not no_prune, say=say)  # type: ignore[arg-type]
    best = found.yaml()
    if write is not None:
        write.write_text(best, encoding="utf-8")
    if as_json:
        print_json(found.to_json())
        return
    show_table(_table(found), title=f"Trials: {metric} over validation preferences")
    typer.echo(f"{best}\nkept in {found.folder}" + (f"; written to {write}" if write else ""))


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
