"""The study: every method of the taxonomy on ten relationships of objectives, judged on training and on new prompts.

    python benchmarks/study.py [--root DIR ...] [--seeds 200 201 ...] [--parts exact sampled] [--run] [--rows] [--out FILE]

`study.yaml` declares it: the task, relationships, equal budgets and methods. `--run` computes what the first root does not hold yet, seed
by seed, so that a stopped run has every method and relationship of the seeds that it finished; the same command goes on. Without it the
roots are read, several where processes ran side by side. Figures:

    study_cells_missing      cells that the study declares and no root holds, of both parts
    relate_without_evidence  shipped recipes and tasks of suites for which `relate` gives advice that names no measured rows
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from cells import attainment_W
from common import emit, machine, rounded
from paretune.evaluation.advice import DIALS, advise, load_rows, shipped
from paretune.registry import TASKS
from paretune.runs.store import Store
from paretune.runs.suite import load_suite, members_of, run_suite

HERE = Path(__file__).resolve().parent
OUT = HERE / "results" / "study.json"
SPLITS = ("train", "test")
KEPT = tuple(f"{name}_{split}" for name in ("worst", "mean", "control") for split in SPLITS)


def declared() -> dict[str, Any]:
    return yaml.safe_load((HERE / "study.yaml").read_text(encoding="utf-8"))


def suites(study: Mapping[str, Any], part: str, seed: int) -> Iterator[tuple[list[str], dict[str, Any]]]:
    """The suites of one part at one seed, one per number of objectives, each with the names of its relationships."""
    said = study["parts"][part]
    groups: dict[int, list[str]] = {}
    for name, dials in study["relationships"].items():
        if name in said.get("relationships", study["relationships"]) and name not in said.get("instead", {}):
            groups.setdefault(dials.get("objective_count", 2), []).append(name)
    for count, names in groups.items():
        yield names, _suite(study, part, seed, names, _filled(study, said.get("methods"), count))
    extra = [name for other in study["parts"].values() for name in other.get("instead", {}) if other is not said]
    for name in extra if part == "sampled" else ():  # all methods, where the other part cannot tell
        yield [name], _suite(study, part, seed, [name], _filled(study, None, 2))


def _filled(study: Mapping[str, Any], names: Sequence[str] | None, count: int) -> list[dict[str, Any]]:
    """The methods (those with these names) with the budget of `count` objectives written out."""
    budget, chosen = study["budgets"][count], []
    for entry in study["methods"]:
        entry = {"name": entry} if isinstance(entry, str) else entry
        if names is None or entry["name"] in names:
            filled = {key: budget.get(value, value) if isinstance(value, str) else value for key, value in entry.items()}
            chosen.append(filled | ({"effort": float(filled["effort"])} if "effort" in filled else {}))
    return chosen


def _suite(study: Mapping[str, Any], part: str, seed: int, names: Sequence[str], methods: Sequence[Any]) -> dict[str, Any]:
    tasks = [{**study["task"], **study["relationships"][name]} for name in names]
    name = f"study-{part}-{seed}-{'-'.join(names)}"
    legal = "".join(c if c.isalnum() or c in ".-" else "_" for c in name)
    return {"name": legal, "tasks": tasks, "learner": study["parts"][part]["learner"], "methods": list(methods), "seeds": [seed]}


def method_label(spec: Mapping[str, Any]) -> str:
    """As the leaderboard names it."""
    return f"{spec['name']} {spec['mixing']}" if spec["name"] == "experts" else str(spec["name"])


def read(study: Mapping[str, Any], roots: Sequence[Path], seeds: Sequence[int], parts: Sequence[str]) -> tuple[dict[str, Any], int, int]:
    """part -> relationship -> method -> per seed numbers and cost; the cells that are missing, and all that the study declares."""
    stores = [Store(root) for root in roots]
    found: dict[str, Any] = {}
    missing, total = 0, 0
    for part in parts:
        for seed in seeds:
            done: set[str] = set()
            for names, suite in suites(study, part, seed):
                told = {TASKS.build({**entry, "seed": seed}): name for entry, name in zip(suite["tasks"], names, strict=True)}
                for member in members_of(*load_suite(suite)):
                    if member.key in done:
                        continue
                    done.add(member.key)
                    total += 1
                    where = next((path for store in stores if (path := store.cell(member.key)) is not None), None)
                    if where is None:
                        missing += 1
                        continue
                    cell = json.loads((where / "cell.json").read_text(encoding="utf-8"))
                    name = told[member.task]
                    row = found.setdefault(part, {}).setdefault(name, {}).setdefault(method_label(cell["method"]), _empty(cell))
                    _add(row, cell)
    return found, missing, total


def _empty(cell: Mapping[str, Any]) -> dict[str, Any]:
    kept = {"category": cell["card"]["category"], "zero_shot": cell["card"]["zero_shot"], "forwards_per_token": cell["forwards_per_token"]}
    return {**kept, "seeds": [], **{name: [] for name in KEPT}, "own": [], "cost": {}}


def _add(row: dict[str, Any], cell: Mapping[str, Any]) -> None:
    row["seeds"].append(cell["seed"])
    for split in SPLITS:
        values, control = attainment_W(cell, split), cell["metrics"]["splits"][split].get("controllability")
        row[f"control_{split}"].append(None if control is None else round(control, 3))
        row[f"worst_{split}"].append(round(float(np.nanmin(values)), 3))
        row[f"mean_{split}"].append(round(float(np.nanmean(values)), 3))
    own = cell["metrics"]["splits"]["train"].get("own_utility")
    if own:
        row["own"].append(own.get("attainment", {}).get("worst"))
    for kind, short in (("total", ""), ("critical_path", "_path")):
        for name in ("steps", "samples", "tokens", "evaluations"):
            row["cost"].setdefault(name + short, []).append(cell["cost"][kind][name])


def settled(found: dict[str, Any]) -> dict[str, Any]:
    """Costs as medians over seeds, and no list that says nothing."""
    for relations in found.values():
        for rows in relations.values():
            for row in rows.values():
                row["cost"] = {name: round(float(np.median(values))) for name, values in row["cost"].items()}
                if not row["own"]:
                    del row["own"]
    return found


def merge_rows(found: Mapping[str, Any], study: Mapping[str, Any]) -> None:
    """The study's rows after those of other tasks in the results that `advise` reads; means over seeds, as attainment_* say there."""
    path = shipped()
    assert path is not None
    record = json.loads(path.read_text(encoding="utf-8"))
    kept = [row for row in record["rows"] if row.get("task") != study["task"]["name"]]
    for part, relations in found.items():
        for name, rows in relations.items():
            dials = {dial: study["relationships"][name].get(dial, usual) for dial, usual in DIALS.items()}
            for method, row in rows.items():
                told = {"task": study["task"]["name"], **dials, "method": method, "category": row["category"]}
                told |= {"learner": study["parts"][part]["learner"]["name"], "n_seeds": len(row["seeds"])}
                told |= {f"attainment_{key}": round(float(np.mean(row[key])), 4) for key in KEPT[:4]}
                kept.append({**told, "samples": round(float(np.median(row["cost"]["samples"])))})
    lines = [json.dumps(row, separators=(", ", ": ")) for row in kept]
    head = json.dumps({key: value for key, value in record.items() if key != "rows"})
    path.write_text(head[:-1] + ', "rows": [\n' + ",\n".join(lines) + "\n]}\n", encoding="utf-8")


def without_evidence() -> int:
    """Shipped recipes, and tasks of shipped suites, with advice that names no measured rows.

    Their models are not here, so that what `relate` would measure is not known: every correlation, ratio of spreads and rate counts.
    """
    rows = load_rows(shipped() or Path())
    files = [*sorted((HERE.parent / "examples").rglob("*.yaml")), *sorted((HERE.parent / "src" / "paretune" / "suites").glob("*.yaml"))]
    missing = looked = 0
    for data in (yaml.safe_load(path.read_text(encoding="utf-8")) for path in files):
        tasks = data.get("tasks", [data] if "objectives" in data else [])
        counts = {len(one["objectives"]) if "objectives" in one else one.get("objective_count", 2) for one in tasks} - {1}
        for count in counts:
            looked += 1
            dials = product([count], [-1.0, -0.5, 0.0, 0.5, 1.0, float("nan")], [1.0, 10.0, float("nan")], [0.0, 0.01, 0.3], [0.0, 2.0])
            said = [advise(dict(zip(DIALS, one, strict=False)), rows) for one in dials]
            missing += not all(len(several) > 2 and all(one.rows for one in several) for several in said)
    assert looked
    return missing


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--root", type=Path, nargs="+", default=[Path("runs/study")])
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--parts", nargs="+", default=["exact", "sampled"])
    parser.add_argument("--run", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", action="store_true", help="also put the rows that `advise` reads into the package's results")
    given = parser.parse_args()
    study = declared()
    seeds = given.seeds or study["seeds"]
    if given.run:
        for seed in seeds:
            for part in given.parts:
                for _, suite in suites(study, part, seed):
                    summary = run_suite(suite, root=given.root[0], executor="in-process", progress=False)
                    print(suite["name"], len(summary.cells), "cells", len(summary.failed), "failed", f"{summary.seconds:.0f} s", flush=True)
                    for row in summary.failed:
                        print("  failed", row.label, row.message, flush=True)
    found, missing, total = read(study, given.root, seeds, given.parts)
    figures = {"study_cells_missing": missing, "relate_without_evidence": without_evidence()}
    if given.rows:
        merge_rows(found, study)
    if given.out:  # compact: it has thousands of cells
        record = {"figures": rounded(figures), "machine": machine(), "cells_declared": total, "study": study, "cells": settled(found)}
        given.out.write_text(json.dumps(record, separators=(",", ":")) + "\n", encoding="utf-8")
    emit(figures)


if __name__ == "__main__":
    main()
